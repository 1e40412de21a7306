"""The loops: train, evaluate, measure. They know objectives, batches and a clock; no flags, no files, no Swin.

One update reads `accumulation` micro-batches, and the only thing that waits for the device is whoever reads the sums.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from optimizer import Bf16Params
from utils.distributed.fsdp import gather_full_state, to_full_tensor
from utils.errors import TrainingDiverged
from utils.metrics import Sums
from utils.seed import derive, seed_device

Batch = dict[str, torch.Tensor]
TRAIN_SUMS = ("updates", "finite", "loss", "grad_norm")


@dataclass
class TrainState:
    """All that a run is, beside the tensors: the clock, and what it has to remember of the past."""

    samples: int = 0  # the clock: images consumed, over all processes and epochs
    best: float = float("-inf")  # the best value of the objective's main metric so far
    skipped: int = 0  # updates skipped because something was not finite
    skipped_in_a_row: int = 0
    epoch_sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TRAIN_SUMS, 0.0))

    def end_epoch(self) -> float:
        """The mean training loss of the epoch that is over; the next one begins."""
        loss = self.epoch_sums["loss"] / max(1.0, self.epoch_sums["finite"])
        self.epoch_sums = dict.fromkeys(TRAIN_SUMS, 0.0)
        return loss

    def update_best(self, value: float) -> bool:
        """Whether `value` is the best of the main metric so far, which it then is."""
        improved = value > self.best
        self.best = max(self.best, value)
        return improved

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, value)


@dataclass
class TrainComponents:
    """What learns, and how an update is made."""

    task: nn.Module  # wrapped in DDP where there are several processes
    optimizer: torch.optim.Optimizer  # a fused one: it skips an update when told by a tensor
    scaler: torch.amp.GradScaler  # disabled unless in float16
    device: torch.device
    amp_dtype: torch.dtype | None
    grad_accum_steps: int = 1
    clip_grad: float = 0.0  # 0: no clipping
    max_bad_steps: int = 10
    seed: int = 0
    ema: ModelEmaV3 | None = None
    bf16: Bf16Params | None = None  # where the model computes with bfloat16 matrices

    @property
    def module_without_ddp(self) -> nn.Module:
        """The objective without DDP around it."""
        return self.task.module if isinstance(self.task, DistributedDataParallel) else self.task

    def state_dict(self) -> dict:
        """All that was learnt. A collective call where the model is split over the processes: rank 0 gets it whole."""
        contents = {
            "model": self.module_without_ddp.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.model.state_dict(),
        }
        return gather_full_state(contents)

    def load_state_dict(self, saved: dict) -> None:
        """Takes over what was learnt; decay and the like stay as they were set for this run.

        Raises:
            KeyError, RuntimeError, ValueError: `saved` belongs to another model, optimizer or set of groups.
        """
        self.module_without_ddp.model.load_state_dict(saved["model"])
        own = self.optimizer.state_dict()
        if saved["optimizer_name"] != type(self.optimizer).__name__:
            raise ValueError(f"its optimizer is {saved['optimizer_name']}, not {type(self.optimizer).__name__}")
        if [group["names"] for group in own["param_groups"]] != [
            group["names"] for group in saved["optimizer"]["param_groups"]
        ]:
            raise ValueError("the optimizer's parameter groups differ")
        # The learning rate is that of the last update, for whoever saves before the next one sets it.
        rates = [group["lr"] for group in saved["optimizer"]["param_groups"]]
        groups = [{**group, "lr": rate} for group, rate in zip(own["param_groups"], rates, strict=True)]
        self.optimizer.load_state_dict({"param_groups": groups, "state": saved["optimizer"]["state"]})
        for parameter, moments in self.optimizer.state.items():
            if any(value.ndim and value.shape != parameter.shape for value in moments.values()):
                raise ValueError("the optimizer's averages are of other shapes than the weights")
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.module.model.load_state_dict(saved["ema"] or saved["model"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)


class StepMetrics:
    """Keeps count of the updates on the device, so that nothing waits for it until somebody settles the account."""

    def __init__(self, components: TrainComponents, state: TrainState):
        self._state = state
        self._sums = Sums(TRAIN_SUMS, components.device)
        self._skipped = torch.tensor([state.skipped, state.skipped_in_a_row, 0], device=components.device)
        self._limit = components.max_bad_steps
        # Looking at a GPU's counter waits for it: often enough to stop in time, and no more.
        self._every = 1 if components.device.type == "cpu" else self._limit

    def note(self, update: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Counts update number `update`, whose gradient norm tells on every process alike whether it was finite."""
        finite = norm.isfinite()
        zero = torch.zeros_like(loss)
        self._sums.add(
            {
                "updates": torch.ones_like(loss),
                "finite": finite,
                "loss": torch.where(finite, loss, zero),
                "grad_norm": torch.where(finite, norm, zero),
            }
        )
        total, in_a_row, longest = self._skipped.unbind()
        bad = (~finite).to(total.dtype)
        in_a_row = (in_a_row + 1) * bad
        self._skipped = torch.stack([total + bad, in_a_row, torch.maximum(longest, in_a_row)])
        if (update + 1) % self._every == 0:
            self._look_at_skipped()

    def sync_and_reset(self) -> dict[str, float]:
        """Brings the state up to date; returns the sums since the last time. A collective call.

        Mean values are `loss / finite` and `grad_norm / finite`.

        Raises:
            TrainingDiverged: too many updates in a row were skipped.
        """
        self._look_at_skipped()
        taken = self._sums.take()
        self._state.epoch_sums = {name: self._state.epoch_sums[name] + taken[name] for name in taken}
        return taken

    def _look_at_skipped(self) -> None:
        self._state.skipped, self._state.skipped_in_a_row, longest = self._skipped.tolist()
        if longest >= self._limit:
            raise TrainingDiverged(
                f"loss or gradients were not finite in {longest} updates in a row (TRAIN.MAX_BAD_STEPS {self._limit}), "
                f"up to {self._state.samples:,} images; none of these updates was applied. "
                "Ways out: a lower TRAIN.BASE_LR, AMP_DTYPE bfloat16 or float32, TRAIN.CLIP_GRAD above 0"
            )


