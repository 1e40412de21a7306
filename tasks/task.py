"""The contract between a kind of training and the loop.

A task is the module that the loop and DDP see. It owns the model, turns a training batch into losses and evaluation
batches into metrics, and knows the names of both; `engine/` knows none of them. A new kind of training is a new file
here and an entry in `tasks/build.py`.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.trainable import TrainableModel

Batch = dict[str, Any]  # named tensors on the device; a training batch also has its stream `position`


class Evaluator(Protocol):
    """Accumulates the metrics of one pass over the evaluation data, without waiting for the device."""

    def add(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Adds one batch, of which `outputs` is what `Task.predict` returned."""

    def result(self) -> dict[str, float]:
        """Returns `images`, the number of images over all ranks, and each metric. A collective call."""


class Task(nn.Module, ABC):
    """One kind of training. A subclass sets the attributes and implements the methods; see `tasks/classification.py`.

    All computation on parameters goes through `self.model(...)`, which is what is compiled and sharded, and
    `self.model(images)` works alone, for counting its operations.

    Attributes:
        model: everything that is trained, saved and averaged. It offers the optimizer and FSDP what `TrainableModel`
            lists; a model around a backbone forwards them.
        metrics: the metrics that `evaluator` returns, each with whether a higher value is better. `loss` is one.
        main_metric: the metric that selects the best checkpoint unless TRAIN.BEST_METRIC names another.
        loss_terms: further entries of what `forward` returns, 0-dim tensors that are logged by name.
    """

    model: TrainableModel
    metrics: dict[str, bool]
    main_metric: str
    loss_terms: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `loss`, the mean over the batch to be minimised, and one entry for each of `loss_terms`."""

    @abstractmethod
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Returns what `Evaluator.add` needs to know of a batch; also measured as the inference step."""

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """Returns a new accumulator of this task's metrics."""

    @abstractmethod
    def describe(self, metrics: dict[str, float]) -> str:
        """Formats those of `metrics` that this task knows for a line in the log, with units."""

    @abstractmethod
    def batch_image(self, batch: Batch) -> Tensor:
        """Draws a training batch as the network sees it: one image (3, height, width), uint8."""

    @abstractmethod
    def example_batch(self, size: int, device: torch.device) -> Batch:
        """Returns a random training batch of `size` samples, with `position`, that `predict` accepts too.

        Through it every parameter gets a gradient, in evaluation mode as well. The global random generators are left
        alone.
        """
