"""python -m tools: the list of programs."""

import importlib

from tools.__main__ import summaries


def test_every_program_has_a_one_line_summary_and_a_main():
    assert "convert_weights" in summaries()
    for name, summary in summaries().items():
        assert summary.endswith(".") and len(summary) <= 90, name
        assert callable(importlib.import_module(f"tools.{name}").main)
