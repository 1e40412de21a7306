"""Compiles the C files of this folder into one shared library, once for each user and kind of machine.

The library lies in the user's cache folder under a name that says what it was made of: the sources, the compiler and
its flags, and the processor it was compiled for. Whatever of these changes, it is compiled anew.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
import uuid
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# No contraction: a fused multiply-add rounds once where Pillow's and torch's own code rounds twice.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-fPIC", "-shared")
LIBRARIES = ("-lm",)
TIMEOUT_SECONDS = 300
HOW_TO_INSTALL = "install a C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)"

class CannotBuild(Exception):
    """There is no native library here; the message says why."""


def built() -> Path:
    """The library for this machine, compiled if it is not there yet (some seconds, once).

    Raises:
        CannotBuild: no compiler, it fails, or the library cannot be written anywhere.
    """
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = hashlib.blake2b(digest_size=16)
    for part in (*FLAGS, *LIBRARIES, compiler, _run([compiler, "--version"]), _processor()):
        key.update(part.encode() + b"\0")
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    library = _cache() / f"native-{key.hexdigest()}.so"
    if not library.is_file():
        _compile(compiler, [str(source) for source in sources if source.suffix == ".c"], library)
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swin"


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise CannotBuild("there is no C compiler (cc, gcc or clang)")


def _processor() -> str:
    """Model and abilities of the processor, which -march=native compiles for; a home folder may serve many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    first = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(kinds)}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(first.values())])


def _compile(compiler: str, sources: list[str], library: Path) -> None:
    """Writes aside and renames, so that processes that start at the same time each find a whole library."""
    started = time.perf_counter()
    aside = library.with_name(f"{library.name}.{uuid.uuid4().hex}.tmp")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _run([compiler, *FLAGS, "-o", str(aside), *sources, *LIBRARIES])
        os.replace(aside, library)
    except OSError as error:
        raise CannotBuild(f"{library} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    log.info("compiled the native library of the data path in %.1f s: %s", time.perf_counter() - started, library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise CannotBuild(f"{command[0]} fails: {errors[0] if errors else f'exit code {done.returncode}'}")
    return done.stdout
