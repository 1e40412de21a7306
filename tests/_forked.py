"""Runs calls in forked children of this process, and reports their output, exit code and started programs.

The parent has imported everything already, so a child costs milliseconds. Crashes, hangs and foreign code affect the
child alone.
"""

import faulthandler
import functools
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import data.native.library
import models.ops.native_attention
from utils.compile_native import CannotBuild

# Audit events of Python for started programs, connections and loaded foreign code.
_SUSPICIOUS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "webbrowser.open",
)  # fmt: skip
_EXPECTED_PROGRAMS = ("git", "uname", "lscpu")  # started by utils/tracking/run_dir.py
_EXECUTED = "\x00executed: "


@dataclass(frozen=True)
class Outcome:
    """Result of a child.

    Attributes:
        code: exit code; negative for the signal that ended it; None if it hung.
        output: stdout and stderr together.
        executed: programs started, connections made and the like.
    """

    code: int | None
    output: str
    seconds: float
    executed: tuple[str, ...]


@functools.cache
def load_native_parts() -> None:
    """Loads the project's native libraries in the parent, if they can be built, so that no child has to."""
    for load in (data.native.library.library, models.ops.native_attention.LIBRARY.load):
        try:
            load()
        except CannotBuild:
            continue  # the children use the reference code


def forked(call: Callable[[], int | None], timeout: float = 60.0, memory: int = 0) -> Outcome:
    """Runs `call` in a child, and kills it after `timeout` seconds.

    Args:
        call: returns the exit code, or None for 0. An exception is printed, and the code is 1.
        memory: bytes of address space that the child may add to what it starts with; 0 for no limit.
    """
    load_native_parts()
    read_fd, write_fd = os.pipe()  # not a file: some children run with file limits or full disks
    os.set_blocking(read_fd, False)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_child(call, write_fd, timeout, memory)
    os.close(write_fd)
    output = bytearray()
    code = _wait(child, read_fd, output, started + timeout)
    seconds = time.monotonic() - started
    os.close(read_fd)
    lines = output.decode(errors="replace").split("\n")
    executed = tuple(line.split(_EXECUTED)[1] for line in lines if _EXECUTED in line)
    return Outcome(code, "\n".join(line for line in lines if _EXECUTED not in line), seconds, executed)


def _wait(child: int, read_fd: int, output: bytearray, end: float) -> int | None:
    """Collects the output of the child until it ends and returns its exit code; kills it at `end` and returns None."""
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        select.select([read_fd], [], [], 0 if pid else 0.005)
        _drain(read_fd, output)
        if pid:
            return os.waitstatus_to_exitcode(status)
    for target in (-child, child):  # with all processes that it started
        try:
            os.kill(target, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(child, 0)
    _drain(read_fd, output)
    return None


def _drain(read_fd: int, output: bytearray) -> None:
    try:
        while chunk := os.read(read_fd, 1 << 16):
            output += chunk
    except BlockingIOError:
        return


def _run_child(call: Callable[[], int | None], output: int, timeout: float, memory: int) -> None:
    """Runs `call` and leaves by os._exit, so that no cleanup of the parent runs twice. Never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.dump_traceback_later(0.9 * timeout, file=2)  # shows where a child hangs
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False, buffering=1)
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False, buffering=1)
        if memory:
            taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.RLIM_INFINITY))
        sys.addaudithook(_audit)
        code = call() or 0
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        sys.stdout.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def _audit(event: str, arguments: tuple) -> None:
    if event not in _SUSPICIOUS:
        return
    if event == "socket.connect" and isinstance(arguments[1], str):
        return  # a local socket, as loader workers use
    if event == "subprocess.Popen" and os.path.basename(str(arguments[0])) in _EXPECTED_PROGRAMS:
        return
    if event in ("os.posix_spawn", "os.exec") and os.path.basename(os.fsdecode(arguments[0])) in _EXPECTED_PROGRAMS:
        return
    os.write(2, f"\n{_EXECUTED}{event} {arguments!r}".replace("\n", " ").join("\n\n").encode(errors="replace"))
