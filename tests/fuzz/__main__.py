"""Feeds bad input to main.py: `python -m tests.fuzz images|configs|trees|packs|checkpoints [--count N] [--seed S]`.

Prints the number of passed cases by kind, the seed, the minutes, and each failure. The exit code is 1 after a failure.
"""

import os

# Before torch is imported: a process with threads of its own cannot be forked safely.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402

# Cases for the figures in docs/reports/FAULTS.md, and for the short form in the tests.
COUNTS = {"images": (1000, 100), "configs": (300, 10), "trees": (100, 10), "packs": (300, 12), "checkpoints": (200, 12)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(COUNTS)}; all if none is named")
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each, as the tests do")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(COUNTS):
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(COUNTS)}")

    import engine.evaluation  # noqa: F401  imported here once, for all children
    import engine.throughput  # noqa: F401
    import engine.trainer  # noqa: F401
    import main  # noqa: F401

    failed = False
    for kind in args.kinds or COUNTS:
        report = importlib.import_module(f"tests.fuzz.{kind}").run(args.count or COUNTS[kind][args.short], args.seed)
        print("\n".join(report.lines()), flush=True)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
