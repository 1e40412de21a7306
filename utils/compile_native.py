"""Compiles a few C or C++ files into a shared library, once per user and kind of machine, and loads it.

The library is cached in the user's cache folder. Its file name is a digest of the sources, the compiler, the flags and
the processor, so that it is compiled anew when any of these changes. Native code is optional everywhere: callers catch
`CannotBuild` and use their Python path.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from utils.files import replace_atomically
from utils.paths import user_cache_dir

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300
# A variable, then commands in the order in which they are tried: the C code is faster compiled by clang, the C++ code
# by GCC (data/native/README.md, models/ops/README.md).
COMPILERS = {"c": ("CC", "clang", "cc", "gcc"), "c++": ("CXX", "c++", "g++", "clang++")}
THIS_PROCESSOR = ("-march=native",)
# An access beyond an array of known size, or a damaged stack, ends the process instead of giving wrong results. The
# cost was not measurable (data/native/README.md).
HARDENING = ("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong")
BOUNDS = {
    "gcc": ("-fsanitize=bounds-strict", "-fsanitize-undefined-trap-on-error"),
    "clang": ("-fsanitize=bounds", "-fsanitize-trap=bounds"),
}


class CannotBuild(Exception):
    """The library cannot be compiled or loaded on this machine; the message says why."""


@dataclass(frozen=True)
class NativeLibrary:
    """The inputs of a shared library.

    Attributes:
        purpose: what the library is for, as the log says it.
        folder: contains all sources and headers, and nothing else of that language.
        language: "c" or "c++".
        flags, libraries: further arguments of the compiler.
    """

    purpose: str
    folder: Path
    language: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    def load(self) -> ctypes.CDLL:
        """Compiles the library unless it is cached (some seconds, once), and loads it once per process.

        Raises:
            CannotBuild: no compiler, it fails, or the library cannot be written or loaded; the same at every call.
        """
        loaded = _load(self)
        if isinstance(loaded, CannotBuild):
            raise CannotBuild(str(loaded))  # not the kept one, which would keep its callers' frames and all they hold
        return loaded

    def _cached_path(self) -> Path:
        """The path of the compiled library."""
        cache = user_cache_dir()
        if cache is None:
            raise CannotBuild(
                "the user has no home folder to cache compiled code in; set XDG_CACHE_HOME to a writable folder"
            )
        compilers = _compilers(self.language)
        version = _run([compilers[0], "--version"])
        flags = *THIS_PROCESSOR, *HARDENING, *BOUNDS["gcc"], *BOUNDS["clang"], *self.flags
        sources = sorted(self.folder.glob("*.[ch]*"))
        digest = hashlib.blake2b(digest_size=16)
        for part in (compilers[0], *flags, *self.libraries, version, _processor()):
            digest.update(part.encode() + b"\0")
        for source in sources:
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        path = cache / f"{self.folder.parent.name}-{digest.hexdigest()}.so"
        if not path.is_file():
            units = [str(source) for source in sources if source.suffix in (".c", ".cpp")]
            commands = [command for compiler in compilers for command in self._commands(compiler)]
            self._compile([[*command, *units, *self.libraries] for command in commands], path)
        return path

    def _commands(self, compiler: str) -> list[list[str]]:
        """The command to compile with, then those for a compiler that refuses some of its flags."""
        bounds = BOUNDS["clang" if "clang" in _run([compiler, "--version"]) else "gcc"]
        choices = [(*THIS_PROCESSOR, *HARDENING, *bounds), (*HARDENING, *bounds), ()]
        return [[compiler, *choice, *self.flags, "-fPIC", "-shared"] for choice in choices]

    def _compile(self, commands: list[list[str]], path: Path) -> None:
        """Runs `commands` until one succeeds. Raises CannotBuild with the reason of the first if none does."""
        start = time.perf_counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as temporary:  # several processes may compile at the same time
                _run_first([[*command, "-o", str(temporary)] for command in commands])
        except OSError as error:
            raise CannotBuild(f"{path} cannot be written: {error}") from error
        log.info("compiled %s in %.1f s: %s", self.purpose, time.perf_counter() - start, path)


@functools.cache
def _load(library: NativeLibrary) -> ctypes.CDLL | CannotBuild:
    try:
        return ctypes.CDLL(str(library._cached_path()))
    except CannotBuild as error:
        return CannotBuild(str(error))  # without the traceback
    except OSError as error:
        return CannotBuild(f"the compiled library does not load: {error}")


def _compilers(language: str) -> list[str]:
    """The paths of the compilers to try in turn; of the one in the environment variable alone, if that is found."""
    variable, *commands = COMPILERS[language]
    given = shutil.which(os.environ.get(variable, ""))
    if given:
        return [given]
    found: list[str] = []
    for path in filter(None, map(shutil.which, commands)):
        if not any(os.path.samefile(path, other) for other in found):
            found.append(path)
    if not found:
        raise CannotBuild(f"there is no compiler for {language.upper()} ({', '.join(commands)}, or {variable})")
    return found


def _processor() -> str:
    """Model and features of the processor, which -march=native compiles for; several machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    first = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(fields)}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(first.values())])


def _run_first(commands: list[list[str]]) -> None:
    """Runs `commands` in order until one succeeds. Raises the first one's CannotBuild if none does."""
    reasons = []
    for command in commands:
        try:
            _run(command)
            return
        except CannotBuild as error:
            reasons.append(str(error))
    raise CannotBuild(reasons[0])


def _run(command: list[str]) -> str:
    """Runs `command` and returns its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()[-1:]
        raise CannotBuild(f"{command[0]} fails: {errors[0] if errors else f'exit code {done.returncode}'}")
    return done.stdout
