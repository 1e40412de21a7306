"""What every mode builds: the model with its objective and optimizer, and weights put into it."""

import inspect
import logging

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from engine.train_step import TrainComponents
from models.build import build_model, input_channels
from models.count import count_macs, count_parameters
from models.pretrained.download import resolve_weights
from models.pretrained.load import load_weights
from optimizer import Bf16Params, build_optimizer
from tasks.classification import Classification
from utils.checkpoint.io import extract_state_dict, read_checkpoint
from utils.checkpoint.schema import class_names_in
from utils.distributed.fsdp import mesh_of, shard, shard_optimizer_state
from utils.distributed.process_group import DistInfo, local_rank_zero_first
from utils.errors import UserError
from utils.malloc import disable_malloc_trim
from utils.precision import choose_amp_dtype, describe
from utils.seed import seed_cpu
from utils.tracking.run_dir import hardware

log = logging.getLogger(__name__)


def build_components(config: CfgNode, dist_info: DistInfo, num_classes: int) -> TrainComponents:
    """The model with random weights, its objective and its optimizer, on this process's device.

    What is to be split over the processes stays on the CPU until `compile_and_wrap` splits it: it may be too much for
    one device.
    """
    if dist_info.device.type == "cpu":
        disable_malloc_trim()
    seed_cpu(config.SEED)
    model = build_model(config, num_classes).to("cpu" if uses_fsdp(config, dist_info) else dist_info.device)
    task = Classification(model, config.MODEL.LABEL_SMOOTHING)
    amp_dtype = choose_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, dist_info.device)
    log.info(
        "%s: %.3g M parameters, %.3g G multiply-adds an image; %d process(es) on %s, %s",
        config.MODEL.NAME,
        count_parameters(model) / 1e6,
        count_macs(model, config.DATA.IMG_SIZE, input_channels(config)) / 1e9,
        dist_info.world_size,
        hardware(),
        describe(amp_dtype),
    )
    return TrainComponents(
        task,
        build_optimizer(config, model),
        torch.amp.GradScaler(dist_info.device.type, enabled=amp_dtype is torch.float16),
        dist_info.device,
        amp_dtype,
        grad_accum_steps=config.TRAIN.ACCUMULATION_STEPS,
        clip_grad=config.TRAIN.CLIP_GRAD,
        max_bad_steps=config.TRAIN.MAX_BAD_STEPS,
        seed=config.SEED,
        ema=ModelEmaV3(task, decay=config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY > 0 else None,
    )


def compile_and_wrap(config: CfgNode, dist_info: DistInfo, components: TrainComponents) -> None:
    """Readies a learner whose weights are loaded: bfloat16 matrices, compilation, several processes, as configured.

    Names of parameters stay as they are.

    Raises:
        UserError: TRAIN.BF16_PARAMS where the run does not compute in bfloat16; TRAIN.PARALLEL fsdp in float16.
    """
    if config.TRAIN.BF16_PARAMS:
        if components.amp_dtype is not torch.bfloat16:
            raise UserError(
                "TRAIN.BF16_PARAMS keeps matrices in bfloat16, but this run computes in "
                f"{describe(components.amp_dtype)}: give AMP_DTYPE bfloat16, or leave TRAIN.BF16_PARAMS out"
            )
        components.bf16 = Bf16Params(components.module_without_ddp.model)
    if config.TRAIN.COMPILE:
        # Only when speed is measured is nothing learnt that the model would have to know.
        compile_in_place(
            components.module_without_ddp.model, dist_info.device, config.TRAIN.CUDA_GRAPHS, config.THROUGHPUT_MODE
        )
    if uses_fsdp(config, dist_info):
        apply_fsdp(config, dist_info, components)
    elif dist_info.world_size > 1:
        device_ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
        # The buffers (masks, indices) are the same everywhere and never change; torch 2.14 renamed the option.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        components.task = DistributedDataParallel(
            components.task, device_ids=device_ids, gradient_as_bucket_view=True, **{sync: False}
        )
        _warm_up_ddp_buckets(config, components)


def _warm_up_ddp_buckets(config: CfgNode, components: TrainComponents) -> None:
    """One backward pass on black images, whose gradients are thrown away.

    DDP lays out the gradients it sums anew after its first pass, and with more than two processes the last bits of a
    sum depend on where in the layout it lies. So that they do not depend on when a run was started, no update is made
    with the first layout.
    """
    size, device = config.DATA.IMG_SIZE, components.device
    images = torch.zeros(2, input_channels(config), size, size, device=device)
    components.task.eval()  # running statistics and random draws are left alone
    with torch.compiler.set_stance("force_eager"), components.autocast():
        loss = components.task({"image": images, "target": torch.zeros(2, dtype=torch.int64, device=device)})["loss"]
        loss.backward()
    components.task.zero_grad(set_to_none=True)


