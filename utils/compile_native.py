"""Compiles a few C or C++ files into a shared library, once for each user and kind of machine, and loads it.

The library lies in the user's cache folder (XDG_CACHE_HOME, or ~/.cache) under a name that says what it was made of:
the sources, the compiler, its flags, and the processor it was compiled for. Whatever of these changes, it is compiled
anew.
Native parts are optional everywhere: who asks for one says what happens without it.
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
import uuid
from dataclasses import dataclass
from pathlib import Path

from utils.paths import user_cache_dir

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300
LANGUAGES = {"c": ("CC", "cc", "gcc", "clang"), "c++": ("CXX", "c++", "g++", "clang++")}


class CannotBuild(Exception):
    """There is no such library here; the message says why."""


@dataclass(frozen=True)
class NativeLibrary:
    """What a library is made of.

    Attributes:
        purpose: what the log says that it is for.
        folder: all its sources and headers, and nothing else of that language.
        language: "c" or "c++".
        flags, libraries: for the compiler, beside those that make a shared library.
    """

    purpose: str
    folder: Path
    language: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    def load(self) -> ctypes.CDLL:
        """The library, compiled if it is not there yet (some seconds, once), and loaded once in a process.

        Raises:
            CannotBuild: no compiler, it fails, or the library cannot be written or loaded; the same at every call.
        """
        loaded = _load(self)
        if isinstance(loaded, CannotBuild):
            raise loaded
        return loaded

    def _built(self) -> Path:
        variable, *names = LANGUAGES[self.language]
        asked = os.environ.get(variable)
        compiler = next(filter(None, map(shutil.which, [asked, *names] if asked else names)), None)
        if compiler is None:
            raise CannotBuild(f"there is no compiler for {self.language.upper()} ({', '.join(names)}, or {variable})")
        command = [compiler, "-march=native", *self.flags, "-fPIC", "-shared"]
        sources = sorted(self.folder.glob("*.[ch]*"))
        key = hashlib.blake2b(digest_size=16)
        for part in (*command, *self.libraries, _run([compiler, "--version"]), _processor()):
            key.update(part.encode() + b"\0")
        for source in sources:
            key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        cache = user_cache_dir()
        library = cache / f"{self.folder.parent.name}-{key.hexdigest()}.so"
        if not library.is_file():
            units = [str(source) for source in sources if source.suffix in (".c", ".cpp")]
            self._compile([*command, *units, *self.libraries], library)
        return library

    def _compile(self, command: list[str], library: Path) -> None:
        """Writes aside and renames, so that processes that start at the same time each find a whole library."""
        started = time.perf_counter()
        aside = library.with_name(f"{library.name}.{uuid.uuid4().hex}.tmp")
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            _run([*command, "-o", str(aside)])
            os.replace(aside, library)
        except OSError as error:
            raise CannotBuild(f"{library} cannot be written: {error}") from error
        finally:
            if aside.exists():
                aside.unlink()
        log.info("compiled %s in %.1f s: %s", self.purpose, time.perf_counter() - started, library)


@functools.cache
def _load(library: NativeLibrary) -> ctypes.CDLL | CannotBuild:
    try:
        return ctypes.CDLL(str(library._built()))
    except CannotBuild as error:
        return error
    except OSError as error:
        return CannotBuild(f"the compiled library does not load: {error}")


def _processor() -> str:
    """Model and abilities of the processor, which -march=native compiles for; a home folder may serve many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    first = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(kinds)}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(first.values())])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()[-1:]
        raise CannotBuild(f"{command[0]} fails: {errors[0] if errors else f'exit code {done.returncode}'}")
    return done.stdout
