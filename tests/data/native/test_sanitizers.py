"""The native library under gcc's sanitizers, fed with mutated JPEGs and hostile numbers; they notice planted faults.

`fuzz_jpeg.c` and `fuzz_pixels.c` are the programs. An input that fails is repeated with its seed alone.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests._images import draw, encode
from utils.paths import REPO_ROOT

HERE, SOURCES = Path(__file__).parent, REPO_ROOT / "data" / "native"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"
# The library's flags, with less optimisation, which compiles in seconds and shows the lines.
FLAGS = "-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-march=native", *SANITIZERS


def unsupported_reason() -> str:
    """Returns why the programs cannot be compiled here, or ""."""
    if platform.system() != "Linux" or shutil.which("gcc") is None:
        return "needs gcc on Linux"
    program = ["gcc", *SANITIZERS, "-x", "c", "-", "-o", os.devnull]
    compiled = subprocess.run(program, input="int main(void) { return 0; }", text=True, capture_output=True)
    return f"gcc has no sanitizers here: {compiled.stderr[-200:]}" if compiled.returncode else ""


pytestmark = pytest.mark.skipif(bool(unsupported_reason()), reason=unsupported_reason() or "-")


def compile_programs(sources: Path, folder: Path) -> Path:
    """Compiles the library in `sources` and both programs into `folder`, and returns it."""
    units = sorted(str(path) for path in sources.glob("*.c"))
    options = [*FLAGS, f"-I{sources}", f"-I{HERE}"]
    subprocess.run(["gcc", *options, "-c", *units], cwd=folder, check=True)
    objects = sorted(str(path) for path in folder.glob("*.o"))
    for name in ("fuzz_jpeg", "fuzz_pixels"):
        program = HERE / f"{name}.c"
        subprocess.run(["gcc", *options, str(program), *objects, "-lm", "-o", str(folder / name)], check=True)
    return folder


def write_jpegs(folder: Path) -> list[Path]:
    """Writes small JPEGs of every kind that the decoder supports."""
    kinds: list[dict[str, Any]] = [
        {"subsampling": 0}, {"subsampling": 1, "quality": 95}, {"subsampling": 2, "quality": 30},
        {"subsampling": 2, "optimize": True}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0"}, {"grey": True},
    ]  # fmt: skip
    paths = []
    for i, size in enumerate([(70, 60), (33, 47), (8, 8), (100, 17)]):
        noise = np.random.RandomState(i).randint(0, 256, (size[1], size[0], 3), np.uint8)
        image = Image.blend(draw(i, size), Image.fromarray(noise), 0.3)
        for k, options in enumerate(kinds):
            grey = {key: value for key, value in options.items() if key != "grey"}
            paths.append(folder / f"{i}{k}.jpg")
            paths[-1].write_bytes(encode(image.convert("L") if "grey" in options else image, **grey))
    return paths


def run(program: Path, inputs: int, seed: int, *files: Path) -> subprocess.CompletedProcess:
    return subprocess.run([program, str(inputs), str(seed), *files], capture_output=True, text=True)


def counts(done: subprocess.CompletedProcess) -> list[int]:
    """The numbers that a program printed, after it has ended without a report."""
    if "LeakSanitizer has encountered a fatal error" in done.stderr:
        pytest.skip("leaks cannot be looked for under a debugger")
    assert done.returncode == 0, done.stderr[-5000:]
    return [int(word) for word in done.stdout.split() if word.isdigit()]


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_jpegs(tmp_path_factory.mktemp("jpegs"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield compile_programs(SOURCES, tmp_path_factory.mktemp("programs"))


def test_mutated_jpegs(programs: Path, jpegs: list[Path]):
    inputs, accepted, decoded = counts(run(programs / "fuzz_jpeg", 15_000, 1, *jpegs))
    assert inputs == 15_000 and accepted > 5_000 and decoded > 2_000


def test_hostile_numbers(programs: Path):
    resized, augmented, refused = counts(run(programs / "fuzz_pixels", 20_000, 1))
    assert resized > 4_000 and augmented > 8_000 and refused > 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_inputs(programs: Path, jpegs: list[Path]):
    for seed in range(2, 8):
        counts(run(programs / "fuzz_jpeg", 300_000, seed, *jpegs))
        counts(run(programs / "fuzz_pixels", 300_000, seed))


FAULTS = {  # file, a line or a part of it, what it becomes
    "less padding after the data": ("jpeg_decode.c", "#define PADDING 4096 ", "#define PADDING 8 "),
    "no room for runs past the end": ("jpeg_decode.c", "zigzag[64 + 16] =", "zigzag[64] ="),
    "a restart interval more than announced": ("jpeg_decode.c", "interval + 1 < intervals", "interval < intervals"),
    "more codes than their length has": (
        "jpeg_header.c",
        "code + counts[length - 1] > (1 << length) - (counts[length - 1] > 0)",
        "code < 0",
    ),
    "a component with a fifth table": ("jpeg_header.c", "component->dc > 3 || component->ac > 3", "0"),
    "NaN taken for a position inside": (
        "affine.c",
        "!(at_x >= 0.0 && at_x < t->w * unit && at_y >= 0.0 && at_y < t->h * unit)",
        "at_x < 0.0 || at_x >= t->w * unit || at_y < 0.0 || at_y >= t->h * unit",
    ),
    "positions that do not fit into an integer": (
        "affine_2d.c",
        "source = source < highest ? source : highest;",
        "(void)highest;",
    ),
    "a shift by more bits than there are": ("augment.c", "bits = bits < 0 ? 0 : bits > 8 ? 8 : bits;", ""),
    "a crop that ends outside": ("crop_resize.c", "params->width <= image_width - params->left", "1"),
    "a forgotten free": (
        "crop_resize.c",
        "    free(columns);\n    free(intermediate);\n    return OK;",
        "    return OK;",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line", "fault"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(file: str, line: str, fault: str, tmp_path: Path, jpegs: list[Path]):
    sources = Path(shutil.copytree(SOURCES, tmp_path / "sources"))
    text = (sources / file).read_text()
    assert text.count(line) == 1
    (sources / file).write_text(text.replace(line, fault))
    (tmp_path / "programs").mkdir()
    programs = compile_programs(sources, tmp_path / "programs")
    found = [run(programs / "fuzz_jpeg", 60_000, 1, *jpegs), run(programs / "fuzz_pixels", 40_000, 1)]
    assert any(done.returncode != 0 and ("ERROR" in done.stderr or "runtime error" in done.stderr) for done in found)
