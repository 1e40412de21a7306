"""The loops on a model of a few parameters: the clock, skipped updates, accumulation, averages, exact evaluation."""

import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import train_step
from engine.train_step import TrainComponents, TrainState, evaluate, measure, train
from tasks.classification import Classification
from utils.errors import TrainingDiverged

CPU = torch.device("cpu")
BATCH, CLASSES = 4, 6


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, CLASSES)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.body(x.flatten(1)))


def make_learner(optimizer: str = "adamw", amp_dtype: torch.dtype | None = None, **kwargs) -> TrainComponents:
    torch.manual_seed(0)
    task = Classification(Tiny())
    group = {"params": list(task.parameters()), "names": ["w", "b"], "lr_scale": 1.0}
    if optimizer == "adamw":
        built = torch.optim.AdamW([group], lr=0.0, fused=True)
    else:
        built = torch.optim.SGD([group], lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=amp_dtype is torch.float16)
    return TrainComponents(task, built, scaler, CPU, amp_dtype, **kwargs)


def make_batches(count: int, start: int = 0, bad: tuple[int, ...] = (), size: int = BATCH) -> list[dict]:
    batches = []
    for number in range(start, start + count):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(size, 3, 2, 2, generator=generator)
        if number in bad:
            image[0, 0, 0, 0] = float("nan")
        target = torch.randint(0, CLASSES, (size,), generator=generator)
        batches.append({"image": image, "target": target, "position": number * size})
    return batches


def run(
    components: TrainComponents, batches: list[dict], state: TrainState | None = None, lr=lambda update: 0.01
) -> TrainState:
    state = state or TrainState()
    global_batch = BATCH * components.grad_accum_steps
    for account in train(components, batches, state, lr, global_batch):
        account.sync_and_reset()
    return state


def weights(components: TrainComponents) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in components.task.parameters()])


def test_clock_and_learning_rate():
    seen = []
    state = run(make_learner(), make_batches(5), lr=lambda update: seen.append(update) or 0.01)
    assert state.samples == 5 * BATCH
    assert seen == [0, 1, 2, 3, 4]


def test_one_update_is_plain_pytorchs():
    components = make_learner("sgd", clip_grad=0.1)
    twin = make_learner("sgd").task
    batches = make_batches(2)
    components.grad_accum_steps = 2
    for module in (components.task, twin):
        module.model.drop.p = 0.0
    run(components, batches, lr=lambda update: 0.5)
    loss = sum(twin(batch)["loss"] for batch in batches) / 2
    loss.backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    for ours, theirs in zip(components.task.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad, rtol=1e-6, atol=1e-7)


def test_accumulation_equals_one_large_batch():
    whole, parts = make_learner("sgd"), make_learner("sgd", grad_accum_steps=2)
    for components in (whole, parts):
        components.task.model.drop.p = 0.0
    large = [{k: torch.cat([a[k], b[k]]) for k in ("image", "target")} | {"position": 0} for a, b in [make_batches(2)]]
    for _ in train(whole, large, TrainState(), lambda update: 0.1, 2 * BATCH):
        pass
    run(parts, make_batches(2), lr=lambda update: 0.1)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_update_that_is_not_finite_is_skipped_and_counted(optimizer: str, amp_dtype: torch.dtype | None):
    components = make_learner(optimizer, amp_dtype, clip_grad=5.0, grad_accum_steps=2)
    state, history = TrainState(), []
    for account in train(components, make_batches(12, bad=(5,)), state, lambda update: 0.1, 2 * BATCH):
        history.append(weights(components))
        taken = account.sync_and_reset()
        assert taken["finite"] == (0 if len(history) == 3 else 1)
        assert math.isfinite(taken["loss"])
    unchanged = [torch.equal(a, b) for a, b in zip(history, history[1:], strict=False)]
    assert unchanged == [False, True, False, False, False]
    assert state.skipped == 1 and state.skipped_in_a_row == 0
    assert history[-1].isfinite().all()


def test_run_stops_after_max_bad_steps_in_a_row():
    components = make_learner(max_bad_steps=3)
    state = TrainState()
    with pytest.raises(TrainingDiverged, match="3 updates in a row.*TRAIN.MAX_BAD_STEPS 3.*20 images"):
        run(components, make_batches(20, bad=(1, *range(2, 20))[1:]), state)
    assert state.samples == 5 * BATCH


def test_bad_updates_with_good_ones_between_do_not_stop_it():
    state = run(make_learner(max_bad_steps=2), make_batches(10, bad=(1, 3, 5, 7)))
    assert state.skipped == 4 and state.samples == 10 * BATCH


def test_resumed_in_the_middle_is_the_same_to_the_bit():
    """Dropout included: its draws are functions of the clock, not of what ran before."""
    through = make_learner(ema=None)
    through.ema = ModelEmaV3(through.task, decay=0.9)
    run(through, make_batches(8))

    first = make_learner()
    first.ema = ModelEmaV3(first.task, decay=0.9)
    state = run(first, make_batches(5))
    torch.rand(100)  # another process would have drawn other numbers
    second = make_learner()
    second.ema = ModelEmaV3(second.task, decay=0.9)
    saved = first.state_dict()
    second.load_state_dict(saved)
    resumed = TrainState()
    resumed.load_state_dict(state.state_dict())
    run(second, make_batches(3, start=5), resumed)

    assert torch.equal(weights(through), weights(second))
    for a, b in zip(through.ema.module.parameters(), second.ema.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(weights(through), weights(first))


def test_settings_of_this_run_survive_loading():
    first, second = make_learner(), make_learner()
    run(first, make_batches(1))
    second.optimizer.param_groups[0]["weight_decay"] = 0.3
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_another_grouping_is_refused():
    first, second = make_learner(), make_learner()
    run(first, make_batches(1))
    second.optimizer.param_groups[0]["names"] = ["other", "names"]
    with pytest.raises(ValueError, match="groups"):
        second.load_state_dict(first.state_dict())


def test_evaluation_does_not_depend_on_the_batch_size():
    components = make_learner()
    whole = make_batches(1, size=30)
    parts = [{k: v[i : i + 7] for k, v in whole[0].items() if k != "position"} for i in range(0, 30, 7)]
    one, other = (evaluate(components, components.module_without_ddp, batches) for batches in (whole, parts))
    assert one["images"] == other["images"] == 30
    for name in ("loss", "acc1", "acc5"):
        assert one[name] == pytest.approx(other[name], rel=1e-6)
    logits = components.module_without_ddp.model(whole[0]["image"])
    assert one["acc1"] == pytest.approx(100 * (logits.argmax(1) == whole[0]["target"]).double().mean().item())


def test_measure_gives_images_per_second():
    calls = []
    rate = measure(lambda: calls.append(sum(range(1000))), images=10, device=CPU, seconds=0.01, runs=3)
    assert rate > 0 and len(calls) >= 6


class Looks(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, for which a GPU's queue would have to run empty."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_an_update_waits_for_nothing(clip_grad: float):
    """Clipping and skipping what is not finite included."""
    components = make_learner(clip_grad=clip_grad, grad_accum_steps=2)
    before = weights(components)
    with Looks() as looks:
        first, second = make_batches(2)
        _, norm = train_step._update(components, first, iter([second]))
        assert looks.number == 0
        assert bool(norm > clip_grad) and looks.number == 1  # it does count
    assert torch.equal(weights(components), before)  # at a learning rate of zero
