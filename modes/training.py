"""Training, from wherever the run in its folder stands to its last epoch."""

import itertools
import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from yacs.config import CfgNode

import engine
from config import differences, dump, get_config, parse
from data.build import TrainBatches, build_datasets, model_inputs, val_batches
from data.loader import worker_death_named
from engine import Learner, TrainState
from lr_scheduler import build_schedule
from modes.learner import build_learner, is_split, load_pretrained, prepare_for_speed, refuse_other_classes
from utils import logger
from utils.checkpoint import CheckpointFolder, read_checkpoint
from utils.dist import Process, broadcast_from_main, first_on_node
from utils.errors import TrainingDiverged, UserError
from utils.logger import FILE_ONLY
from utils.pictures import caption_of, captioned_grid
from utils.preemption import StopRequest
from utils.progress import Progress
from utils.records import Records
from utils.reporter import Reporter
from utils.run_folder import RunFolder
from utils.sharding import together

log = logging.getLogger(__name__)


def train(config: CfgNode, process: Process, accept_changes: bool = False) -> None:
    """Trains from where the run in its folder stands to its last epoch, and says where the results are.

    Raises:
        UserError: anything the user can mend, in data, files or configuration.
        TrainingDiverged: the numbers stopped being finite.
    """
    # The folder first: whether this run may write there is known before anything slow happens.
    folder = RunFolder(Path(config.OUTPUT, config.MODEL.NAME, config.TAG))
    checkpoints = CheckpointFolder(folder.checkpoints, config.SAVE_KEEP)
    with ExitStack() as stack:
        refusal = None
        if process.is_main:
            try:
                stack.enter_context(folder.claim())
                open_run_folder(folder, checkpoints, config)
            except UserError as error:
                refusal = str(error)
        if refusal := broadcast_from_main(refusal):  # all leave alike, instead of waiting for one that has gone
            raise UserError(refusal)
        try:
            train_in(folder, checkpoints, config, process, accept_changes)
        except (UserError, KeyboardInterrupt) as error:  # said on the terminal by main.py
            log.error("%s", error or "interrupted", extra=FILE_ONLY)
            raise


def train_in(
    folder: RunFolder, checkpoints: CheckpointFolder, config: CfgNode, process: Process, accept_changes: bool
) -> None:
    """`train`, in a folder that is this run's own."""
    # Data, and with them the number of classes and the length of everything.
    data = build_datasets(config, process)
    epoch_samples = len(data.train)
    global_batch = config.DATA.BATCH_SIZE * process.world_size * config.TRAIN.ACCUMULATION_STEPS
    schedule = build_schedule(config, epoch_samples, global_batch)
    total_samples = schedule.total_updates * global_batch

    # The model and what trains it, then the place where this run begins.
    learner = build_learner(config, process, data.num_classes)
    log.info(
        "%s training images of %d classes; %d images an update, %s updates, learning rate up to %.3g",
        f"{epoch_samples:,}", data.num_classes, global_batch, f"{schedule.total_updates:,}", schedule.base_lr,
    )  # fmt: skip
    if global_batch > epoch_samples:
        log.warning("an update takes more images than there are: it ends %.1f epochs", global_batch / epoch_samples)
    state = TrainState()
    begin(config, process, folder, learner, state, data.class_names, checkpoints, accept_changes)
    if state.samples % global_batch:
        raise UserError(
            f"the run stands at {state.samples:,} images, which is no whole number of updates at {global_batch} images "
            "each (batch size x processes x accumulation steps). Continue with the number it had, see starts.jsonl"
        )
    if state.samples >= total_samples:
        log.info("this run is complete: all %d epochs are done", config.TRAIN.EPOCHS)
        say_results(config, folder, checkpoints, state)
        return
    prepare_for_speed(config, process, learner)

    batches = TrainBatches(config, data, process, start_samples=state.samples, stop_samples=total_samples)
    val = val_batches(config, data, process)
    stream, reporter = iter(batches), None
    if process.is_main:
        folder.write_config(dump(config))
        folder.note_start(
            {
                "samples": state.samples,
                "global_batch": global_batch,
                "processes": process.world_size,
                "device": str(process.device),
            }
        )
        progress = Progress(total_samples, state.samples, config.TRAIN.EPOCHS, epoch_samples)
        reporter = open_reporter(folder, process, state, global_batch, progress)
        if state.samples == 0:
            stream = show_first_batch(reporter.records, config, stream, data.class_names)

    stop = StopRequest()
    try:
        with worker_death_named(config.DATA.NUM_WORKERS):
            for account in engine.train(learner, stream, state, schedule.at, global_batch):
                update, epoch = state.samples // global_batch, min(state.samples // epoch_samples, config.TRAIN.EPOCHS)
                epoch_ended = epoch > (state.samples - global_batch) // epoch_samples
                stopping = stop.agreed()
                saving = epoch_ended or stopping or (config.SAVE_STEPS > 0 and update % config.SAVE_STEPS == 0)
                if saving or update % config.PRINT_FREQ == 0:
                    taken = account.settle()
                    if reporter:
                        settings = {"lr": schedule.at(update - 1)} | optimizer_settings(config, learner)
                        reporter.updates(update, state.samples, batches.wait_seconds, taken, settings)
                improved = False
                if epoch_ended:
                    figures = {"train_loss": state.end_epoch()} | evaluate_all(learner, val)
                    improved = state.improve(max(figures["acc1"], figures.get("ema_acc1", 0.0)))
                    if reporter:
                        figures |= {"lr": schedule.at(update - 1), "skipped": state.skipped, "best": state.best}
                        reporter.epoch(epoch, update, state.samples, figures)
                if saving and (reporter or is_split(config, process)):
                    numbered = epoch_ended and (epoch % config.SAVE_FREQ == 0 or epoch == config.TRAIN.EPOCHS)
                    contents = checkpoint_contents(config, learner, state, data.class_names)
                    if reporter:
                        checkpoints.save(contents, epoch=epoch if numbered else None, best=improved)
                        reporter.resume_clock(state.samples, batches.wait_seconds)
                if stopping and state.samples < total_samples:
                    log.info("asked to stop: saved after %s images; the same command continues", f"{state.samples:,}")
                    return
    except TrainingDiverged as error:
        last = f"The last good checkpoint is {checkpoints.last}" if checkpoints.last.exists() else "None was saved yet"
        raise TrainingDiverged(f"{error}. {last}") from error
    finally:
        stop.close()
        if reporter:
            reporter.close()
    say_results(config, folder, checkpoints, state)


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


