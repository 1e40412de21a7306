"""The classification task: exact metrics, whatever the batch size, and what it draws and describes."""

import pytest
import torch
from torch import nn

from tasks.classification import Classification

CPU = torch.device("cpu")
CLASSES = 6


def make_task(**kwargs) -> Classification:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    return Classification(model, 0.1, input_shape=(3, 2, 2), num_classes=CLASSES, **kwargs).eval()


@torch.inference_mode()
def metrics_of(task: Classification, batches: list[dict]) -> dict[str, float]:
    evaluator = task.evaluator(CPU)
    for batch in batches:
        evaluator.add(task.predict(batch), batch)
    return evaluator.result()


def test_metrics_do_not_depend_on_the_batch_size():
    task = make_task()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(30, 3, 2, 2, generator=generator)
    target = torch.randint(0, CLASSES, (30,), generator=generator)
    whole = metrics_of(task, [{"image": image, "target": target}])
    parts = metrics_of(task, [{"image": image[i : i + 7], "target": target[i : i + 7]} for i in range(0, 30, 7)])
    assert whole["images"] == parts["images"] == 30
    for name in task.metrics:
        assert whole[name] == pytest.approx(parts[name], rel=1e-6)
    logits = task.model(image)
    assert whole["acc1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert whole["loss"] == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-6)


def test_with_fewer_than_five_classes_acc5_counts_all_guesses():
    task = Classification(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), input_shape=(3, 2, 2), num_classes=3)
    batch = {"image": torch.randn(8, 3, 2, 2), "target": torch.randint(0, 3, (8,))}
    assert metrics_of(task, [batch])["acc5"] == 100.0


def test_nothing_evaluated_is_no_image():
    assert metrics_of(make_task(), [])["images"] == 0


def test_description_gives_units_for_the_metrics_that_are_there():
    task = make_task()
    assert task.describe({"acc1": 81.2}) == "top-1 81.200 %"
    assert task.describe({"loss": 0.5, "acc1": 81.2, "acc5": 95.5}) == "top-1 81.200 %  top-5 95.500 %  loss 0.5000"


def test_an_example_batch_reaches_every_parameter_and_leaves_the_generator_alone():
    task, before = make_task(), torch.get_rng_state()
    batch = task.example_batch(4, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    task(batch)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in task.parameters())


def test_the_first_batch_is_drawn_with_its_labels():
    task = make_task(class_names=[f"class {i}" for i in range(CLASSES)])
    image = task.batch_image({"image": torch.rand(3, 3, 2, 2), "target": torch.tensor([0, 1, 5])})
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
