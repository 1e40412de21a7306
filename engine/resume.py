"""Where a training run begins: its folder, the checkpoint it continues from, and whether it is the same run still."""

import logging
from dataclasses import asdict, dataclass, replace

from yacs.config import CfgNode

from config import differences, get_config, parse
from data.build import Data
from data.datasets.base import dataset_digest
from engine.setup import load_pretrained, refuse_other_classes
from engine.train_step import TrainComponents, TrainState
from models.pretrained.download import resolve_weights
from utils.checkpoint.io import CheckpointFolder, read_checkpoint
from utils.checkpoint.schema import validate_checkpoint
from utils.distributed.process_group import DistInfo, broadcast_from_main, local_rank_zero_first
from utils.errors import UserError
from utils.tracking import logger
from utils.tracking.run_dir import RunDir

log = logging.getLogger(__name__)

# Who changed neither of these means the same run, on however many processes.
_BATCH_KEYS = (("DATA", "BATCH_SIZE"), ("TRAIN", "ACCUMULATION_STEPS"))


@dataclass(frozen=True)
class TrainDataInfo:
    """What the clock counts: the training images, and how many of them an update takes."""

    images: int
    dataset_digest: str  # of their names and labels, in their order
    global_batch: int  # batch size x processes x accumulation steps

    def state_dict(self) -> dict:
        return asdict(self)


def open_run_folder(folder: RunDir, checkpoints: CheckpointFolder, config: CfgNode) -> None:
    """Makes a folder that is this run's own ready, and begins to log into it.

    Raises:
        UserError: it cannot be written, or holds a run that is not to be continued.
    """
    try:
        logger.add_file(folder.log_file)
        checkpoints.prepare()
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be used ({error}). Give another folder with --output or --tag"
        ) from error
    if not config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME and checkpoints.last.exists():
        raise UserError(
            f"{folder.path} holds a run, and TRAIN.AUTO_RESUME is off. Give this run a name of its own with --tag, or "
            "name the checkpoint to continue from with --resume"
        )
    log.info("run folder %s", folder.path)


def load_resume_checkpoint(
    config: CfgNode, dist_info: DistInfo, folder: RunDir, checkpoints: CheckpointFolder
) -> tuple[str, dict | None]:
    """The checkpoint to continue from and its contents; ("", None) for a run that is new.

    Raises:
        UserError: it cannot be read, or holds no run.
    """
    # Rank 0 chooses, so that all processes continue from the same file.
    source = broadcast_from_main(_checkpoint_to_continue(config, folder, checkpoints) if dist_info.is_main else None)
    if not source:
        return "", None
    with local_rank_zero_first(dist_info):
        saved = read_checkpoint(resolve_weights(source, progress=dist_info.is_main))
    validate_checkpoint(saved, source)
    return source, saved


def check_resume_data(
    config: CfgNode, dist_info: DistInfo, data: Data, source: str, saved: dict | None, allow_config_change: bool
) -> TrainDataInfo:
    """The training images of this run, and how many of them an update takes: as many as at its first start.

    Raises:
        UserError: the checkpoint `saved` (called `source`) is of a run with another configuration, other data or
            another global batch, and that was not accepted or cannot be.
    """
    images_per_micro_step = config.DATA.BATCH_SIZE * dist_info.world_size
    now = TrainDataInfo(
        len(data.train), dataset_digest(data.train), images_per_micro_step * config.TRAIN.ACCUMULATION_STEPS
    )
    if saved is None:
        return now
    then = parse(saved["config"], source)
    before = TrainDataInfo(**saved["stream"]) if "stream" in saved else now
    _refuse_other_config(source, then, config, allow_config_change)
    refuse_other_classes(source, saved.get("class_names"), data.class_names)
    _refuse_other_images(source, before, now, allow_config_change)
    same = all(then[section][key] == config[section][key] for section, key in _BATCH_KEYS)
    if same and before.global_batch != now.global_batch and before.global_batch % images_per_micro_step == 0:
        log.info(
            "%d process(es): %d accumulation steps hold the %d images an update of this run",
            dist_info.world_size, before.global_batch // images_per_micro_step, before.global_batch,
        )  # fmt: skip
        now = replace(now, global_batch=before.global_batch)
    _refuse_other_global_batch(source, before, now, config, dist_info, saved["state"]["samples"], allow_config_change)
    return now


