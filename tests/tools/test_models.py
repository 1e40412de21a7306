"""The list of released weights: every fact in it that can be checked here is; names stand for files; downloads."""

import fcntl
import functools
import hashlib
import http.server
import re
import threading
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from config import get_config
from models import other_libraries
from models.build import build_model
from models.count import count_macs, count_parameters
from models.pretrained import download, registry
from models.pretrained.download import resolve_weights
from models.pretrained.registry import COUNTED, RELEASES, Release
from tools import independent
from tools import models as tool
from utils.checkpoint.io import read_checkpoint
from utils.errors import UserError
from utils.paths import REPO_ROOT

QUICK = {("swin_tiny", 1000), ("swin_tiny_22k", 21841), ("swinv2_tiny_w8", 1000), ("swin_mlp_tiny_c24", 1000)}


# The facts -----------------------------------------------------------------------------------------------------------


def test_names_files_and_addresses_are_each_of_one_release():
    for what in ("name", "file", "url"):
        assert len({getattr(release, what) for release in RELEASES}) == len(RELEASES) == 89
    assert {release.origin for release in RELEASES} == set(registry.ORIGINS)
    assert {(release.recipe, release.classes) for release in RELEASES} == set(COUNTED)


@pytest.mark.parametrize("release", [r for r in RELEASES if r.origin == "torchvision"], ids=lambda r: r.name)
def test_torchvision_says_the_same(release: Release):
    weights = torchvision.models.get_model_weights(release.name.removeprefix("torchvision/")).DEFAULT
    metrics = weights.meta["_metrics"]["ImageNet-1K"]
    assert (release.url, release.top1, release.top5) == (weights.url, metrics["acc@1"], metrics["acc@5"])
    parameters, macs = COUNTED[release.recipe, 1000]
    # torchvision's V2 has key biases, which it keeps at zero, and counts what its position bias costs once.
    assert 0 <= weights.meta["num_params"] - parameters <= 20_000
    assert macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=0.01)
    assert re.fullmatch("[0-9a-f]{8}", release.sha256)


@pytest.mark.parametrize("release", [r for r in RELEASES if r.origin == "timm"], ids=lambda r: r.name)
def test_timm_says_the_same(release: Release):
    cfg = timm.get_pretrained_cfg(release.name.removeprefix("timm/"))
    assert release.url == f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
    assert cfg.num_classes == release.classes
    (source,) = [original for original in RELEASES if original.url == cfg.url]
    assert (source.recipe, source.top1, source.top5) == (release.recipe, release.top1, release.top5)


def test_every_swin_of_timm_is_listed():
    names = [name for name in timm.list_pretrained(["swin_*", "swinv2_*"]) if "_cr_" not in name and "_s3_" not in name]
    assert {f"timm/{name}" for name in names} == {release.name for release in RELEASES if release.origin == "timm"}


@pytest.mark.parametrize(
    "key",
    [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in COUNTED],
    ids=lambda key: f"{key[0]}-{key[1]}",
)
def test_counts(key: tuple[str, int]):
    recipe, classes = key
    config = get_config(REPO_ROOT / "configs" / f"{recipe}.yaml")
    with torch.device("meta"):
        model = build_model(config, classes).eval()
    assert COUNTED[key] == (count_parameters(model), count_macs(model, config.DATA.IMG_SIZE))


def test_every_recipe_is_there_and_built_for_its_pixels():
    for release in RELEASES:
        config = get_config(REPO_ROOT / "configs" / f"{release.recipe}.yaml")
        pixels = re.findall(r"(?:to|_|-)(192|224|256|384)(?![0-9])", release.url)
        if release.origin != "torchvision":
            assert config.DATA.IMG_SIZE == int(pixels[-1]), release.name
        kind = "swinv2" if "v2" in release.name else "swin_mlp" if "mlp" in release.name else "swin"
        assert config.MODEL.TYPE == kind, release.name


# The command ---------------------------------------------------------------------------------------------------------


