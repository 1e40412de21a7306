"""The tests for a GPU, on the stand-in CUDA runtime: they run up to the comparison of values, which then fails.

So a mistake that would stop one before it, such as a generator of the CPU that is asked for numbers on the GPU, is found
without a GPU.
"""

import re
import sys

import pytest

from tests.fake_cuda.run import fake_environment
from utils.paths import REPO_ROOT
