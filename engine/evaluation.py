"""Evaluation: of given weights (`main.py --eval`), and of a run's model and its average after each epoch."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from yacs.config import CfgNode

from data.build import ValBatches
from data.datasets.classes import WeightClasses
from engine.setup import build_components, compile_in_place, load_pretrained, read_pretrained, should_compile
from engine.train_step import TrainComponents
from models.pretrained.load import num_outputs
from tasks.build import open_data, val_batches
from tasks.task import Batch, Task
from utils.checkpoint.schema import class_names_in
from utils.checkpoint.weights import extract_weights, kinds_in
from utils.distributed.fsdp import summon_full_params
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.files import write_text

log = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(components: TrainComponents, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns the metrics of `task` over all images of all ranks. A collective call.

    The task is left in the mode, training or evaluation, in which it was.

    Args:
        task: `components.module_without_ddp` or its moving average.
    """
    was_training = task.training
    task.eval()
    evaluator = task.evaluator(components.device)
    for batch in batches:
        with components.autocast():
            outputs = task.predict(batch)
        evaluator.add(outputs, batch)
    task.train(was_training)
    return evaluator.result()


def evaluate_model_and_ema(components: TrainComponents, val: Callable[[], Iterable[Batch]]) -> dict[str, float]:
    """Returns the metrics of the model, and with the prefix `ema_` those of its average, each over a pass of `val()`.

    The loss is named `val_loss`. A collective call.
    """
    components.average_buffers()
    tasks = {"": components.module_without_ddp}
    if components.ema is not None:
        tasks["ema_"] = components.ema.module
    results: dict[str, float] = {}
    for prefix, task in tasks.items():
        with summon_full_params(task):
            metrics = evaluate(components, task, val())
        if prefix:
            metrics.pop("images")
        results |= {prefix + "val_loss": metrics.pop("loss")} | {prefix + name: metrics[name] for name in metrics}
    return results


def evaluate_weights(config: CfgNode, dist_info: DistInfo) -> None:
    """Evaluates the weights of MODEL.RESUME or MODEL.PRETRAINED and writes `results.json` into the run's folder.

    Raises:
        UserError: weights that cannot be read, or whose head is not for the classes of the data.
    """
    source, choice = config.MODEL.RESUME or config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_EMA
    contents: dict = {}

    def read_classes() -> WeightClasses:
        contents.update(read_pretrained(source, dist_info))
        outputs = num_outputs(extract_weights(contents, source, choice).state_dict)
        return WeightClasses(source, class_names_in(contents, source), outputs)

    data = open_data(config, dist_info, read_classes)
    components = build_components(config, dist_info, data)
    task = components.module_without_ddp
    # Of a file with an average, auto evaluates both.
    kinds = kinds_in(contents) if choice == "auto" else [choice]
    results: dict[str, object] = {"weights": source, "preset": config.TEST.PRESET}
    val: ValBatches | None = None
    for kind in kinds or ["auto"]:
        weight_format = load_pretrained(contents, source, task, data.class_names, kind, evaluating=True)
        if val is None:
            val = val_batches(config, data, dist_info, weight_format)
        if should_compile(config, dist_info):
            compile_in_place(task.model, dist_info.device, config.TRAIN.CUDA_GRAPHS, fixed_weights=True)
        metrics = evaluate(components, task, val)
        images = metrics.pop("images")
        if images == 0:
            raise UserError(f"DATA.DATA_PATH {config.DATA.DATA_PATH}: no validation image could be read")
        log.info("%s%d images: %s", "average of the weights: " if kind == "ema" else "", images, task.describe(metrics))
        results |= {"format": weight_format, "images": images}
        results["ema_metrics" if kind == "ema" else "metrics"] = metrics
    if dist_info.is_main:
        _write_results(Path(config.OUTPUT, config.MODEL.NAME, config.TAG), results)


def _write_results(folder: Path, results: dict[str, object]) -> None:
    path = folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}). Give another folder with --output") from error
    log.info("results in %s", path)