def test_listing_shows_what_is_known_and_says_what_is_not(capsys):
    assert tool.main(["swin_tiny", "224"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("swin_tiny_patch4_window7_224 "))
    assert re.split(r"\s{2,}", line) == [
        "swin_tiny_patch4_window7_224", "original", "1000", "28.3", "4.5", "108", "81.2", "95.5", "unknown",
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth",
    ]  # fmt: skip
    assert "swin_base" not in shown and "timm/swin_tiny_patch4_window7_224.ms_in22k" in shown
    assert "704ceda3…" in tool.listing(["torchvision"]).terminal()


def test_no_such_release(capsys):
    assert tool.main(["swin", "giant"]) == 2
    assert "no release has a name with swin and giant" in capsys.readouterr().err
    assert tool.main(["--compare", "--only", "swin_giant"]) == 2
    assert "--only swin_giant: not the recipe of a release" in capsys.readouterr().err


SMALL = {"DATA.IMG_SIZE": 64, "EMBED_DIM": 16, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 4}


def small_config(kind: str, **changes):
    section = f"MODEL.{kind.upper()}"
    opts = {key if "." in key else f"{section}.{key}": value for key, value in (SMALL | changes).items()}
    return get_config(None, ["MODEL.TYPE", kind, *(part for pair in opts.items() for part in pair)])


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_comparison_finds_equals_equal(kind):
    config = small_config(kind)
    parameters, macs, by_timm, by_torchvision, by_transformers, largest = independent.compare(config, 7)
    assert parameters == count_parameters(build_model(config, 7)) and macs > 0
    assert by_torchvision is None and 0 <= by_timm < 1e-5 and 0 <= by_transformers < 1e-5 and largest > 0.1


def test_comparison_finds_others_different(monkeypatch):
    other = small_config("swinv2", PRETRAINED_WINDOW_SIZES=[8, 8])
    build = {"timm": lambda config, section, classes: other_libraries.by_timm(other, other.MODEL.SWINV2, classes)}
    monkeypatch.setattr(independent, "LIBRARIES", build)
    assert independent.compare(small_config("swinv2"), 7)[2] > 1e-3


def test_comparison_takes_each_network_once():
    ((recipes, classes, config),) = independent.distinct_networks(["swin_tiny", "swin_tiny_22kto1k"])
    assert (recipes, classes) == (["swin_tiny", "swin_tiny_22kto1k"], 1000)
    assert other_libraries.by_torchvision(config, config.MODEL.SWIN, 3).head.out_features == 3
    assert other_libraries.by_torchvision(small_config("swin"), small_config("swin").MODEL.SWIN, 3) is None


# Downloads -----------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one version of a file, continues where it is asked to, and can be told to hang up early."""

    version = '"v1"'
    hang_up_after: list[int] = []  # bytes to send of each of the next answers
    asked: list[str | None] = []

    def do_GET(self) -> None:
        path = Path(self.directory, self.path.lstrip("/").partition("?")[0])
        self.asked.append(self.headers["Range"])
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
        length = self.hang_up_after.pop(0) if self.hang_up_after else len(contents)
        self.wfile.write(contents[start : start + length])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server on this machine with weights of 300 kB, its address, and an empty download folder."""
    folder = tmp_path / "www"
    folder.mkdir()
    torch.save({"model": {"w": torch.arange(75_000.0)}}, folder / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(Handler, "hang_up_after", [])
    monkeypatch.setattr(Handler, "asked", [])
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


def test_a_name_stands_for_the_file_and_is_verified_and_kept(web, monkeypatch, caplog, tmp_path):
    url, file = web
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    add_release(monkeypatch, url, digest[:8])
    with caplog.at_level("INFO"):
        contents = read_checkpoint("swin_test")
    assert torch.equal(contents["model"]["w"], torch.arange(75_000.0))
    path = tmp_path / "hub" / "hub" / "checkpoints" / "weights.pth"
    assert path.read_bytes() == file.read_bytes() and [p.name for p in path.parent.iterdir()] == ["weights.pth"]
    assert f"its SHA-256 is {digest}, as it should be" in caplog.text
    file.unlink()
    assert resolve_weights("swin_test") == resolve_weights(url) == path and len(Handler.asked) == 1


def test_what_is_not_the_release_is_not_kept(web, monkeypatch, tmp_path):
    url, file = web
    add_release(monkeypatch, url, "0" * 8)
    with pytest.raises(UserError, match="SHA-256 is [0-9a-f]{64}, not 00000000 .* was not kept"):
        resolve_weights("swin_test")
    assert not list((tmp_path / "hub").rglob("weights.pth*"))


def test_an_unknown_digest_is_said(web, caplog):
    with caplog.at_level("INFO"):
        path = resolve_weights(web[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"its SHA-256 is {digest}, which is published nowhere" in caplog.text
    with pytest.raises(UserError, match="Delete it to download it again"):
        resolve_weights(f"{web[0]}#sha256={'0' * 64}")
    assert resolve_weights(f"{path}#sha256={digest[:8].upper()}") == path
    with pytest.raises(UserError, match="at least the first 8"):
        resolve_weights(f"{path}#sha256=123")


def test_addresses_that_end_alike_are_different_files(web):
    url, file = web
    first = resolve_weights(f"{url}?a")
    file.write_bytes(b"another")
    assert resolve_weights(url).read_bytes() == b"another" and first.read_bytes() != b"another"


def test_a_broken_connection_is_taken_up_where_it_broke(web, caplog):
    url, file = web
    Handler.hang_up_after[:] = [100_000, 150_000]
    with caplog.at_level("INFO"):
        assert resolve_weights(url).read_bytes() == file.read_bytes()
    assert Handler.asked == [None, "bytes=100000-", "bytes=250000-"]
    assert "broke off after 100000 bytes; continuing" in caplog.text


def test_a_server_that_always_hangs_up_is_given_up(web):
    Handler.hang_up_after[:] = [100_000, 0]
    with pytest.raises(UserError, match="breaks off after 100000 bytes, again and again"):
        resolve_weights(web[0])
    assert len(Handler.asked) == 2 and resolve_weights(web[0]).read_bytes() == web[1].read_bytes()


def test_two_who_want_the_same_file_download_it_once(web, caplog):
    path, other = download._cache() / download._file_of(web[0]), threading.Thread(target=resolve_weights, args=web[:1])
    path.parent.mkdir(parents=True)
    with open(f"{path}.part", "ab") as part, caplog.at_level("INFO"):
        fcntl.flock(part, fcntl.LOCK_EX)
        other.start()
        while "waiting for another process" not in caplog.text:
            other.join(0.01)
            assert other.is_alive()
        path.write_bytes(b"what the other process brought")
    other.join()
    assert Handler.asked == [] and path.read_bytes() == b"what the other process brought"


def interrupt(web) -> Path:
    """Downloads 100,000 bytes, then finds the file gone. Returns the part that is left."""
    url, file = web
    contents = file.read_bytes()
    Handler.hang_up_after[:] = [100_000]
    original = download._receive_once

    def once(*args) -> bool:
        try:
            return original(*args)
        finally:
            file.unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_receive_once", once)
        with pytest.raises(UserError, match="download failed .*404.* Start again to continue where it broke off"):
            resolve_weights(url)
    file.write_bytes(contents)
    Handler.asked.clear()
    (part,) = download._cache().glob("*.part")
    assert part.stat().st_size == 100_000
    return part


def test_a_download_that_was_given_up_continues_the_next_time(web):
    interrupt(web)
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()
    assert Handler.asked == ["bytes=100000-"]
    assert [p.suffix for p in download._cache().iterdir()] == [".pth"]


@pytest.mark.parametrize("version", ['"v2"', None], ids=["another version", "unknown version"])
def test_a_part_of_another_version_is_not_continued(web, monkeypatch, version):
    part = interrupt(web)
    if version:
        monkeypatch.setattr(Handler, "version", version)
    else:
        part.with_name(f"{part.name}.version").unlink()
    web[1].write_bytes(web[1].read_bytes()[::-1])
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()


def test_a_part_that_is_too_long_comes_anew(web):
    part = interrupt(web)
    part.write_bytes(bytes(400_000))
    assert resolve_weights(web[0]).read_bytes() == web[1].read_bytes()
    assert Handler.asked == ["bytes=400000-", None]


def test_without_a_network_the_message_says_what_to_bring_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/nobody-listens.pth"
    add_release(monkeypatch, url)
    with pytest.raises(UserError) as caught:
        resolve_weights("swin_test")
    message = str(caught.value)
    place = tmp_path / "hub" / "checkpoints" / "nobody-listens.pth"
    assert message.startswith(f"{url}: download failed (") and f"or put it at {place}" in message
    place.write_bytes(b"brought")
    assert resolve_weights("swin_test") == place


def test_a_file_wins_over_a_name_and_a_near_name_is_guessed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("swin_tiny_patch4_window7_224").write_bytes(b"mine")
    assert resolve_weights("swin_tiny_patch4_window7_224") == Path("swin_tiny_patch4_window7_224")
    with pytest.raises(UserError, match="no such file. Did you mean the released swin_base_patch4_window7_224?"):
        resolve_weights("swin_base_patch4_windw7_224")
    with pytest.raises(UserError, match="a name that `python -m tools.models` lists"):
        resolve_weights("weights.pth")
