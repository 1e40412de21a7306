"""utils/table.py: a table on the terminal, as Markdown and as CSV."""

import csv
from pathlib import Path

from utils.table import Column, Table


def test_table_as_text_markdown_and_csv(tmp_path: Path):
    columns = [Column("name"), Column("value", ".1f"), Column("count", ",d")]
    table = Table("t", "Title", columns, [["a|b", 1.25, 1000], ["c", None, 7]], ["Note."])
    assert table.terminal().splitlines() == [
        "Title",
        "",
        "name  value  count",
        "----  -----  -----",
        "a|b     1.2  1,000",
        "c         –      7",
        "",
        "Note.",
    ]
    assert "| a\\|b | 1.2 | 1,000 |" in table.markdown() and "| --- | ---: | ---: |" in table.markdown()
    markdown, values = table.save(tmp_path / "new")
    assert markdown.read_text() == table.markdown()
    assert list(csv.reader(values.read_text().splitlines())) == [
        ["name", "value", "count"],
        ["a|b", "1.25", "1000"],
        ["c", "", "7"],
    ]
