"""Compiles the stand-in CUDA runtime once per user, and says with which environment variables a program gets it."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from utils.files import replace_atomically
from utils.paths import REPO_ROOT, user_cache_dir

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
RUNTIME, DRIVER = "libfake_cuda.so", "libcuda.so.1"
FLAGS = ("-std=gnu17", "-O1", "-w", "-fPIC", "-shared")  # -w: most arguments are not used, by intent


class CannotBuild(Exception):
    """The libraries cannot be compiled on this machine; the message says why."""


def build() -> Path:
    """Returns the folder of the compiled libraries. A second or two where the cache does not have them.

    Raises:
        CannotBuild: no Linux, no compiler, no headers of CUDA, or the compiler fails.
    """
    if not sys.platform.startswith("linux"):
        raise CannotBuild("it needs Linux, for LD_PRELOAD")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotBuild("there is no C compiler (gcc)")
    includes = [f"-I{folder}" for folder in _header_folders()]
    digest = hashlib.blake2b("\0".join([compiler, *FLAGS, *includes]).encode(), digest_size=16)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = user_cache_dir() / f"fake_cuda-{digest.hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    driver = sorted(SOURCES.glob("driver*.c"))
    runtime = [source for source in sorted(SOURCES.glob("*.c")) if source not in driver]
    for name, sources in ((RUNTIME, runtime), (DRIVER, driver)):
        if not (folder / name).is_file():
            with replace_atomically(folder / name) as temporary:  # several tests may compile at the same time
                _run([compiler, *FLAGS, *includes, *map(str, sources), "-o", str(temporary), "-lpthread", "-ldl"])
    if not (folder / "libcuda.so").exists():  # the name by which Triton links it
        shutil.copyfile(folder / DRIVER, folder / "libcuda.so")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Returns the variables that a program needs, added to the present ones, to find the stand-in in `folder`."""
    own = {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": f"{HERE / 'startup'}{os.pathsep}{REPO_ROOT}",
    }
    given = {name: f"{value}{os.pathsep}{os.environ[name]}" for name, value in own.items() if os.environ.get(name)}
    # What was compiled against the stand-in stays apart from what is compiled for a real GPU.
    caches = {name: str(folder / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    caches = {name: os.environ.get(name, path) for name, path in caches.items()}
    return {**os.environ, **own, **given, **caches, "TRITON_LIBCUDA_PATH": str(folder), "FAKE_CUDA": str(folder)}


def _header_folders() -> Iterable[Path]:
    """The folders with cuda.h and cuda_runtime_api.h of the wheels that torch requires, and crt/ of Triton's."""
    nvidia, triton = importlib.util.find_spec("nvidia"), importlib.util.find_spec("triton")
    if nvidia is None or triton is None or triton.origin is None:
        raise CannotBuild("this PyTorch came without CUDA's wheels (nvidia, triton), and so without its headers")
    roots = [Path(root) for root in nvidia.submodule_search_locations or ()]
    folders = [root / name / "include" for root in roots for name in ("cu13", "cu12", "cuda_runtime")]
    folders = [folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()]
    crt = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if not folders or not (crt / "crt").is_dir():
        raise CannotBuild(f"cuda_runtime_api.h is not in {', '.join(map(str, roots))}, or crt/ not in {crt}")
    return [folders[0], crt]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise CannotBuild(f"{command[0]} fails: {done.stderr.strip()[:500]}")
