"""What main.py can be asked to do with a configuration: train, evaluate, measure throughput. Each builds what it needs
in the order in which things happen, and knows nothing of the command line.
"""

import inspect
import itertools
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

import engine
from config import differences, dump, get_config
from data.build import TrainBatches, build_datasets, model_inputs, val_batches
from data.loader import worker_death_named
from engine import Learner, TrainState
from lr_scheduler import build_schedule
from models import build_model
from models.build import input_channels
from models.count import count_macs, count_parameters
from models.weights import load_weights
from objectives import Classification
from optimizer import build_optimizer
from utils import logger
from utils.checkpoint import CheckpointFolder, read_checkpoint, weights_in
from utils.dist import Process, broadcast_from_main, first_on_node
from utils.errors import TrainingDiverged, UserError
from utils.pictures import caption_of, captioned_grid
from utils.precision import choose_amp_dtype, describe
from utils.preemption import StopRequest
from utils.progress import Progress, memory_gib
from utils.records import Records
from utils.reporter import Reporter
from utils.run_folder import RunFolder, hardware
from utils.seed import seed_cpu

log = logging.getLogger(__name__)


# Training ------------------------------------------------------------------------------------------------------------


def train(config: CfgNode, process: Process, accept_changes: bool = False) -> None:
    """Trains from where the run in its folder stands to its last epoch, and says where the results are.

    Raises:
        UserError: anything the user can mend, in data, files or configuration.
        TrainingDiverged: the numbers stopped being finite.
    """
    # The folder first: whether this run may write there is known before anything slow happens.
    folder = RunFolder(Path(config.OUTPUT, config.MODEL.NAME, config.TAG))
    checkpoints = CheckpointFolder(folder.checkpoints, config.SAVE_KEEP)
    with folder.claim() if process.is_main else nullcontext():
        if process.is_main:
            open_run_folder(folder, checkpoints, config, process, accept_changes)
        train_in(folder, checkpoints, config, process)


def train_in(folder: RunFolder, checkpoints: CheckpointFolder, config: CfgNode, process: Process) -> None:
    """`train`, in a folder that is this run's own."""
    # Data, and with them the number of classes and the length of everything.
    data = build_datasets(config, process)
    epoch_samples = len(data.train)
    global_batch = config.DATA.BATCH_SIZE * process.world_size * config.TRAIN.ACCUMULATION_STEPS
    schedule = build_schedule(config, epoch_samples, global_batch)
    total_samples = schedule.total_updates * global_batch

    # The model and what trains it, then the place where this run begins.
    learner = build_learner(config, process, data.num_classes)
    state = TrainState()
    begin(config, process, checkpoints, learner, state, data.class_names)
    if state.samples >= total_samples:
        log.info("this run is complete: all %d epochs are done", config.TRAIN.EPOCHS)
        say_results(config, folder, checkpoints, state)
        return
    prepare_for_speed(config, process, learner)

    batches = TrainBatches(config, data, process, start_samples=state.samples, stop_samples=total_samples)
    val = val_batches(config, data, process)
    stream, reporter = iter(batches), None
    if process.is_main:
        folder.note_start({"samples": state.samples, "processes": process.world_size, "device": str(process.device)})
        reporter = open_reporter(folder, process, state, global_batch, total_samples, epoch_samples)
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
                if saving and reporter:
                    numbered = epoch_ended and (epoch % config.SAVE_FREQ == 0 or epoch == config.TRAIN.EPOCHS)
                    contents = checkpoint_contents(config, learner, state, data.class_names)
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


def open_run_folder(
    folder: RunFolder, checkpoints: CheckpointFolder, config: CfgNode, process: Process, accept_changes: bool
) -> None:
    """Makes sure that what is in the folder belongs to the same configuration, and begins to log into it."""
    logger.add_file(folder.log_file)
    checkpoints.prepare()
    # A start that failed before its first checkpoint leaves nothing to mix up with.
    if folder.config_file.exists() and checkpoints.last.exists():
        changed = differences(get_config(str(folder.config_file)), config)
        lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
        if changed and not accept_changes:
            raise UserError(
                f"{folder.path} holds a run with another configuration:{lines}\nGive this run a name of its own with "
                "--tag, or continue that one with these changes with --accept-changes"
            )
        if changed:
            log.warning("continuing with another configuration:%s", lines)
    if not config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME and checkpoints.last.exists():
        raise UserError(
            f"{folder.path} holds a run, and TRAIN.AUTO_RESUME is off. Give this run a name of its own with --tag, or "
            "name the checkpoint to continue from with --resume"
        )
    folder.write_config(dump(config))
    log.info("run folder %s", folder.path)


