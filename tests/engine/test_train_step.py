"""The training step on a model of a few parameters: images seen, skipped steps, accumulation, moving averages."""

import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import evaluation, train_step
from engine.train_step import TrainComponents, TrainState, train_steps
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


def make_components(
    optimizer: str = "adamw", amp_dtype: torch.dtype | None = None, ema_decay: float = 0.0, **kwargs
) -> TrainComponents:
    torch.manual_seed(0)
    task = Classification(Tiny())
    group = {"params": list(task.parameters()), "names": ["w", "b"], "lr_scale": 1.0}
    if optimizer == "adamw":
        built = torch.optim.AdamW([group], lr=0.0, fused=True)
    else:
        built = torch.optim.SGD([group], lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=amp_dtype is torch.float16)
    ema = ModelEmaV3(task, decay=ema_decay) if ema_decay else None
    return TrainComponents(task, built, scaler, CPU, amp_dtype, ema=ema, **kwargs)


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
    components: TrainComponents, batches: list[dict], state: TrainState | None = None, lr=lambda step: 0.01
) -> TrainState:
    state = state or TrainState()
    global_batch_size = BATCH * components.grad_accum_steps
    for metrics in train_steps(components, batches, state, lr, global_batch_size):
        metrics.sync_and_reset()
    return state


def weights(components: TrainComponents) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in components.task.parameters()])


def test_clock_and_learning_rate():
    seen = []
    state = run(make_components(), make_batches(5), lr=lambda step: seen.append(step) or 0.01)
    assert state.images_seen == 5 * BATCH
    assert seen == [0, 1, 2, 3, 4]


def test_training_mode_is_set_once_and_restored_by_an_evaluation(monkeypatch: pytest.MonkeyPatch):
    """`Module.train` visits every module, which takes as long as many kernels."""
    components = make_components(ema_decay=0.9)
    calls = []
    train = nn.Module.train
    monkeypatch.setattr(Classification, "train", lambda self, mode=True: calls.append(mode) or train(self, mode))
    training_flags = []
    for step, _ in enumerate(train_steps(components, make_batches(5), TrainState(), lambda step: 0.01, BATCH)):
        training_flags.append(components.task.model.drop.training)
        if step == 2:
            before = len(calls)
            evaluation.evaluate_model_and_ema(components, lambda: make_batches(1))
            assert not components.ema.module.training
            del calls[before:]
    assert training_flags == [True] * 5 and components.task.model.drop.training
    assert calls == [True]


def test_one_step_is_plain_pytorchs():
    components = make_components("sgd", clip_grad=0.1, grad_accum_steps=2)
    twin = make_components("sgd").task
    batches = make_batches(2)
    for module in (components.task, twin):
        module.model.drop.p = 0.0
    run(components, batches, lr=lambda step: 0.5)
    loss = sum(twin(batch)["loss"] for batch in batches) / 2
    loss.backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    for ours, theirs in zip(components.task.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad, rtol=1e-6, atol=1e-7)


def test_accumulation_equals_one_large_batch():
    whole, parts = make_components("sgd"), make_components("sgd", grad_accum_steps=2)
    for components in (whole, parts):
        components.task.model.drop.p = 0.0
    large = [{k: torch.cat([a[k], b[k]]) for k in ("image", "target")} | {"position": 0} for a, b in [make_batches(2)]]
    for _ in train_steps(whole, large, TrainState(), lambda step: 0.1, 2 * BATCH):
        pass
    run(parts, make_batches(2), lr=lambda step: 0.1)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_non_finite_step_is_skipped_and_counted(optimizer: str, amp_dtype: torch.dtype | None):
    components = make_components(optimizer, amp_dtype, clip_grad=5.0, grad_accum_steps=2)
    state, history = TrainState(), []
    for metrics in train_steps(components, make_batches(12, bad=(5,)), state, lambda step: 0.1, 2 * BATCH):
        history.append(weights(components))
        taken = metrics.sync_and_reset()
        assert taken["finite"] == (0 if len(history) == 3 else 1)
        assert math.isfinite(taken["loss"])
    unchanged = [torch.equal(a, b) for a, b in zip(history, history[1:], strict=False)]
    assert unchanged == [False, True, False, False, False]
    assert state.skipped == 1 and state.skipped_in_a_row == 0
    assert history[-1].isfinite().all()


