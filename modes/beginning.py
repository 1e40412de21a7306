"""Where a training run begins: its folder, the checkpoint it continues from, and whether it is the same run still."""

import logging
from dataclasses import asdict, dataclass, replace

from yacs.config import CfgNode

from config import differences, get_config, parse
from data.build import Data
from data.datasets import fingerprint
from engine import Learner, TrainState
from modes.learner import load_pretrained, refuse_other_classes
from utils import logger
from utils.checkpoint import CheckpointFolder, read_checkpoint
from utils.dist import Process, broadcast_from_main, first_on_node
from utils.errors import UserError
from utils.run_folder import RunFolder
from utils.saved_run import require_run

log = logging.getLogger(__name__)

# Who changed neither of these means the same run, on however many processes.
_SHARES_OF_AN_UPDATE = (("DATA", "BATCH_SIZE"), ("TRAIN", "ACCUMULATION_STEPS"))


@dataclass(frozen=True)
class Stream:
    """What the clock counts: the training images, and how many of them an update takes."""

    images: int
    fingerprint: str  # of their names and labels, in their order
    global_batch: int  # batch size x processes x accumulation steps

    def state_dict(self) -> dict:
        return asdict(self)


def open_run_folder(folder: RunFolder, checkpoints: CheckpointFolder, config: CfgNode) -> None:
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


def find_beginning(
    config: CfgNode, process: Process, folder: RunFolder, checkpoints: CheckpointFolder
) -> tuple[str, dict | None]:
    """The checkpoint to continue from and its contents; ("", None) for a run that is new.

    Raises:
        UserError: it cannot be read, or holds no run.
    """
    # Rank 0 chooses, so that all processes continue from the same file.
    source = broadcast_from_main(_checkpoint_to_continue(config, folder, checkpoints) if process.is_main else None)
    if not source:
        return "", None
    with first_on_node(process):
        saved = read_checkpoint(source, progress=process.is_main)
    require_run(saved, source)
    return source, saved


def open_stream(
    config: CfgNode, process: Process, data: Data, source: str, saved: dict | None, accept_changes: bool
) -> Stream:
    """The training images of this run, and how many of them an update takes: as many as at its first start.

    Raises:
        UserError: the checkpoint `saved` (called `source`) is of a run with another configuration, other data or
            another global batch, and that was not accepted or cannot be.
    """
    per_turn = config.DATA.BATCH_SIZE * process.world_size
    now = Stream(len(data.train), fingerprint(data.train), per_turn * config.TRAIN.ACCUMULATION_STEPS)
    if saved is None:
        return now
    then = parse(saved["config"], source)
    before = Stream(**saved["stream"]) if "stream" in saved else now
    _refuse_other_config(source, then, config, accept_changes)
    refuse_other_classes(source, saved.get("class_names"), data.class_names)
    _refuse_other_images(source, before, now, accept_changes)
    same = all(then[section][key] == config[section][key] for section, key in _SHARES_OF_AN_UPDATE)
    if same and before.global_batch != now.global_batch and before.global_batch % per_turn == 0:
        log.info(
            "%d process(es): %d accumulation steps hold the %d images an update of this run",
            process.world_size, before.global_batch // per_turn, before.global_batch,
        )  # fmt: skip
        now = replace(now, global_batch=before.global_batch)
    _refuse_other_global_batch(source, before, now, config, process, saved["state"]["samples"], accept_changes)
    return now


def begin(
    config: CfgNode, process: Process, learner: Learner, class_names: list[str] | None, source: str, saved: dict | None
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
            learner.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{source}: does not fit this model or optimizer ({str(error)[:500]}). Continue with the configuration "
                "that wrote it, or start a new run from its weights with --pretrained"
            ) from error
        state.load_state_dict(saved["state"])
        log.info("continuing from %s, after %s images", source, f"{state.samples:,}")
    elif config.MODEL.PRETRAINED:
        load_pretrained(config.MODEL.PRETRAINED, process, learner.bare.model, class_names)
        if learner.ema is not None:
            learner.ema.set(learner.bare)
    return state


