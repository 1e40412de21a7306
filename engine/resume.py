"""The start of a training run: its folder, the checkpoint it resumes from, and whether it is still the same run."""

import logging
import math
from dataclasses import asdict, dataclass, replace

from yacs.config import CfgNode

from config import differences, parse
from data.build import Data
from data.datasets.base import dataset_digest
from engine.setup import check_same_class_names, load_pretrained, read_pretrained
from engine.train_step import TrainComponents, TrainState
from lr_scheduler import build_schedule
from models.pretrained.download import resolve_weights
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import read_checkpoint
from utils.checkpoint.schema import validate_checkpoint
from utils.distributed.process_group import DistInfo, broadcast_from_main, local_rank_zero_first
from utils.errors import UserError
from utils.tracking import logger
from utils.tracking.run_dir import RunDir

log = logging.getLogger(__name__)

# If neither changed, another world size adapts the accumulation steps to keep the global batch size.
_BATCH_KEYS = (("DATA", "BATCH_SIZE"), ("TRAIN", "ACCUMULATION_STEPS"))


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that has been read."""

    path: str
    contents: dict


@dataclass(frozen=True)
class TrainDataInfo:
    """The training data as far as resuming depends on them."""

    num_images: int
    dataset_digest: str  # of the names and labels of all images, in their order
    global_batch_size: int  # images per step: batch size x world size x accumulation steps

    def state_dict(self) -> dict:
        return asdict(self)


def open_run_dir(run_dir: RunDir, checkpoints: CheckpointFolder, config: CfgNode) -> None:
    """Prepares a folder that this run has locked, and begins to log into it.

    Raises:
        UserError: it cannot be written, or holds a run that is not to be resumed.
    """
    try:
        logger.add_file(run_dir.log_file)
        checkpoints.prepare()
    except OSError as error:
        raise UserError(
            f"{run_dir.path}: cannot be used ({error}). Give another folder with --output or --tag"
        ) from error
    if not config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME and checkpoints.has_any:
        raise UserError(
            f"{run_dir.path} holds a run, and TRAIN.AUTO_RESUME is off. Give this run a name of its own with --tag, or "
            "name the checkpoint to resume from with --resume"
        )
    log.info("run folder %s", run_dir.path)


def load_resume_checkpoint(
    config: CfgNode, dist_info: DistInfo, run_dir: RunDir, checkpoints: CheckpointFolder
) -> ResumePoint | None:
    """Reads the checkpoint to resume from, once on each rank. None for a new run.

    Raises:
        UserError: it cannot be read, or holds no run.
    """
    # Rank 0 chooses, so that all ranks resume from the same file.
    chosen = _choose_checkpoint(config, run_dir, checkpoints) if dist_info.is_main else None
    path = broadcast_from_main(chosen.path if chosen else None)
    if path is None:
        return None
    with local_rank_zero_first(dist_info):
        point = chosen or _read(path)
    validate_checkpoint(point.contents, point.path)
    return point


# The first of these that exists (docs/RESUME.md):
# 1. --resume FILE, unless the run in this folder has started from FILE before: the same command then resumes the run.
# 2. The newest readable checkpoint in the folder (CheckpointFolder.newest), with TRAIN.AUTO_RESUME.
# 3. --resume FILE.
# 4. None: pretrained weights or random ones.
def _choose_checkpoint(config: CfgNode, run_dir: RunDir, checkpoints: CheckpointFolder) -> ResumePoint | None:
    requested = config.MODEL.RESUME
    if requested and requested not in (launch.get("resumed_from") for launch in run_dir.launches()):
        return _read(requested)
    if config.TRAIN.AUTO_RESUME and (newest := checkpoints.newest()):
        return ResumePoint(str(newest[0]), newest[1])
    return _read(requested) if requested else None


def _read(path: str) -> ResumePoint:
    return ResumePoint(path, read_checkpoint(resolve_weights(path)))


def check_resume_data(
    config: CfgNode, dist_info: DistInfo, data: Data, point: ResumePoint | None, allow_config_change: bool
) -> TrainDataInfo:
    """Describes the training data of this run. A resumed run keeps its global batch size.

    Raises:
        UserError: the checkpoint is of a run with another configuration, other data or another global batch size, and
            that was not allowed or cannot be.
    """
    images_per_micro_step = config.DATA.BATCH_SIZE * dist_info.world_size
    current = TrainDataInfo(
        num_images=len(data.train_images),
        dataset_digest=dataset_digest(data.train_images),
        global_batch_size=images_per_micro_step * config.TRAIN.ACCUMULATION_STEPS,
    )
    if point is None:
        return current
    saved_config = parse(point.contents["config"], point.path)
    saved = TrainDataInfo(**point.contents["train_data"]) if "train_data" in point.contents else current
    _check_config(point.path, saved_config, config, allow_config_change)
    check_same_class_names(point.path, point.contents.get("class_names"), data.class_names)
    _check_images(point.path, saved, current, allow_config_change)
    same = all(saved_config[section][key] == config[section][key] for section, key in _BATCH_KEYS)
    if same and saved.global_batch_size != current.global_batch_size:
        if saved.global_batch_size % images_per_micro_step == 0:
            log.info(
                "%d process(es): %d accumulation steps keep the global batch size of %d images",
                dist_info.world_size,
                saved.global_batch_size // images_per_micro_step,
                saved.global_batch_size,
            )
            current = replace(current, global_batch_size=saved.global_batch_size)
    _check_global_batch_size(point, saved, current, config, dist_info, allow_config_change)
    _log_learning_rate_change(point, saved_config, saved, config, current)
    return current


def saved_global_batch_size(point: ResumePoint | None) -> int | None:
    """Returns the global batch size of the last step of a resumed run; None for a new run."""
    return None if point is None else point.contents.get("train_data", {}).get("global_batch_size")


def resume_or_init(
    config: CfgNode,
    dist_info: DistInfo,
    components: TrainComponents,
    class_names: list[str] | None,
    point: ResumePoint | None,
) -> TrainState:
    """Loads the checkpoint to resume from, else pretrained weights, else keeps the random ones.

    Raises:
        UserError: the weights do not fit the model.
    """
    state = TrainState()
    if point is not None:
        if config.MODEL.PRETRAINED:
            log.info("--pretrained %s is not read: the run has begun already", config.MODEL.PRETRAINED)
        try:
            components.load_state_dict(point.contents)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{point.path}: does not fit this model or optimizer ({str(error)[:500]}). Resume with the "
                "configuration that wrote it, or start a new run from its weights with --pretrained"
            ) from error
        state.load_state_dict(point.contents["state"])
        log.info("resumed from %s, after %s images", point.path, f"{state.images_seen:,}")
    elif config.MODEL.PRETRAINED:
        source = config.MODEL.PRETRAINED
        contents = read_pretrained(source, dist_info)
        task = components.module_without_ddp
        load_pretrained(contents, source, task, class_names, config.MODEL.PRETRAINED_EMA)
        if components.ema is not None:
            components.ema.set(components.module_without_ddp)
    return state


def _check_config(path: str, saved: CfgNode, current: CfgNode, allow_config_change: bool) -> None:
    """Compares two configurations, except for accumulation steps: the global batch size is compared by itself."""
    changed = [change for change in differences(saved, current) if change[0] != "TRAIN.ACCUMULATION_STEPS"]
    lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
    if changed and not allow_config_change:
        raise UserError(
            f"{path} is of a run with another configuration:{lines}\nGive this run a name of its own with --tag, or "
            "resume that one with these changes with --allow-config-change"
        )
    if changed:
        log.warning("resuming with another configuration:%s", lines)


def _check_images(path: str, saved: TrainDataInfo, current: TrainDataInfo, allow_config_change: bool) -> None:
    """Images that were added, removed or renamed change the order from the first image on."""
    if saved.dataset_digest == current.dataset_digest:
        return
    change = f"{saved.num_images:,} training images there, {current.num_images:,} now"
    if saved.num_images == current.num_images:
        change = f"{current.num_images:,} training images as before, but not with the same names and labels"
    if not allow_config_change:
        raise UserError(
            f"{path} is of a run on other data (DATA.DATA_PATH): {change}, so that their order would be another. Put "
            f"the data back as they were, begin a new run from these weights with --tag NAME --pretrained {path}, or "
            "go on with the data as they are now with --allow-config-change"
        )
    log.warning("resuming with other data: %s", change)


def _check_global_batch_size(
    point: ResumePoint,
    saved: TrainDataInfo,
    current: TrainDataInfo,
    config: CfgNode,
    dist_info: DistInfo,
    allow_config_change: bool,
) -> None:
    advice = suggest_batch_flags(saved.global_batch_size, config.DATA.BATCH_SIZE, dist_info.world_size)
    if saved.global_batch_size != current.global_batch_size and not allow_config_change:
        raise UserError(
            f"{point.path} is of a run with {saved.global_batch_size} images a step, and this start has "
            f"{current.global_batch_size} (batch size {config.DATA.BATCH_SIZE} x {dist_info.world_size} process(es) x "
            f"accumulation steps {config.TRAIN.ACCUMULATION_STEPS}). {advice}"
        )
    images_seen = point.contents["state"]["images_seen"]
    if images_seen % current.global_batch_size:
        raise UserError(
            f"{point.path}: the run has seen {images_seen:,} images, which is no whole number of steps at "
            f"{current.global_batch_size} images each (batch size x processes x accumulation steps). {advice}"
        )


def _log_learning_rate_change(
    point: ResumePoint, saved_config: CfgNode, saved: TrainDataInfo, config: CfgNode, current: TrainDataInfo
) -> None:
    """Logs the learning rate of the next step before and after a change, such as of the number of epochs."""
    images_seen = point.contents["state"]["images_seen"]
    before, after = (
        build_schedule(each, data.num_images, data.global_batch_size).at(images_seen // data.global_batch_size)
        for each, data in ((saved_config, saved), (config, current))
    )
    if not math.isclose(before, after, rel_tol=1e-6):
        factor = after / before if before > 0 else math.inf
        log.warning(
            "with these changes the learning rate of the next step is %.3g instead of %.3g (times %s)",
            after,
            before,
            f"{factor:.3g}" if factor < 1000 else f"{factor:,.0f}",
        )


def suggest_batch_flags(global_batch_size: int, batch_size: int, world_size: int) -> str:
    """Suggests flags that keep the global batch size, or the numbers of processes that allow it."""
    if global_batch_size % world_size:
        possible = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        fewer = max(n for n in possible if n < world_size)
        more = min((n for n in possible if n > world_size), default=0)
        return (
            f"{global_batch_size} images cannot be shared evenly by {world_size} processes: start {fewer}"
            f"{f' or {more}' if more else ''} of them, or change the number of images with --allow-config-change"
        )
    per_rank = global_batch_size // world_size
    if per_rank % batch_size == 0:
        return f"To keep the global batch size: --accumulation-steps {per_rank // batch_size}"
    sizes = [size for size in range(1, batch_size + 1) if per_rank % size == 0]
    size = max(sizes, key=lambda size: (size % 2 == 0, size))  # an even one if possible: Mixup pairs images
    return (
        f"To keep the global batch size: --batch-size {size} --accumulation-steps {per_rank // size} (with "
        "--allow-config-change, since Mixup then pairs other images)"
    )
