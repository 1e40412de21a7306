"""The optimizer step: gradient accumulation, clipping, skipping non-finite steps, and metrics that stay on the device.

From the outside in: `train_steps` → `train_step` → `_forward_backward`. This file knows tasks, batches and a counter of
images; no flags, no files, no Swin.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Protocol, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from optimizer import Bf16Params
from tasks.task import Batch, Task
from utils.distributed.buffers import average_buffers
from utils.distributed.fsdp import gather_full_state, to_full_tensor
from utils.errors import TrainingDiverged
from utils.metrics import Sums
from utils.seed import derive, seed_device

STEP_SUMS = ("steps", "finite", "loss", "grad_norm")


class FusedOptimizer(Protocol):
    """What fused optimizers read besides gradients: 1 lets them skip the step."""

    found_inf: Tensor


@dataclass
class TrainState:
    """The state of a run apart from its tensors: the number of images seen, and what the log needs to remember."""

    images_seen: int = 0  # over all ranks and epochs; data order, augmentation and learning rate follow from it
    best_metric: float | None = None  # best value so far of the metric that selects the best checkpoint
    best_loss: float | None = None  # validation loss of that evaluation, which breaks ties
    better_weights: str | None = None  # at the last evaluation: "model", or "ema" if the average was better
    skipped: int = 0  # steps skipped because loss or gradient was not finite
    skipped_in_a_row: int = 0
    epoch_sums: dict[str, float] = field(default_factory=dict)  # of the current epoch, see `StepMetrics`

    def end_epoch(self) -> dict[str, float]:
        """Returns the mean training losses of the epoch by name, and begins the next one."""
        finite = max(1.0, self.epoch_sums.get("finite", 0.0))
        not_losses = ("steps", "finite", "grad_norm")
        means = {name: total / finite for name, total in self.epoch_sums.items() if name not in not_losses}
        self.epoch_sums = {}
        return means

    def update_best(self, results: dict[str, tuple[float, float]], higher_is_better: bool) -> bool:
        """Remembers the better weights of an evaluation, and its result if it is the best so far.

        Args:
            results: metric and loss by the kind of the weights, "model" or "ema". The loss breaks ties.

        Returns:
            Whether it is the best so far.
        """
        sign = 1 if higher_is_better else -1
        scores = {kind: (sign * value, -loss) for kind, (value, loss) in results.items()}
        self.better_weights = max(scores, key=lambda kind: scores[kind])
        if self.best_metric is not None and self.best_loss is not None:
            if scores[self.better_weights] <= (sign * self.best_metric, -self.best_loss):
                return False
        self.best_metric, self.best_loss = results[self.better_weights]
        return True

    def best_as(self, name: str) -> dict[str, float]:
        """Returns the best metric by this name; nothing before the first evaluation."""
        return {} if self.best_metric is None else {name: self.best_metric}

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class TrainComponents:
    """The task, what trains it, and how a step is made. Complete when built: nothing is set afterwards."""

    task: Task | DistributedDataParallel
    optimizer: torch.optim.Optimizer  # a fused one, which skips a step if a tensor says so
    scaler: torch.amp.GradScaler  # disabled unless in float16
    device: torch.device
    amp_dtype: torch.dtype | None
    grad_accum_steps: int = 1
    clip_grad: float = 0.0  # 0: no clipping
    max_bad_steps: int = 10
    seed: int = 0
    ema: ModelEmaV3 | None = None
    bf16: Bf16Params | None = None  # where the model computes with bfloat16 copies of its matrices

    @property
    def module_without_ddp(self) -> Task:
        return self.task.module if isinstance(self.task, DistributedDataParallel) else self.task

    def state_dict(self) -> dict:
        """Returns model, optimizer, loss scale and average; under FSDP to rank 0. A collective call."""
        self.average_buffers()
        contents = {
            "model": self.module_without_ddp.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.model.state_dict(),
        }
        return gather_full_state(contents)

    def average_buffers(self) -> None:
        """Gives all ranks the same running statistics, before they are evaluated or saved. A collective call."""
        average_buffers(self.module_without_ddp.model)
        if self.ema is not None:
            average_buffers(self.ema.module.model)

    def load_state_dict(self, saved: dict) -> None:
        """Loads what `state_dict` returned. Weight decay and the like stay as configured for this run.

        Raises:
            KeyError, RuntimeError, ValueError: `saved` belongs to another model, optimizer or grouping.
        """
        self.module_without_ddp.model.load_state_dict(saved["model"])
        current = self.optimizer.state_dict()["param_groups"]
        if saved["optimizer_name"] != type(self.optimizer).__name__:
            raise ValueError(f"its optimizer is {saved['optimizer_name']}, not {type(self.optimizer).__name__}")
        saved_groups = saved["optimizer"]["param_groups"]
        if [group["names"] for group in current] != [group["names"] for group in saved_groups]:
            raise ValueError("the optimizer's parameter groups differ")
        # The learning rate of the last step is kept, for a save before the next step sets it.
        rates = [group["lr"] for group in saved_groups]
        groups = [{**group, "lr": rate} for group, rate in zip(current, rates, strict=True)]
        self.optimizer.load_state_dict({"param_groups": groups, "state": saved["optimizer"]["state"]})
        for parameter, moments in self.optimizer.state.items():
            if any(value.ndim and value.shape != parameter.shape for value in moments.values()):
                raise ValueError("the optimizer's moments have other shapes than the weights")
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.module.model.load_state_dict(saved["ema"] or saved["model"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)


class StepMetrics:
    """Accumulates metrics on the device; `sync_and_reset()` copies them to the host.

    The sums are `steps`, `finite` (how many of these were), and over the finite ones `loss`, each of the task's loss
    terms, and `grad_norm`.
    """

    def __init__(self, components: TrainComponents, state: TrainState):
        self._state = state
        self._sums = Sums((*STEP_SUMS, *components.module_without_ddp.loss_terms), components.device)
        self._skipped = torch.tensor([state.skipped, state.skipped_in_a_row, 0], device=components.device)
        self._max_bad_steps = components.max_bad_steps
        # Reading a counter waits for the GPU, so it is read only as often as is needed to stop in time.
        self._check_every = 1 if components.device.type == "cpu" else self._max_bad_steps

    def update(self, step: int, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Adds step number `step`. `grad_norm` is the same on all ranks, and so is whether it is finite."""
        finite = grad_norm.isfinite()
        values = {**losses, "grad_norm": grad_norm}
        values = {name: torch.where(finite, value, torch.zeros_like(value)) for name, value in values.items()}
        self._sums.add({"steps": torch.ones_like(grad_norm), "finite": finite, **values})
        total, in_a_row, longest = self._skipped.unbind()
        bad = (~finite).to(total.dtype)
        in_a_row = (in_a_row + 1) * bad
        self._skipped = torch.stack([total + bad, in_a_row, torch.maximum(longest, in_a_row)])
        if (step + 1) % self._check_every == 0:
            self._check_skipped()

    def sync_and_reset(self) -> dict[str, float]:
        """Brings the state up to date and returns the sums since the last call. A collective call.

        Raises:
            TrainingDiverged: too many steps in a row were skipped.
        """
        self._check_skipped()
        sums = self._sums.take()
        self._state.epoch_sums = {name: self._state.epoch_sums.get(name, 0.0) + value for name, value in sums.items()}
        return sums

    def _check_skipped(self) -> None:
        self._state.skipped, self._state.skipped_in_a_row, longest = self._skipped.tolist()
        if longest >= self._max_bad_steps:
            raise TrainingDiverged(
                f"loss or gradients were not finite in {longest} steps in a row (TRAIN.MAX_BAD_STEPS "
                f"{self._max_bad_steps}), up to {self._state.images_seen:,} images seen; none of these steps was "
                "applied. Ways out: a lower TRAIN.BASE_LR, AMP_DTYPE bfloat16 or float32, TRAIN.CLIP_GRAD above 0"
            )


