"""Faults, each with a harness that anyone can run: `python -m tests.faults --help`."""
