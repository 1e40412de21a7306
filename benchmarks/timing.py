"""Times candidates against each other. All benchmarks use these functions; `engine/throughput.py` times a single step.

Candidates take turns: each has one turn per round, and every second round runs in reverse order, so that a machine
whose speed drifts affects all of them alike. Results are medians over the rounds.
"""

import logging
import re
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.throughput import calibrate, images_per_second
from utils.errors import UserError
from utils.precision import choose_amp_dtype

log = logging.getLogger(__name__)

Step = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def interleave(turns: Mapping[Key, Callable[[], Result]], rounds: int) -> dict[Key, list[Result]]:
    """Calls every function in `turns` once per round; returns their results, in the order of the rounds."""
    results: dict[Key, list[Result]] = {key: [] for key in turns}
    for number in range(rounds):
        for key in list(turns)[:: -1 if number % 2 else 1]:
            results[key].append(turns[key]())
        log.info("round %d/%d", number + 1, rounds)
    return results


def compare_steps(
    steps: Mapping[Key, Step], images: int, device: torch.device, seconds: float, rounds: int
) -> dict[Key, list[float]]:
    """Images per second of each of `steps` in each round."""
    return interleave({key: calibrate(step, images, device, seconds) for key, step in steps.items()}, rounds)


def ratios(rates: Mapping[str, list[float]], name: str, baseline: str) -> list[float]:
    """Speed of `name` relative to `baseline`, in each round."""
    return [a / b for a, b in zip(rates[name], rates[baseline], strict=True)]


def median_ratio(rates: Mapping[str, list[float]], name: str, baseline: str) -> float:
    return statistics.median(ratios(rates, name, baseline))


def choose_device(name: str) -> torch.device:
    """The device for "cpu", "cuda", or "auto": the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; omit --device to measure the CPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_slug(device: torch.device) -> str:
    """The device's name for use in a file name: "cpu", "nvidia-h200"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class InferenceTimer:
    """Measures inference of models that are too many to hold in memory: each is built again for each of its turns."""

    device: torch.device
    batch_size: int
    seconds: float
    rounds: int
    amp_dtype: str

    def step(self, model: nn.Module, *shape: int) -> Step:
        """A forward pass of `model`, in evaluation mode, over a batch of random inputs of `shape`."""
        model = model.to(self.device).eval()
        batch = torch.randn(self.batch_size, *shape, device=self.device)
        dtype = choose_amp_dtype(True, self.amp_dtype, self.device)

        def run() -> Tensor:
            with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                return model(batch)

        return run

    def compare(self, builders: Mapping[str, Callable[[], Step]]) -> dict[str, float | None]:
        """Images per second of the step that each function builds, the median; None if it does not fit in memory."""
        out_of_memory: set[str] = set()

        @torch.inference_mode()
        def turn(name: str) -> float | None:
            if name in out_of_memory:
                return None
            try:
                rate = images_per_second(builders[name](), self.batch_size, self.device, self.seconds, runs=1)
            except torch.OutOfMemoryError as error:
                out_of_memory.add(name)
                log.warning("%s does not fit in memory: %s", name, str(error).splitlines()[0])
                return None
            finally:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            log.info("%-45s %10.2f images/s", name, rate)
            return rate

        rates = interleave({name: partial(turn, name) for name in builders}, self.rounds)
        measured = {name: [rate for rate in values if rate is not None] for name, values in rates.items()}
        return {
            name: statistics.median(values) if len(values) == len(rates[name]) else None
            for name, values in measured.items()
        }

    @property
    def note(self) -> str:
        return (
            f"Measured: inference on {device_slug(self.device)}, {self.amp_dtype}, {self.batch_size} images at a time, "
            f"median of {self.rounds} rounds in which each has a turn of {self.seconds:g} s."
        )