def _checkpoint_to_continue(config: CfgNode, folder: RunFolder, checkpoints: CheckpointFolder) -> str:
    """`--resume FILE`, else the newest in the folder, else "".

    A run that began from FILE goes on from its own checkpoints when it is started again with the same command.
    """
    asked = config.MODEL.RESUME
    began = get_config(str(folder.config_file)).MODEL.RESUME if folder.config_file.exists() else ""
    if asked and asked != began:
        return asked
    found = checkpoints.newest() if config.TRAIN.AUTO_RESUME else None
    return str(found[0]) if found else asked


def _refuse_other_config(source: str, then: CfgNode, config: CfgNode, accept_changes: bool) -> None:
    """Compares the configuration in the checkpoint `source` with this one.

    What accumulation is for is the global batch, which is compared by itself: with another number of processes, other
    steps are the same run.
    """
    changed = [change for change in differences(then, config) if change[0] != "TRAIN.ACCUMULATION_STEPS"]
    lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
    if changed and not accept_changes:
        raise UserError(
            f"{source} is of a run with another configuration:{lines}\nGive this run a name of its own with --tag, or "
            "continue that one with these changes with --accept-changes"
        )
    if changed:
        log.warning("continuing with another configuration:%s", lines)


def _refuse_other_images(source: str, before: Stream, now: Stream, accept_changes: bool) -> None:
    """Images that were added, removed or renamed between two starts give another order from the first one on."""
    if before.fingerprint == now.fingerprint:
        return
    what = f"{before.images:,} training images there, {now.images:,} now"
    if before.images == now.images:
        what = f"{now.images:,} training images as before, but not with the same names and labels"
    if not accept_changes:
        raise UserError(
            f"{source} is of a run on other data (DATA.DATA_PATH): {what}, so that their order would be another. Put "
            f"the data back as they were, begin a new run from these weights with --tag NAME --pretrained {source}, or "
            "go on with the data as they are now with --accept-changes"
        )
    log.warning("continuing with other data: %s", what)


def _refuse_other_global_batch(
    source: str, before: Stream, now: Stream, config: CfgNode, process: Process, samples: int, accept_changes: bool
) -> None:
    if before.global_batch != now.global_batch and not accept_changes:
        way_out = how_to_hold(before.global_batch, config.DATA.BATCH_SIZE, process.world_size)
        raise UserError(
            f"{source} is of a run with {before.global_batch} images an update, and this start has {now.global_batch} "
            f"(batch size {config.DATA.BATCH_SIZE} x {process.world_size} process(es) x accumulation steps "
            f"{config.TRAIN.ACCUMULATION_STEPS}). {way_out}"
        )
    if samples % now.global_batch:
        raise UserError(
            f"{source}: the run stands at {samples:,} images, which is no whole number of updates at "
            f"{now.global_batch} images each (batch size x processes x accumulation steps). "
            f"{how_to_hold(before.global_batch, config.DATA.BATCH_SIZE, process.world_size)}"
        )


def how_to_hold(global_batch: int, batch_size: int, processes: int) -> str:
    """What to say to keep `global_batch` images an update with this number of processes; or with which it goes."""
    if global_batch % processes:
        possible = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        fewer, more = max(n for n in possible if n < processes), min((n for n in possible if n > processes), default=0)
        return (
            f"{global_batch} images cannot be shared evenly by {processes} processes: start {fewer}"
            f"{f' or {more}' if more else ''} of them, or change the number of images with --accept-changes"
        )
    share = global_batch // processes
    if share % batch_size == 0:
        return f"To hold the number it had: --accumulation-steps {share // batch_size}"
    sizes = [size for size in range(1, batch_size + 1) if share % size == 0]
    size = max(sizes, key=lambda size: (size % 2 == 0, size))  # an even one where there is one: Mixup pairs images
    return (
        f"To hold the number it had: --batch-size {size} --accumulation-steps {share // size} (with --accept-changes, "
        "since Mixup then pairs other images)"
    )
