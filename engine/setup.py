"""Builds the training components and loads given weights into them: what training, evaluation and throughput share."""

import logging
import os
from dataclasses import replace

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.build import Data
from data.datasets.classes import normalisation_hint
from engine.train_step import TrainComponents
from models.build import input_channels
from models.count import check_inputs, count_macs, count_parameters
from models.pretrained.download import resolve_weights
from models.pretrained.load import load_weights
from optimizer import Bf16Params, build_optimizer
from tasks.build import build_task
from tasks.task import Task
from utils.checkpoint.io import read_checkpoint
from utils.checkpoint.schema import class_names_in
from utils.checkpoint.weights import extract_weights
from utils.compat import ddp_without_buffer_sync, set_inductor_freezing
from utils.distributed.fsdp import mesh_of, shard, shard_optimizer_state
from utils.distributed.process_group import DistInfo, local_rank_zero_first
from utils.errors import UserError
from utils.malloc import disable_malloc_trim
from utils.precision import choose_amp_dtype, describe
from utils.seed import seed_cpu
from utils.tracking.run_dir import hardware

log = logging.getLogger(__name__)


def build_components(
    config: CfgNode, dist_info: DistInfo, data: Data | None, grad_accum_steps: int | None = None
) -> TrainComponents:
    """Builds the task with random weights and its optimizer, on this rank's device.

    A model for FSDP stays on the CPU until `compile_and_wrap` shards it: it may be too large for one device.

    Args:
        data: None where speed is measured without any.
        grad_accum_steps: TRAIN.ACCUMULATION_STEPS if None.

    Raises:
        UserError: the model cannot be built, or cannot take inputs of the configured sizes.
    """
    if dist_info.device.type == "cpu":
        disable_malloc_trim()
    seed_cpu(config.SEED)
    task = build_task(config, data).to("cpu" if uses_fsdp(config, dist_info) else dist_info.device)
    if config.EVAL_MODE:
        task.eval()  # takes inputs that training would refuse
    check_inputs(task.model, config.MODEL.NAME, config.DATA.BATCH_SIZE, config.DATA.IMG_SIZE, input_channels(config))
    amp_dtype = choose_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, dist_info.device)
    log.info(
        "%s: %.3g M parameters, %.3g G multiply-adds an image; %d process(es) on %s, %s",
        config.MODEL.NAME,
        count_parameters(task.model) / 1e6,
        count_macs(task.model, config.DATA.IMG_SIZE, input_channels(config)) / 1e9,
        dist_info.world_size,
        hardware(),
        describe(amp_dtype),
    )
    return TrainComponents(
        task,
        build_optimizer(config, task.model),
        torch.amp.GradScaler(dist_info.device.type, enabled=amp_dtype is torch.float16),
        dist_info.device,
        amp_dtype,
        grad_accum_steps=grad_accum_steps or config.TRAIN.ACCUMULATION_STEPS,
        clip_grad=config.TRAIN.CLIP_GRAD,
        max_bad_steps=config.TRAIN.MAX_BAD_STEPS,
        seed=config.SEED,
        ema=ModelEmaV3(task, decay=config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY > 0 else None,
    )


def compile_and_wrap(config: CfgNode, dist_info: DistInfo, components: TrainComponents) -> TrainComponents:
    """Returns the components ready to train, once their weights are loaded: bfloat16 matrices, compiled, DDP or FSDP.

    Parameter names stay as they are.

    Raises:
        UserError: TRAIN.BF16_PARAMS where the run does not compute in bfloat16; TRAIN.PARALLEL fsdp in float16.
    """
    task = components.module_without_ddp
    if config.TRAIN.BF16_PARAMS:
        if components.amp_dtype is not torch.bfloat16:
            raise UserError(
                "TRAIN.BF16_PARAMS keeps matrices in bfloat16, but this run computes in "
                f"{describe(components.amp_dtype)}: give AMP_DTYPE bfloat16, or leave TRAIN.BF16_PARAMS out"
            )
        components = replace(components, bf16=Bf16Params(task.model))
    if should_compile(config, dist_info):
        # While speed is measured the weights do not change.
        compile_in_place(task.model, dist_info.device, config.TRAIN.CUDA_GRAPHS, fixed_weights=config.THROUGHPUT_MODE)
    if uses_fsdp(config, dist_info):
        return apply_fsdp(config, dist_info, components)
    if dist_info.world_size > 1:
        device_ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
        # Masks and indices never change; running statistics are averaged when they are needed (`average_buffers`).
        wrapped = DistributedDataParallel(
            task, device_ids=device_ids, gradient_as_bucket_view=True, **ddp_without_buffer_sync()
        )
        components = replace(components, task=wrapped)
        _warm_up_ddp_buckets(components)
    return components


def _warm_up_ddp_buckets(components: TrainComponents) -> None:
    """Runs one backward pass whose gradients are thrown away.

    DDP rearranges its buckets after the first backward pass, and with more than two ranks the last bits of a sum depend
    on the arrangement. No step is made with the first one, so that results do not depend on when a run was started.
    """
    task = components.task
    task.eval()  # keeps running statistics and random draws as they are
    with torch.compiler.set_stance("force_eager"), components.autocast():
        task(components.module_without_ddp.example_batch(2, components.device))["loss"].backward()
    task.zero_grad(set_to_none=True)


def uses_fsdp(config: CfgNode, dist_info: DistInfo) -> bool:
    """Returns whether the ranks of this run share one sharded copy of the model."""
    training = not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    return training and config.TRAIN.PARALLEL == "fsdp" and dist_info.world_size > 1


def apply_fsdp(config: CfgNode, dist_info: DistInfo, components: TrainComponents) -> TrainComponents:
    """Shards model, average and optimizer state over the ranks.

    Raises:
        UserError: in float16, whose loss scaling does not support sharded gradients.
    """
    if components.scaler.is_enabled():
        raise UserError(
            "TRAIN.PARALLEL fsdp does not go with float16. Take AMP_DTYPE bfloat16 or float32, or TRAIN.PARALLEL ddp"
        )
    mesh = mesh_of(dist_info)
    optimizer_state = components.optimizer.state_dict()
    model = components.module_without_ddp.model
    averaged = [] if components.ema is None else [components.ema.module.model]
    for each in (model, *averaged):
        shard(each, each.blocks(), mesh)
    optimizer = build_optimizer(config, model)  # sharding replaced the parameters
    shard_optimizer_state(optimizer, optimizer_state)
    log.info("model, average and optimizer are sharded over %d ranks (fsdp)", dist_info.world_size)
    return replace(components, optimizer=optimizer)


def should_compile(config: CfgNode, dist_info: DistInfo) -> bool:
    """Returns whether TRAIN.COMPILE asks for compilation here.

    `auto` compiles for training and its measurement on a GPU: an eager step at 128 images is bound there by the CPU,
    which launches the kernels.
    """
    if config.TRAIN.COMPILE != "auto":
        return config.TRAIN.COMPILE
    return dist_info.device.type == "cuda" and not config.EVAL_MODE and not uses_fsdp(config, dist_info)


def compile_in_place(
    model: nn.Module, device: torch.device, cuda_graphs: bool = False, fixed_weights: bool = False
) -> bool:
    """Has `model` compiled when it first meets a shape. Where nothing can be compiled, logs why and changes nothing.

    PyTorch keeps the compiled code in TORCHINDUCTOR_CACHE_DIR for later starts.

    Args:
        cuda_graphs: replay the kernels of a step as one graph, which pays where the GPU waits for their launches.
        fixed_weights: the weights do not change until the next call of this function, so inference on a CPU may cast
            and pack them once instead of at each step.

    Returns:
        Whether the model will be compiled.
    """
    if fixed_weights:
        torch.compiler.reset()  # forget code that holds earlier weights
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:  # no compiler, no Triton, an unknown GPU: all are reported so
        log.warning(
            "TRAIN.COMPILE: nothing can be compiled here, so the model runs uncompiled, slower: %s",
            " ".join(str(error).split("\n")[:2]),
        )
        return False
    if cuda_graphs and device.type != "cuda":
        log.warning("TRAIN.CUDA_GRAPHS has no effect here: it is for GPUs")
        cuda_graphs = False
    # Each shape is compiled separately: there are two or three, and code for any shape is slower.
    model.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
    # The tracer reads this global setting and ignores the same entry of `options=`.
    set_inductor_freezing(fixed_weights and device.type == "cpu")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the temporary folder")
    log.info(
        "TRAIN.COMPILE: the model is compiled at its first step, which takes up to minutes; later starts find the code "
        "in %s (TORCHINDUCTOR_CACHE_DIR)",
        cache,
    )
    return True


def read_pretrained(source: str, dist_info: DistInfo) -> dict:
    """Returns the contents of the weight file `source`, which is downloaded once per host if necessary.

    Raises:
        UserError: it cannot be found or read.
    """
    with local_rank_zero_first(dist_info):
        return read_checkpoint(resolve_weights(source, progress=dist_info.is_main))


def load_pretrained(
    contents: dict,
    source: str,
    task: Task,
    class_names: list[str] | None,
    choice: str = "auto",
    evaluating: bool = False,
) -> str:
    """Loads weights into the model of `task` and logs what became of each.

    Args:
        contents: of the file `source`.
        choice: MODEL.PRETRAINED_EMA: the weights to take from a file that also holds their average.

    Returns:
        The name of their format.

    Raises:
        UserError: unreadable weights, or, when evaluating, weights for other classes or without a part of the model.
    """
    chosen, trained_on = extract_weights(contents, source, choice), class_names_in(contents, source)
    if evaluating:
        check_same_class_names(source, trained_on, class_names)
    elif chosen.note:
        log.info("%s %s", source, chosen.note)
    report = load_weights(task.model, chosen.state_dict, class_names, source, trained_on=trained_on)
    log.info("weights from %s (format: %s)\n%s", source, report.format, report.table())
    if evaluating and report.initialised:
        raise UserError(
            f"{source}: has no weights for {', '.join(report.initialised)}: there is nothing to evaluate. Train "
            "them first (--pretrained without --eval), or evaluate on the data these weights were made for"
        )
    return report.format


def check_same_class_names(source: str, saved: list[str] | None, current: list[str] | None) -> None:
    """Raises UserError where the weights of `source` and the data both name their classes, and differ."""
    if not saved or not current or saved == current:
        return
    first = next((pair for pair in zip(saved, current, strict=False) if pair[0] != pair[1]), None)
    there, here = first or (len(saved), len(current))
    if sorted(saved) == sorted(current):
        label = saved.index(str(there))
        problem = f"has the classes of the data in another order: label {label} is {there} there, {here} here"
    else:
        problem = f"was trained on other classes than the data's: {there} there, {here} here"
    raise UserError(
        f"{source}: {problem}. {normalisation_hint(saved, current)}Give the data it was trained on, or start a new run "
        "from its weights with --pretrained"
    )