def build_learner(config: CfgNode, process: Process, num_classes: int) -> Learner:
    """The model with random weights, its objective and its optimizer, on this process's device."""
    seed_cpu(config.SEED)
    model = build_model(config, num_classes).to(process.device)
    objective = Classification(model, config.MODEL.LABEL_SMOOTHING)
    amp_dtype = choose_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, process.device)
    log.info(
        "%s: %.1f M parameters, %.2f G multiply-adds an image; %d process(es) on %s, %s",
        config.MODEL.NAME,
        count_parameters(model) / 1e6,
        count_macs(model, config.DATA.IMG_SIZE, input_channels(config)) / 1e9,
        process.world_size,
        hardware(),
        describe(amp_dtype),
    )
    return Learner(
        objective,
        build_optimizer(config, model),
        torch.amp.GradScaler(process.device.type, enabled=amp_dtype is torch.float16),
        process.device,
        amp_dtype,
        accumulation=config.TRAIN.ACCUMULATION_STEPS,
        clip_grad=config.TRAIN.CLIP_GRAD,
        max_bad_steps=config.TRAIN.MAX_BAD_STEPS,
        seed=config.SEED,
        ema=ModelEmaV3(objective, decay=config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY > 0 else None,
    )


def begin(
    config: CfgNode,
    process: Process,
    checkpoints: CheckpointFolder,
    learner: Learner,
    state: TrainState,
    class_names: list[str] | None,
) -> None:
    """Puts the run where it begins: an explicit checkpoint, else what lies in its folder, else pretrained weights."""
    # Rank 0 chooses, so that all processes continue from the same file.
    source = config.MODEL.RESUME
    if process.is_main and not source and config.TRAIN.AUTO_RESUME:
        found = checkpoints.newest()
        source = str(found[0]) if found else ""
    source = broadcast_from_main(source)
    if source:
        with first_on_node(process):
            saved = read_checkpoint(source, progress=process.is_main)
        if "state" not in saved or "optimizer" not in saved:
            raise UserError(
                f"{source}: holds weights, but no run to continue. Start a new run from them with --pretrained"
            )
        refuse_other_classes(source, saved.get("class_names"), class_names)
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


def prepare_for_speed(config: CfgNode, process: Process, learner: Learner) -> None:
    """Compiles the model and wraps the objective for several processes. Names of parameters stay as they are."""
    if config.TRAIN.COMPILE:
        learner.bare.model.compile()
    if process.world_size > 1:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        # The buffers (masks, indices) are the same everywhere and never change; torch 2.14 renamed the option.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        learner.objective = DistributedDataParallel(
            learner.objective, device_ids=device_ids, gradient_as_bucket_view=True, **{sync: False}
        )


def open_reporter(
    folder: RunFolder, process: Process, state: TrainState, global_batch: int, total_samples: int, epoch_samples: int
) -> Reporter:
    records = Records(folder.path, folder.tensorboard, state.samples // global_batch, state.samples)
    records.add_text("config", folder.config_file.read_text())
    return Reporter(records, Progress(total_samples, state.samples, epoch_samples), process.device, state.samples)


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
    figures = engine.evaluate(learner, learner.bare, val)
    figures = {"val_loss": figures.pop("loss"), **figures}
    if learner.ema is not None:
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
        folder.log_file,
        folder.tensorboard,
        f"python main.py --cfg {folder.config_file} --eval --resume {checkpoints.best}",
    )


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(config: CfgNode, process: Process) -> None:
    """Evaluates the weights of MODEL.RESUME or MODEL.PRETRAINED on the validation images; writes nothing.

    Raises:
        UserError: weights that cannot be read, or whose head is not for the classes of the data.
    """
    data = build_datasets(config, process)
    learner = build_learner(config, process, data.num_classes)
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    contents, layout = load_pretrained(source, process, learner.bare.model, data.class_names, evaluating=True)
    val = val_batches(config, data, process, layout)
    learners = {"": contents}
    if contents.get("ema"):
        learners["average of the weights: "] = {"model": contents["ema"]}
    for what, part in learners.items():
        if what:
            load_weights(learner.bare.model, weights_in(part, source), source=source)
        figures = engine.evaluate(learner, learner.bare, val)
        if figures["images"] == 0:
            raise UserError(f"DATA.DATA_PATH {config.DATA.DATA_PATH}: no validation image could be read")
        log.info(
            "%s%d images: top-1 %.3f %%  top-5 %.3f %%  loss %.4f",
            what, figures["images"], figures["acc1"], figures["acc5"], figures["loss"],
        )  # fmt: skip


def load_pretrained(
    source: str, process: Process, model: torch.nn.Module, class_names: list[str] | None, evaluating: bool = False
) -> tuple[dict, str]:
    """Loads weights into `model`, says what became of each, and returns all that the file holds, and its layout."""
    with first_on_node(process):
        contents = read_checkpoint(source, progress=process.is_main)
    weights, theirs = weights_in(contents, source), contents.get("class_names")
    if evaluating:
        refuse_other_classes(source, theirs, class_names)
    elif theirs and class_names and theirs != class_names:
        # As many classes, perhaps, but not the same: the head would mean nothing.
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    report = load_weights(model, weights, class_names, source)
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


# Throughput ----------------------------------------------------------------------------------------------------------


def throughput(config: CfgNode, process: Process) -> None:
    """Measures images/s of inference and of training on random images, without reading any data."""
    size, channels, batch_size = config.DATA.IMG_SIZE, input_channels(config), config.DATA.BATCH_SIZE
    num_classes = config.MODEL.NUM_CLASSES or 1000
    learner = build_learner(config, process, num_classes)
    prepare_for_speed(config, process, learner)
    batch = {
        "image": torch.randn(batch_size, channels, size, size, device=process.device),
        "target": torch.rand(batch_size, num_classes, device=process.device).softmax(1),
        "position": 0,
    }

    @torch.inference_mode()
    def infer() -> None:
        with learner.autocast():
            learner.bare.model(batch["image"])

    learner.bare.eval()
    say_throughput("inference", engine.measure(infer, batch_size, process.device), learner, batch_size)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    global_batch = batch_size * config.TRAIN.ACCUMULATION_STEPS
    updates = engine.train(learner, itertools.repeat(batch), TrainState(), lambda update: 1e-6, global_batch)
    rate = engine.measure(lambda: next(updates), global_batch, process.device)
    say_throughput("training", rate, learner, batch_size)


def say_throughput(what: str, rate: float, learner: Learner, batch_size: int) -> None:
    log.info(
        "%-9s  %8.1f images/s per process  %s  batch %d  peak memory %.2f GiB  %s",
        what, rate, describe(learner.amp_dtype), batch_size, memory_gib(learner.device), hardware(),
    )  # fmt: skip
