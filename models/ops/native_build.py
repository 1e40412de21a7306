"""Compiles `native.cpp` with the system's C++ compiler for the CPU at hand, once, and loads it.

The library is kept in the user's cache (XDG_CACHE_HOME, or ~/.cache) under a name that holds a digest of the source,
the flags, the compiler and the kind of CPU: another of any makes another library.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from utils.files import write_atomically

SOURCE = Path(__file__).with_name("native.cpp")
HEADER = Path(__file__).with_name("native_words.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fopenmp", "-shared", "-fPIC")  # fmt: skip
PATIENCE = 300  # seconds for the compiler


class NotBuilt(Exception):
    """Why there is no library, in words."""


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library; or None and why there is none."""
    try:
        return ctypes.CDLL(str(_built())), ""
    except (NotBuilt, OSError) as error:
        return None, str(error)


def _built() -> Path:
    """The file of the library, compiled now where the cache does not have it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler):
        raise NotBuilt("there is no C++ compiler: install g++, or name one by the variable CXX")
    source = SOURCE.read_bytes() + HEADER.read_bytes()
    facts = [compiler, _version(compiler), _cpu(), *FLAGS]
    digest = hashlib.blake2b(source + "\n".join(facts).encode(), digest_size=10).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swin"
    place = folder / f"native-{digest}.so"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "native.so"
            _run([compiler, *FLAGS, str(SOURCE), "-o", str(made)])
            contents = made.read_bytes()
        write_atomically(place, lambda file: file.write(contents))
    return place


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise NotBuilt(f"{command[0]} ended with code {done.returncode} and said: {said[0]}")
    return done.stdout


def _cpu() -> str:
    """What the machine can do, so far as the operating system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "model\t", "flags", "Features"))})
    )