def uses_fsdp(config: CfgNode, dist_info: DistInfo) -> bool:
    """Whether the processes of this run share one copy of the model, instead of having one each."""
    training = not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    return training and config.TRAIN.PARALLEL == "fsdp" and dist_info.world_size > 1


def apply_fsdp(config: CfgNode, dist_info: DistInfo, components: TrainComponents) -> None:
    """Splits model, average and optimizer state over the processes.

    Raises:
        UserError: in float16, whose loss scaling is not built for split gradients.
    """
    if components.scaler.is_enabled():
        raise UserError(
            "TRAIN.PARALLEL fsdp does not go with float16. Take AMP_DTYPE bfloat16 or float32, or TRAIN.PARALLEL ddp"
        )
    mesh = mesh_of(dist_info)
    learnt = components.optimizer.state_dict()
    averaged = [] if components.ema is None else [components.ema.module.model]
    for model in (components.module_without_ddp.model, *averaged):
        shard(model, [block for stage in model.layers for block in stage.blocks], mesh)
    components.optimizer = build_optimizer(
        config, components.module_without_ddp.model
    )  # over the parts, which are other parameters
    shard_optimizer_state(components.optimizer, learnt)
    log.info("model, average and optimizer are split over %d processes (fsdp)", dist_info.world_size)


def compile_in_place(
    model: torch.nn.Module, device: torch.device, cuda_graphs: bool = False, fixed_weights: bool = False
) -> bool:
    """Has `model` compiled when it first meets a shape; where nothing can be compiled, says so and leaves it as it is.

    What was compiled is kept on disk by PyTorch, in TORCHINDUCTOR_CACHE_DIR, for the next start.

    Args:
        cuda_graphs: replay a step's kernels as one graph: pays where the GPU waits for their launches.
        fixed_weights: inference is of the weights as they now are, whatever becomes of them until this is called
            again: on a CPU they are cast and packed once, instead of at each step.
    """
    if fixed_weights:
        torch.compiler.reset()  # forget code that holds earlier weights
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:  # no compiler, no Triton, a GPU that it does not know: all of them are reported so
        log.warning(
            "TRAIN.COMPILE: nothing can be compiled here, so the model runs as it is, slower: %s",
            " ".join(str(error).split("\n")[:2]),
        )
        return False
    if cuda_graphs and device.type != "cuda":
        log.warning("TRAIN.CUDA_GRAPHS has no effect here: it is for GPUs")
        cuda_graphs = False
    # Each shape is compiled for itself: there are two or three, and code for any shape is slower.
    model.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
    # Asked where gradients are off, when the model is traced: that is later, and before what options= says is heard.
    torch._inductor.config.freezing = fixed_weights and device.type == "cpu"
    log.info("the model is compiled at its first step, which takes up to minutes; later starts find it in a cache")
    return True


def load_pretrained(
    source: str, dist_info: DistInfo, model: torch.nn.Module, class_names: list[str] | None, evaluating: bool = False
) -> tuple[dict, str]:
    """Loads weights into `model`, says what became of each, and returns all that the file holds, and its layout."""
    with local_rank_zero_first(dist_info):
        contents = read_checkpoint(resolve_weights(source, progress=dist_info.is_main))
    weights, theirs = extract_state_dict(contents, source), class_names_in(contents, source)
    if evaluating:
        refuse_other_classes(source, theirs, class_names)
    report = load_weights(model, weights, class_names, source, trained_on=theirs)
    log.info("weights from %s (layout: %s)\n%s", source, report.layout, report.table())
    if evaluating and report.initialised:
        raise UserError(
            f"{source}: has no weights for {', '.join(report.initialised)}: there is nothing to evaluate. Train "
            "them first (--pretrained without --eval), or evaluate on the data these weights were made for"
        )
    return contents, report.layout


def refuse_other_classes(source: str, theirs: list[str] | None, ours: list[str] | None) -> None:
    if theirs and ours and theirs != ours:
        first = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), (len(theirs), len(ours)))
        raise UserError(
            f"{source}: was trained on other classes than the data's: {first[0]} there, {first[1]} here. "
            "Give the data it was trained on, or start a new run from its weights with --pretrained"
        )
