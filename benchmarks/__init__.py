"""Measured comparisons: `python -m benchmarks.tables` makes the paper's tables again, into `results/`."""