def resume_or_init(
    config: CfgNode,
    dist_info: DistInfo,
    components: TrainComponents,
    class_names: list[str] | None,
    source: str,
    saved: dict | None,
) -> TrainState:
    """Puts the run where it begins: at the checkpoint `saved`, else at pretrained weights, else at random ones.

    Raises:
        UserError: the weights do not fit the model.
    """
    state = TrainState()
    if saved is not None:
        if config.MODEL.PRETRAINED:
            log.info("--pretrained %s is not read: the run has begun already", config.MODEL.PRETRAINED)
        try:
            components.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{source}: does not fit this model or optimizer ({str(error)[:500]}). Continue with the configuration "
                "that wrote it, or start a new run from its weights with --pretrained"
            ) from error
        state.load_state_dict(saved["state"])
        log.info("continuing from %s, after %s images", source, f"{state.samples:,}")
    elif config.MODEL.PRETRAINED:
        load_pretrained(config.MODEL.PRETRAINED, dist_info, components.module_without_ddp.model, class_names)
        if components.ema is not None:
            components.ema.set(components.module_without_ddp)
    return state


def _checkpoint_to_continue(config: CfgNode, folder: RunDir, checkpoints: CheckpointFolder) -> str:
    """`--resume FILE`, else the newest in the folder, else "".

    A run that began from FILE goes on from its own checkpoints when it is started again with the same command.
    """
    asked = config.MODEL.RESUME
    began = get_config(str(folder.config_file)).MODEL.RESUME if folder.config_file.exists() else ""
    if asked and asked != began:
        return asked
    found = checkpoints.newest() if config.TRAIN.AUTO_RESUME else None
    return str(found[0]) if found else asked


def _refuse_other_config(source: str, then: CfgNode, config: CfgNode, allow_config_change: bool) -> None:
    """Compares the configuration in the checkpoint `source` with this one.

    What accumulation is for is the global batch, which is compared by itself: with another number of processes, other
    steps are the same run.
    """
    changed = [change for change in differences(then, config) if change[0] != "TRAIN.ACCUMULATION_STEPS"]
    lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
    if changed and not allow_config_change:
        raise UserError(
            f"{source} is of a run with another configuration:{lines}\nGive this run a name of its own with --tag, or "
            "continue that one with these changes with --allow-config-change"
        )
    if changed:
        log.warning("continuing with another configuration:%s", lines)


def _refuse_other_images(source: str, before: TrainDataInfo, now: TrainDataInfo, allow_config_change: bool) -> None:
    """Images that were added, removed or renamed between two starts give another order from the first one on."""
    if before.dataset_digest == now.dataset_digest:
        return
    what = f"{before.images:,} training images there, {now.images:,} now"
    if before.images == now.images:
        what = f"{now.images:,} training images as before, but not with the same names and labels"
    if not allow_config_change:
        raise UserError(
            f"{source} is of a run on other data (DATA.DATA_PATH): {what}, so that their order would be another. Put "
            f"the data back as they were, begin a new run from these weights with --tag NAME --pretrained {source}, or "
            "go on with the data as they are now with --allow-config-change"
        )
    log.warning("continuing with other data: %s", what)


def _refuse_other_global_batch(
    source: str,
    before: TrainDataInfo,
    now: TrainDataInfo,
    config: CfgNode,
    dist_info: DistInfo,
    samples: int,
    allow_config_change: bool,
) -> None:
    if before.global_batch != now.global_batch and not allow_config_change:
        way_out = suggest_batch_flags(before.global_batch, config.DATA.BATCH_SIZE, dist_info.world_size)
        raise UserError(
            f"{source} is of a run with {before.global_batch} images an update, and this start has {now.global_batch} "
            f"(batch size {config.DATA.BATCH_SIZE} x {dist_info.world_size} process(es) x accumulation steps "
            f"{config.TRAIN.ACCUMULATION_STEPS}). {way_out}"
        )
    if samples % now.global_batch:
        raise UserError(
            f"{source}: the run stands at {samples:,} images, which is no whole number of updates at "
            f"{now.global_batch} images each (batch size x processes x accumulation steps). "
            f"{suggest_batch_flags(before.global_batch, config.DATA.BATCH_SIZE, dist_info.world_size)}"
        )


def suggest_batch_flags(global_batch: int, batch_size: int, processes: int) -> str:
    """What to say to keep `global_batch` images an update with this number of processes; or with which it goes."""
    if global_batch % processes:
        possible = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        fewer, more = max(n for n in possible if n < processes), min((n for n in possible if n > processes), default=0)
        return (
            f"{global_batch} images cannot be shared evenly by {processes} processes: start {fewer}"
            f"{f' or {more}' if more else ''} of them, or change the number of images with --allow-config-change"
        )
    share = global_batch // processes
    if share % batch_size == 0:
        return f"To hold the number it had: --accumulation-steps {share // batch_size}"
    sizes = [size for size in range(1, batch_size + 1) if share % size == 0]
    size = max(sizes, key=lambda size: (size % 2 == 0, size))  # an even one where there is one: Mixup pairs images
    return (
        f"To hold the number it had: --batch-size {size} --accumulation-steps {share // size} (with --allow-config-change, "
        "since Mixup then pairs other images)"
    )