def train(
    components: TrainComponents,
    batches: Iterable[Batch],
    state: TrainState,
    learning_rate: Callable[[int], float],
    global_batch: int,
) -> Iterator[StepMetrics]:
    """Trains on `batches` to their end, and gives control back after each update.

    Args:
        batches: micro-batches on the device, beginning at `state.samples`; each has its stream `position`.
        state: its clock moves on by `global_batch` images at each update; the rest when the account is settled.
        learning_rate: of an update's number, counted from 0.
        global_batch: images per update, over all processes.

    Yields:
        The account of the updates so far, to be settled before the state is looked at or saved.

    Raises:
        TrainingDiverged: `learner.max_bad_steps` updates in a row were not finite.
    """
    account = StepMetrics(components, state)
    batches = iter(batches)
    for first in batches:
        components.task.train()  # whoever evaluated in between may have left it in evaluation mode
        number = state.samples // global_batch
        for group in components.optimizer.param_groups:
            group["lr"] = learning_rate(number) * group["lr_scale"]
        loss, norm = _update(components, first, batches)
        state.samples += global_batch
        account.note(number, loss, norm)
        yield account


def _update(components: TrainComponents, first: Batch, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer update over `accumulation` micro-batches → this process's mean loss, and the gradient norm."""
    losses = []
    for step in range(components.grad_accum_steps):
        batch = first if step == 0 else next(batches)
        seed_device(derive(components.seed, "model", batch["position"]), components.device)
        last = step == components.grad_accum_steps - 1
        # Bfloat16 gradients are summed over processes at once: over micro-batches they add up in float32.
        defer_grad_sync = isinstance(components.task, DistributedDataParallel) and not last and components.bf16 is None
        with components.task.no_sync() if defer_grad_sync else nullcontext():
            with components.autocast():
                loss = components.task(batch)["loss"]
            # A loss that is not finite makes the gradients NaN, and the sum over processes carries that to every one
            # of them: all skip the same update, and nobody had to ask.
            nonfinite_to_nan = torch.where(loss.detach().isfinite(), 1.0, float("nan")) / components.grad_accum_steps
            components.scaler.scale(loss * nonfinite_to_nan).backward()
        if components.bf16 is not None:
            components.bf16.accumulate_master_grads()
        losses.append(loss.detach())

    components.scaler.unscale_(components.optimizer)
    parameters = [p for group in components.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = to_full_tensor(get_total_norm([p.grad for p in parameters]))
    if components.clip_grad > 0:
        clip_grads_with_norm_(parameters, components.clip_grad, norm)
    if not components.scaler.is_enabled():
        components.optimizer.found_inf = (~norm.isfinite()).float()
    components.scaler.step(components.optimizer)
    components.scaler.update()
    if components.bf16 is not None:
        components.bf16.copy_masters_to_model()
    components.optimizer.zero_grad(set_to_none=True)
    if components.ema is not None:
        components.ema.update(components.module_without_ddp)
    return torch.stack(losses).mean(), norm


@torch.inference_mode()
def evaluate(components: TrainComponents, task: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Means of the objective's metrics over all images of all processes, each image counted once.

    `objective` is `learner.bare` or an average of it; the sums are over images, so that neither the batch size nor the
    number of processes weighs in. A collective call.
    """
    task.eval()
    sums = Sums(("count", *task.metrics), components.device)
    for batch in batches:
        with components.autocast():
            measured = task.measure(batch)
        sums.add(measured)
    totals = sums.take()
    count = totals.pop("count")
    return {"images": int(count)} | {name: total / max(count, 1) for name, total in totals.items()}


def seconds_for(step: Callable[[], object], times: int, device: torch.device) -> float:
    """Wall-clock seconds of `times` calls of `step`, until the device is done with them."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    step: Callable[[], object], images: int, device: torch.device, seconds: float = 2.0, runs: int = 5
) -> float:
    """Images per second of `step`, which handles `images` of them: the median of `runs` runs of `seconds` each."""
    seconds_for(step, 2, device)  # warm-up: kernels are chosen, memory is allocated
    times = max(1, round(seconds / seconds_for(step, 1, device)))
    return statistics.median(times * images / seconds_for(step, times, device) for _ in range(runs))
