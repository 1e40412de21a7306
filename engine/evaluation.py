"""Evaluation: of given weights (`main.py --eval`), and of a run's model and its average after each epoch."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from yacs.config import CfgNode

from engine.setup import build_components, compile_in_place, load_pretrained, should_compile
from engine.train_step import TrainComponents
from models.pretrained.load import load_weights
from tasks.build import open_data, val_batches
from tasks.task import Batch, Task
from utils.checkpoint.io import extract_state_dict
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


def evaluate_with_average(components: TrainComponents, val: Callable[[], Iterable[Batch]]) -> dict[str, float]:
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
    data = open_data(config, dist_info)
    components = build_components(config, dist_info, data)
    task = components.module_without_ddp
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    contents, weight_format = load_pretrained(source, dist_info, task, data.class_names, evaluating=True)
    val = val_batches(config, data, dist_info, weight_format)
    results: dict[str, object] = {"weights": source, "format": weight_format, "preset": config.TEST.PRESET}
    for name in ("model", "ema") if contents.get("ema") else ("model",):
        if name == "ema":
            load_weights(task.model, extract_state_dict({"model": contents["ema"]}, source), source=source)
        if should_compile(config, dist_info):
            compile_in_place(task.model, dist_info.device, config.TRAIN.CUDA_GRAPHS, fixed_weights=True)
        metrics = evaluate(components, task, val)
        images = metrics.pop("images")
        if images == 0:
            raise UserError(f"DATA.DATA_PATH {config.DATA.DATA_PATH}: no validation image could be read")
        log.info("%s%d images: %s", "average of the weights: " if name == "ema" else "", images, task.describe(metrics))
        results |= {"images": images} | {"metrics" if name == "model" else "ema_metrics": metrics}
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
