"""Harms real runs in every way that the machine, the network and the user can, and counts what becomes of them:

    python -m tests.faults kill --count 200 --seed 1
    python -m tests.faults kill elastic preempt hang nonfinite lock memory corrupt disk torchrun hosts

Prints for each harness the counts by kind, the seed, the minutes and each failure; ends with 1 if there was one.
Without --count each does as many as the table in docs/RESUME.md says. Runs on the CPU, a thread for each process.
"""

import os

# Before torch is imported: a process with threads of its own cannot be forked safely.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402

# How many of what makes the figure in docs/RESUME.md, and in the short form of `make test`.
COUNTS = {
    "kill": (200, 3), "elastic": (10, 0), "corrupt": (500, 12), "disk": (50, 2), "preempt": (100, 2), "hang": (20, 1),
    "nonfinite": (20, 2), "lock": (100, 1), "memory": (10, 2), "torchrun": (6, 0), "hosts": (3, 0),
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("harness", nargs="+", choices=list(COUNTS))
    parser.add_argument("--count", type=int, help="trials of each harness")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="a few trials of each: what `make test` does")
    args = parser.parse_args(argv)
    failed = False
    for name in args.harness:
        count = COUNTS[name][args.short] if args.count is None else args.count
        tally = importlib.import_module(f"tests.faults.{name}").run(count, args.seed)
        print("\n".join(tally.lines()), flush=True)
        failed |= bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
