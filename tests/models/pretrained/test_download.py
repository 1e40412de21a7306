"""Resolving names and URLs to files: one download per file, resumed after lost connections, verified and kept."""

import fcntl
import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.pretrained import download, registry
from models.pretrained.download import resolve_weights
from models.pretrained.registry import RELEASES, Release
from tests._origins import SMALL
from utils.checkpoint.io import read_checkpoint, write_weights
from utils.errors import UserError

Web = tuple[str, Path]  # the URL of a file and its path on the server


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one version of a file, supports ranges, and can close the connection early."""

    version = '"v1"'
    close_after: list[int] = []  # bytes to send in each of the next responses
    requested_ranges: list[str | None] = []

    def do_GET(self) -> None:
        path = Path(self.directory, self.path.lstrip("/").partition("?")[0])
        self.requested_ranges.append(self.headers["Range"])
        if not path.is_file():
            self.send_error(404)
            return
        contents, start = path.read_bytes(), 0
        if self.headers["Range"] and self.headers["If-Range"] == self.version:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(contents):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.version)
        self.send_header("Content-Length", str(len(contents) - start))
        self.end_headers()
        length = self.close_after.pop(0) if self.close_after else len(contents)
        self.wfile.write(contents[start : start + length])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A local server with weights of 300 kB, and an empty download folder."""
    folder = tmp_path / "www"
    folder.mkdir()
    torch.save({"model": {"w": torch.arange(75_000.0)}}, folder / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(Handler, "close_after", [])
    monkeypatch.setattr(Handler, "requested_ranges", [])
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pth", folder / "weights.pth"
        running.shutdown()
        thread.join()


def add_release(monkeypatch: pytest.MonkeyPatch, url: str, sha256: str = "") -> None:
    extra = Release("swin_test", "original", "swin_tiny", 1000, url, None, None, sha256)
    monkeypatch.setattr(registry, "RELEASES", (*RELEASES, extra))


def test_a_name_is_downloaded_verified_and_kept(web: Web, monkeypatch, caplog, tmp_path):
    url, file = web
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    add_release(monkeypatch, url, digest[:8])
    with caplog.at_level("INFO"):
        contents = read_checkpoint(resolve_weights("swin_test"))
    assert torch.equal(contents["model"]["w"], torch.arange(75_000.0))
    path = tmp_path / "hub" / "hub" / "checkpoints" / "weights.pth"
    assert path.read_bytes() == file.read_bytes() and [p.name for p in path.parent.iterdir()] == ["weights.pth"]
    assert f"SHA-256 {digest} (as expected)" in caplog.text
    file.unlink()
    assert resolve_weights("swin_test") == resolve_weights(url) == path and len(Handler.requested_ranges) == 1


def test_a_file_with_a_wrong_digest_is_not_kept(web: Web, monkeypatch, tmp_path):
    url, file = web
    add_release(monkeypatch, url, "0" * 8)
    with pytest.raises(UserError, match="SHA-256 is [0-9a-f]{64}, expected 00000000; the download was deleted"):
        resolve_weights("swin_test")
    assert not list((tmp_path / "hub").rglob("weights.pth*"))


def test_a_digest_in_the_url_is_verified(web: Web):
    url, file = web
    with pytest.raises(UserError, match="SHA-256 is"):
        resolve_weights(f"{url}#sha256={'0' * 64}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert resolve_weights(f"{url}#sha256={digest}").read_bytes() == file.read_bytes()


def test_a_missing_file_is_an_error(web: Web):
    with pytest.raises(UserError, match="other.pth: download failed.*by other means"):
        resolve_weights(web[0].replace("weights.pth", "other.pth"))


def test_an_unknown_digest_is_logged_and_a_given_one_is_verified(web: Web, caplog):
    with caplog.at_level("INFO"):
        path = resolve_weights(web[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"SHA-256 {digest} (not verified" in caplog.text
    with pytest.raises(UserError, match="Delete it to download it again"):
        resolve_weights(f"{web[0]}#sha256={'0' * 64}")
    assert resolve_weights(f"{path}#sha256={digest[:8].upper()}") == path
    with pytest.raises(UserError, match="at least the first 8"):
        resolve_weights(f"{path}#sha256=123")


def test_urls_with_the_same_ending_are_different_files(web: Web):
    url, file = web
    first = resolve_weights(f"{url}?a")
    file.write_bytes(b"another")
    assert resolve_weights(url).read_bytes() == b"another" and first.read_bytes() != b"another"


def test_a_lost_connection_is_resumed(web: Web, caplog):
    url, file = web
    Handler.close_after[:] = [100_000, 150_000]
    with caplog.at_level("INFO"):
        assert resolve_weights(url).read_bytes() == file.read_bytes()
    assert Handler.requested_ranges == [None, "bytes=100000-", "bytes=250000-"]
    assert "lost after 100000 bytes; continuing" in caplog.text


def test_a_server_that_always_closes_the_connection_is_an_error(web: Web):
    Handler.close_after[:] = [100_000, 0]
    with pytest.raises(UserError, match="lost after 100000 bytes several times"):
        resolve_weights(web[0])
    assert len(Handler.requested_ranges) == 2 and resolve_weights(web[0]).read_bytes() == web[1].read_bytes()


def test_two_processes_download_the_same_file_once(web: Web, caplog):
    path = download._cache_dir() / download._file_name(web[0])
    other = threading.Thread(target=resolve_weights, args=web[:1])
    path.parent.mkdir(parents=True)
    with open(f"{path}.part", "ab") as part, caplog.at_level("INFO"):
        fcntl.flock(part, fcntl.LOCK_EX)
        other.start()
        while "waiting for another process" not in caplog.text:
            other.join(0.01)
            assert other.is_alive()
        path.write_bytes(b"downloaded by the other process")
    other.join()
    assert Handler.requested_ranges == [] and path.read_bytes() == b"downloaded by the other process"


def interrupt(web: Web) -> Path:
    """Downloads 100,000 bytes, then the server loses the file. Returns the partial download."""
    url, file = web
    contents = file.read_bytes()
    Handler.close_after[:] = [100_000]
    original = download._receive_once

    def once(*args) -> bool:
        try:
            return original(*args)
        finally:
            file.unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_receive_once", once)
        with pytest.raises(UserError, match="download failed .*404.* Start again to continue it"):
            resolve_weights(url)
    file.write_bytes(contents)
    Handler.requested_ranges.clear()
    (part,) = download._cache_dir().glob("*.part")
    assert part.stat().st_size == 100_000
    return part


def test_an_interrupted_download_is_resumed_at_the_next_start(web: Web):
    interrupt(web)
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()
    assert Handler.requested_ranges == ["bytes=100000-"]
    assert [p.suffix for p in download._cache_dir().iterdir()] == [".pth"]


@pytest.mark.parametrize("version", ['"v2"', None], ids=["another version", "unknown version"])
def test_a_part_of_another_version_is_not_resumed(web: Web, monkeypatch, version):
    part = interrupt(web)
    if version:
        monkeypatch.setattr(Handler, "version", version)
    else:
        part.with_name(f"{part.name}.version").unlink()
    web[1].write_bytes(web[1].read_bytes()[::-1])
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()


def test_a_part_that_is_too_long_is_downloaded_again(web: Web):
    part = interrupt(web)
    part.write_bytes(bytes(400_000))
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()
    assert Handler.requested_ranges == ["bytes=400000-", None]


def test_without_a_network_the_message_names_the_url_and_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/no-server.pth"
    add_release(monkeypatch, url)
    with pytest.raises(UserError) as caught:
        resolve_weights("swin_test")
    message = str(caught.value)
    path = tmp_path / "hub" / "checkpoints" / "no-server.pth"
    assert message.startswith(f"{url}: download failed (") and f"or put it at {path}" in message
    path.write_bytes(b"copied")
    assert resolve_weights("swin_test") == path


def test_a_file_precedes_a_name_and_a_similar_name_is_suggested(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("swin_tiny_patch4_window7_224").write_bytes(b"mine")
    assert resolve_weights("swin_tiny_patch4_window7_224") == Path("swin_tiny_patch4_window7_224")
    with pytest.raises(UserError, match="no such file. Did you mean the released swin_base_patch4_window7_224?"):
        resolve_weights("swin_base_patch4_windw7_224")
    with pytest.raises(UserError, match="a name that `python -m tools.models` lists"):
        resolve_weights("weights.pth")


def test_a_user_without_a_home_is_told_to_set_torch_home(homeless, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no home folder. Set TORCH_HOME"):
        resolve_weights(RELEASES[0].name)
    assert not any(tmp_path.iterdir())


def test_a_path_begins_at_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"")
    assert resolve_weights("~/w.pth") == tmp_path / "w.pth"


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_stands_for_the_weights_in_it(tmp_path: Path, name: str):
    write_weights(tmp_path / name, {"w": torch.ones(2)})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    for source in (str(tmp_path), f"{tmp_path}/"):
        assert resolve_weights(source) == tmp_path / name
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert resolve_weights(f"{tmp_path}#sha256={digest[:8]}") == tmp_path / name
    with pytest.raises(UserError, match=f"{name}: SHA-256 is {digest}"):
        resolve_weights(f"{tmp_path}#sha256=00000000")


def test_transformers_and_its_shards(tmp_path: Path):
    """save_pretrained with a limit on the size of a file writes an index and several files."""
    case = next(case for case in SMALL if (case.origin, case.version) == ("hf", 1))
    theirs: Any = case.theirs()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    index = resolve_weights(str(tmp_path / "parts"))
    assert index.name == "model.safetensors.index.json"
    whole, parts = (read_checkpoint(resolve_weights(str(tmp_path / name))) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    next((tmp_path / "parts").glob("*00001*.safetensors")).unlink()
    with pytest.raises(UserError, match="index.json: model-00001.*is missing"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable index"),
        ("[" * 100_000, "not a readable index"),
        ("[]", "not a readable index"),
        ('{"weight_map": 3}', "not a readable index"),
        ('{"weight_map": {"w": 3}}', "names 3, which is no file next to it"),
        ('{"weight_map": {"w": ["a"]}}', "not a readable index"),
        ('{"weight_map": {"w": "../secret.bin"}}', "names '../secret.bin'"),
        ('{"weight_map": {"w": "/secret.bin"}}', "names '/secret.bin'"),
        ('{"weight_map": {"w": ".."}}', ".. is missing"),
        ('{"weight_map": {"v": "a.safetensors"}}', "v: in none of the files a.safetensors"),
    ],
)
def test_indices_that_lie_are_refused(tmp_path: Path, text: str, message: str):
    write_weights(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


def test_a_folder_without_weights_names_the_file_to_give(tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder without model.safetensors .*Name the file to read$"):
        resolve_weights(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "checkpoints" / "best.pth")
    with pytest.raises(UserError, match=f"such as {tmp_path}/checkpoints/best.pth"):
        resolve_weights(str(tmp_path))


def test_a_released_name_wins_over_a_folder_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "swin_tiny_patch4_window7_224"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / name).mkdir()
    cached = tmp_path / "hub" / "hub" / "checkpoints" / f"{name}.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    assert resolve_weights(name) == cached
    write_weights(tmp_path / name / "model.safetensors", {"w": torch.ones(2)})
    assert resolve_weights(name) == Path(name, "model.safetensors")
