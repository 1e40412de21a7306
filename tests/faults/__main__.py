"""Injects faults of the machine, the network and the user into real runs, and counts the outcomes:

    python -m tests.faults kill --count 200 --seed 1
    python -m tests.faults kill elastic preempt hang nonfinite lock memory corrupt disk torchrun hosts interrupt

Prints for each harness the counts by kind, the seed, the minutes and each failure. The exit code is 1 after a failure.
Without --count each harness makes the number of trials in docs/reports/FAULTS.md. All runs are on the CPU.
"""

import os

# Before torch is imported: a process with threads of its own cannot be forked safely.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402

# Trials for the figures in docs/reports/FAULTS.md, and for the short form in the tests.
COUNTS = {
    "kill": (200, 3), "elastic": (10, 0), "corrupt": (500, 12), "disk": (50, 2), "preempt": (100, 2), "hang": (20, 1),
    "nonfinite": (20, 2), "lock": (100, 1), "memory": (10, 2), "torchrun": (6, 0), "hosts": (3, 0),
    "interrupt": (40, 2),
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("harness", nargs="+", choices=list(COUNTS))
    parser.add_argument("--count", type=int, help="trials of each harness")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="a few trials of each, as the tests do")
    args = parser.parse_args(argv)
    failed = False
    for name in args.harness:
        count = COUNTS[name][args.short] if args.count is None else args.count
        report = importlib.import_module(f"tests.faults.{name}").run(count, args.seed)
        print("\n".join(report.lines()), flush=True)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
