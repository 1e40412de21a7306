"""How fast several things are, on the same machine in one run."""

import logging
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import train_step
from utils.errors import UserError
from utils.precision import choose_amp_dtype

log = logging.getLogger(__name__)

Step = Callable[[], object]


@dataclass(frozen=True)
class Stopwatch:
    """How inference is measured: where, how many images at a time, for how long, how often, in which number format."""

    device: torch.device
    batch_size: int
    seconds: float
    rounds: int
    amp_dtype: str

    @classmethod
    def on(cls, device: str, *args) -> "Stopwatch":
        """On "cpu", "cuda", or "auto": the GPU where there is one."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here; leave --device out to measure the CPU")
        return cls(torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"), *args)

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
        """Images per second of each step that the functions build; see `interleaved`."""
        return interleaved(builders, self.batch_size, self.device, self.seconds, self.rounds)

    @property
    def notes(self) -> list[str]:
        return [
            f"Measured: inference on {self.slug}, {self.amp_dtype}, {self.batch_size} images at a time, median of "
            f"{self.rounds} rounds in which each has a turn of {self.seconds:g} s.",
        ]

    @property
    def slug(self) -> str:
        """The device, for the name of a file: "cpu", "nvidia-h200"."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def interleaved(
    builders: Mapping[str, Callable[[], Step]], images: int, device: torch.device, seconds: float, rounds: int
) -> dict[str, float | None]:
    """Images per second of each step, the median over `rounds`; None where one does not fit into the memory.

    In each round everything has its turn of `seconds`, so that a machine that slows down or speeds up meanwhile does
    so to all alike. Only one thing is in memory at a time: what a builder returns is built for its turn.

    Args:
        builders: name → function that builds the step, which handles `images` of them.
    """
    rates: dict[str, list[float]] = {name: [] for name in builders}
    lost: set[str] = set()
    for number in range(1, rounds + 1):
        for name, build in builders.items():
            if name in lost:
                continue
            try:
                with torch.inference_mode():
                    rates[name].append(train_step.measure(build(), images, device, seconds, runs=1))
                log.info("round %d/%d  %-45s %10.2f images/s", number, rounds, name, rates[name][-1])
            except torch.OutOfMemoryError as error:
                lost.add(name)
                log.warning("%s does not fit into the memory: %s", name, str(error).splitlines()[0])
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: None if name in lost else statistics.median(values) for name, values in rates.items()}
