"""Harnesses that inject faults into real runs: `python -m tests.faults --help`."""
