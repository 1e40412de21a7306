"""What main.py can be asked to do with a configuration: train, evaluate, measure throughput. Each builds what it needs
in the order in which things happen, and knows nothing of the command line.
"""

from modes.evaluation import evaluate
from modes.speed import throughput
from modes.training import train

__all__ = ["evaluate", "throughput", "train"]
