"""utils/interrupt.py, in processes of their own: the first and the second SIGINT while the main thread waits."""

import signal
import subprocess
import sys

import pytest

from utils.paths import REPO_ROOT

WAIT = """
import os, signal, sys
from utils import interrupt
interrupt.install()
{setup}
print("ready", flush=True)
os.read(os.pipe()[0], 1)  # as a queue, a join or another rank: for ever
"""
DEFER = "interrupt.defer(lambda: print('asked', flush=True))"


def start(setup: str = "", **options) -> subprocess.Popen:
    program = subprocess.Popen(
        # Python 3.12 warns of a fork beside the thread that reads signals.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", WAIT.format(setup=setup)],
        cwd=REPO_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    assert program.stdout.readline() == "ready\n"
    return program


def end_of(program: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = program.communicate(timeout=20)
    return program.returncode, output, errors


def test_the_first_signal_ends_the_process_with_one_line():
    program = start()
    program.send_signal(signal.SIGINT)
    assert end_of(program) == (130, "", "interrupted\n")


def test_only_rank_0_says_so():
    program = start("os.environ['RANK'] = '1'")
    program.send_signal(signal.SIGINT)
    assert end_of(program) == (130, "", "")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_deferred_the_first_signal_asks_and_the_second_ends_the_process(second: signal.Signals):
    program = start(f"{DEFER}; signal.signal(signal.SIGTERM, lambda *args: None)")
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "asked\n"
    program.send_signal(second)
    assert end_of(program) == (130, "", "interrupted again: ended without waiting for a save\n")


def test_a_report_of_the_main_thread_is_not_repeated():
    program = start(f"{DEFER}; assert interrupt.claim_report(); interrupt.defer(None)")
    program.send_signal(signal.SIGINT)
    assert end_of(program) == (130, "", "")


def test_the_reason_is_logged():
    program = start("interrupt.log_with(lambda text: print('log:', text, flush=True))")
    program.send_signal(signal.SIGINT)
    assert end_of(program) == (130, "log: interrupted\n", "interrupted\n")


def test_an_ignored_signal_stays_ignored():
    """As in a process that a script has started in the background."""
    program = start("assert not interrupt.received()", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    program.send_signal(signal.SIGINT)
    program.terminate()
    assert end_of(program) == (-signal.SIGTERM, "", "")


def test_signals_of_a_forked_process_are_its_own():
    program = start(
        "child = os.fork()\n"
        "if child == 0: os.kill(os.getpid(), signal.SIGINT); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert not interrupt.received()"
    )
    program.terminate()
    assert end_of(program) == (-signal.SIGTERM, "", "")