def train_steps(
    components: TrainComponents,
    batches: Iterable[Batch],
    state: TrainState,
    learning_rate: Callable[[int], float],
    global_batch_size: int,
) -> Iterator[StepMetrics]:
    """Trains on `batches` to their end, and yields after each step.

    Args:
        batches: micro-batches on the device, from `state.images_seen` on; each has its stream `position`.
        state: `images_seen` grows by `global_batch_size` at each step; the rest is updated when metrics are synced.
        learning_rate: as a function of the number of a step, counted from 0.
        global_batch_size: images per step, over all ranks.

    Yields:
        The metrics so far; sync them before reading or saving the state.

    Raises:
        TrainingDiverged: `components.max_bad_steps` steps in a row were not finite.
    """
    metrics = StepMetrics(components, state)
    components.task.train()  # once, because it visits every module; `evaluate` restores the mode
    batches = iter(batches)
    for first in batches:
        step = state.images_seen // global_batch_size
        for group in components.optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["lr_scale"]
        losses, grad_norm = train_step(components, first, batches)
        state.images_seen += global_batch_size
        metrics.update(step, losses, grad_norm)
        yield metrics


def train_step(components: TrainComponents, first: Batch, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """Makes one optimizer step over `grad_accum_steps` micro-batches, of which `first` is the first.

    Returns:
        This rank's mean losses by name, and the norm of the gradient over all ranks, before clipping.
    """
    micro_losses = []
    for micro_step in range(components.grad_accum_steps):
        batch = first if micro_step == 0 else next(batches)
        seed_device(derive(components.seed, "model", batch["position"]), components.device)
        micro_losses.append(_forward_backward(components, batch, micro_step == components.grad_accum_steps - 1))
        if components.bf16 is not None:
            components.bf16.accumulate_master_grads()

    components.scaler.unscale_(components.optimizer)
    parameters = [p for group in components.optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = to_full_tensor(get_total_norm([p.grad for p in parameters]))
    if components.clip_grad > 0:
        clip_grads_with_norm_(parameters, components.clip_grad, grad_norm)
    if not components.scaler.is_enabled():
        # The cast: PyTorch declares the attribute nowhere.
        cast(FusedOptimizer, components.optimizer).found_inf = (~grad_norm.isfinite()).float()
    components.scaler.step(components.optimizer)
    components.scaler.update()
    if components.bf16 is not None:
        components.bf16.copy_masters_to_model()
    components.optimizer.zero_grad(set_to_none=True)
    if components.ema is not None:
        components.ema.update(components.module_without_ddp)
    return {name: torch.stack([each[name] for each in micro_losses]).mean() for name in micro_losses[0]}, grad_norm


def _forward_backward(components: TrainComponents, batch: Batch, is_last: bool) -> dict[str, Tensor]:
    """Adds the gradients of one micro-batch; the ranks exchange them after the last one. Returns its losses."""
    task = components.task
    # bfloat16 gradients are exchanged after each micro-batch, since they are accumulated in float32 masters.
    defer_grad_sync = not is_last and components.bf16 is None
    with task.no_sync() if defer_grad_sync and isinstance(task, DistributedDataParallel) else nullcontext():
        with components.autocast():
            output = task(batch)
        loss = output["loss"]
        # NaN gradients spread through the all-reduce, so all ranks skip the same step without extra communication.
        nonfinite_to_nan = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        components.scaler.scale(loss * (nonfinite_to_nan / components.grad_accum_steps)).backward()
    return {name: output[name].detach() for name in ("loss", *components.module_without_ddp.loss_terms)}