def begin(
    config: CfgNode,
    process: Process,
    folder: RunFolder,
    learner: Learner,
    state: TrainState,
    class_names: list[str] | None,
    checkpoints: CheckpointFolder,
    accept_changes: bool,
) -> None:
    """Puts the run where it begins: an explicit checkpoint, else what lies in its folder, else pretrained weights."""
    # Rank 0 chooses, so that all processes continue from the same file.
    source = broadcast_from_main(checkpoint_to_continue(config, folder, checkpoints) if process.is_main else None)
    if source:
        with first_on_node(process):
            saved = read_checkpoint(source, progress=process.is_main)
        if "state" not in saved or "optimizer" not in saved:
            raise UserError(
                f"{source}: holds weights, but no run to continue. Start a new run from them with --pretrained"
            )
        refuse_other_config(source, saved["config"], config, accept_changes)
        refuse_other_classes(source, saved.get("class_names"), class_names)
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


def checkpoint_to_continue(config: CfgNode, folder: RunFolder, checkpoints: CheckpointFolder) -> str:
    """`--resume FILE`, else the newest in the folder, else "".

    A run that began from FILE goes on from its own checkpoints when it is started again with the same command.
    """
    asked = config.MODEL.RESUME
    began = get_config(str(folder.config_file)).MODEL.RESUME if folder.config_file.exists() else ""
    if asked and asked != began:
        return asked
    found = checkpoints.newest() if config.TRAIN.AUTO_RESUME else None
    return str(found[0]) if found else asked


def refuse_other_config(source: str, saved: str, config: CfgNode, accept_changes: bool) -> None:
    """Compares the configuration `saved` in the checkpoint `source` with this one.

    Raises:
        UserError: they would compute something different, and that was not accepted.
    """
    changed = differences(parse(saved, source), config)
    lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
    if changed and not accept_changes:
        raise UserError(
            f"{source} is of a run with another configuration:{lines}\nGive this run a name of its own with --tag, or "
            "continue that one with these changes with --accept-changes"
        )
    if changed:
        log.warning("continuing with another configuration:%s", lines)


def open_reporter(
    folder: RunFolder, process: Process, state: TrainState, global_batch: int, progress: Progress
) -> Reporter:
    records = Records(folder.path, folder.tensorboard, state.samples // global_batch, state.samples)
    records.add_text("config", folder.config_file.read_text())
    return Reporter(records, progress, process.device, state.samples)


def show_first_batch(
    records: Records, config: CfgNode, stream: Iterator[dict], class_names: list[str] | None
) -> Iterator[dict]:
    """Draws the first batch as the network gets it, and gives the stream back whole."""
    first = next(stream)
    inputs = model_inputs(config)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (inputs.mean, inputs.std))
    images = first["image"][:32].cpu() * std + mean
    captions = [caption_of(target, class_names) for target in first["target"][:32].cpu()]
    records.add_picture("first_batch", captioned_grid(images, captions))
    return itertools.chain([first], stream)


def optimizer_settings(config: CfgNode, learner: Learner) -> dict[str, float]:
    scale = {"loss_scale": learner.scaler.get_scale()} if learner.scaler.is_enabled() else {}
    return {"weight_decay": config.TRAIN.WEIGHT_DECAY} | scale


def evaluate_all(learner: Learner, val) -> dict[str, float]:
    """Metrics of the model, and with the prefix `ema_` those of its average. A collective call."""
    with together(learner.bare):
        figures = engine.evaluate(learner, learner.bare, val)
    figures = {"val_loss": figures.pop("loss"), **figures}
    if learner.ema is not None:
        with together(learner.ema.module):
            averaged = engine.evaluate(learner, learner.ema.module, val)
        figures |= {f"ema_{name}": averaged[name] for name in ("acc1", "acc5")}
    return figures


def checkpoint_contents(config: CfgNode, learner: Learner, state: TrainState, class_names: list[str] | None) -> dict:
    """What a checkpoint holds; see docs/FORMATS.md."""
    run = {"format": 1, "state": state.state_dict(), "class_names": class_names, "config": dump(config)}
    return learner.state_dict() | run


def say_results(config: CfgNode, folder: RunFolder, checkpoints: CheckpointFolder, state: TrainState) -> None:
    log.info(
        "best top-1 %.2f %%\n  log           less %s\n  TensorBoard   tensorboard --logdir %s\n  best weights  %s",
        state.best,
        shlex.quote(str(folder.log_file)),
        shlex.quote(str(folder.tensorboard)),
        shlex.join(
            ["python", "main.py", "--cfg", str(folder.config_file), "--eval", "--resume", str(checkpoints.best)]
        ),
    )