def test_run_stops_after_max_bad_steps_in_a_row():
    components = make_components(max_bad_steps=3)
    state = TrainState()
    with pytest.raises(TrainingDiverged, match="3 steps in a row.*TRAIN.MAX_BAD_STEPS 3.*20 images"):
        run(components, make_batches(20, bad=(1, *range(2, 20))[1:]), state)
    assert state.images_seen == 5 * BATCH


def test_bad_steps_with_good_ones_between_do_not_stop_it():
    state = run(make_components(max_bad_steps=2), make_batches(10, bad=(1, 3, 5, 7)))
    assert state.skipped == 4 and state.images_seen == 10 * BATCH


def test_resumed_in_the_middle_is_the_same_to_the_bit():
    """Including dropout: its draws are functions of the images seen, not of what ran before."""
    through = make_components(ema_decay=0.9)
    run(through, make_batches(8))

    first = make_components(ema_decay=0.9)
    state = run(first, make_batches(5))
    torch.rand(100)  # another process would have drawn other numbers
    second = make_components(ema_decay=0.9)
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
    first, second = make_components(), make_components()
    run(first, make_batches(1))
    second.optimizer.param_groups[0]["weight_decay"] = 0.3
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_another_grouping_is_refused():
    first, second = make_components(), make_components()
    run(first, make_batches(1))
    second.optimizer.param_groups[0]["names"] = ["other", "names"]
    with pytest.raises(ValueError, match="groups"):
        second.load_state_dict(first.state_dict())


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which would wait for a GPU."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_a_step_never_waits_for_the_device(clip_grad: float):
    """Including clipping and the skipping of non-finite steps."""
    components = make_components(clip_grad=clip_grad, grad_accum_steps=2)
    before = weights(components)
    with HostReads() as reads:
        first, second = make_batches(2)
        _, norm = train_step.train_step(components, first, iter([second]))
        assert reads.number == 0
        assert bool(norm > clip_grad) and reads.number == 1  # it does count
    assert torch.equal(weights(components), before)  # at a learning rate of zero


def test_best_metric_follows_its_direction_and_the_loss_breaks_ties():
    state = TrainState()
    assert state.update_best({"model": (80.0, 1.0)}, higher_is_better=True)
    assert not state.update_best({"model": (80.0, 1.0)}, higher_is_better=True)
    assert not state.update_best({"model": (79.0, 0.1)}, higher_is_better=True)
    assert state.update_best({"model": (80.0, 0.9)}, higher_is_better=True)
    assert (state.best_metric, state.best_loss) == (80.0, 0.9)
    state = TrainState()
    assert state.update_best({"model": (0.5, 0.5)}, higher_is_better=False)
    assert state.update_best({"model": (0.4, 0.4)}, higher_is_better=False)
    assert not state.update_best({"model": (0.45, 0.45)}, higher_is_better=False)


def test_the_better_weights_of_the_last_evaluation_are_remembered():
    state = TrainState()
    assert state.update_best({"model": (70.0, 1.0), "ema": (80.0, 1.0)}, higher_is_better=True)
    assert (state.better_weights, state.best_metric) == ("ema", 80.0)
    assert not state.update_best({"model": (75.0, 1.0), "ema": (60.0, 1.0)}, higher_is_better=True)
    assert (state.better_weights, state.best_metric) == ("model", 80.0)
    assert state.update_best({"model": (90.0, 0.9), "ema": (90.0, 0.8)}, higher_is_better=True)
    assert (state.better_weights, state.best_loss) == ("ema", 0.8)
    state = TrainState()
    assert state.update_best({"model": (0.3, 0.3), "ema": (0.2, 0.2)}, higher_is_better=False)
    assert state.better_weights == "ema"
    assert TrainState().better_weights is None


class TwoTerms(Classification):
    loss_terms = ("squared",)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        output = super().forward(batch)
        return output | {"squared": output["loss"] ** 2}


def test_further_loss_terms_are_averaged_by_name():
    torch.manual_seed(0)
    task = TwoTerms(Tiny())
    optimizer = torch.optim.SGD([{"params": list(task.parameters()), "lr_scale": 1.0}], lr=0.0, fused=True)
    components = TrainComponents(task, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU, None)
    state = run(components, make_batches(2))
    assert state.epoch_sums["squared"] > 0 and set(state.end_epoch()) == {"loss", "squared"}
    assert state.epoch_sums == {}
