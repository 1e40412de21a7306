"""Training, from wherever the run in its folder stands to its last epoch."""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from yacs.config import CfgNode

import engine
from config import dump
from data.build import Data, TrainBatches, ValBatches, build_datasets, model_inputs, val_batches
from data.loader import worker_death_named
from engine import Learner, TrainState
from lr_scheduler import Schedule, build_schedule
from modes.beginning import Stream, begin, find_beginning, open_run_folder, open_stream
from modes.learner import build_learner, prepare_for_speed
from utils.checkpoint import CheckpointFolder, not_finite
from utils.dist import Process, broadcast_from_main
from utils.errors import TrainingDiverged, UserError
from utils.logger import FILE_ONLY
from utils.pictures import caption_of, captioned_grid
from utils.preemption import StopRequest
from utils.progress import Progress
from utils.records import Records
from utils.reporter import Reporter
from utils.run_folder import RunFolder
from utils.saver import Saver
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
    with ExitStack() as stack:
        stop = stack.enter_context(closing(StopRequest(config.TIMEOUT)))  # first: a signal may come at any time

        # Data and the place where this run begins, and with them the number of classes and the length of everything.
        data = build_datasets(config, process)
        source, saved = find_beginning(config, process, folder, checkpoints)
        stream = open_stream(config, process, data, source, saved, accept_changes)
        schedule = build_schedule(config, stream.images, stream.global_batch)

        # The model and what trains it.
        learner = build_learner(config, process, data.num_classes)
        learner.accumulation = stream.global_batch // (config.DATA.BATCH_SIZE * process.world_size)
        log.info(
            "%s training images of %d classes; %d images an update, %s updates, learning rate up to %.3g",
            f"{stream.images:,}", data.num_classes, stream.global_batch, f"{schedule.total_updates:,}",
            schedule.base_lr,
        )  # fmt: skip
        if stream.global_batch > stream.images:
            log.warning(
                "an update takes more images than there are: it ends %.1f epochs", stream.global_batch / stream.images
            )
        state = begin(config, process, learner, data.class_names, source, saved)
        del saved  # as large as all that is trained
        run = Run(config, process, folder, data, stream, schedule, learner, state)
        if run.complete:
            log.info("this run is complete: all %d epochs are done", config.TRAIN.EPOCHS)
        elif stop.agreed_now():
            log.info("asked to stop: nothing was done yet; the same command continues")
            return
        else:
            prepare_for_speed(config, process, learner)
            saver = stack.enter_context(closing(Saver(checkpoints))) if process.is_main else None
            try:
                if not run.to_the_end(stop, saver):
                    return
            except TrainingDiverged as error:
                last = f"The last good checkpoint is {checkpoints.last}" if checkpoints.last.exists() else "None yet"
                raise TrainingDiverged(f"{error}. {last}") from error
        say_results(config, folder, checkpoints, state)


class Run:
    """The updates, evaluations and saves of one start of a run, beginning at `state`."""

    def __init__(
        self,
        config: CfgNode,
        process: Process,
        folder: RunFolder,
        data: Data,
        stream: Stream,
        schedule: Schedule,
        learner: Learner,
        state: TrainState,
    ):
        self.config = config
        self.process = process
        self.folder = folder
        self.data = data
        self.stream = stream
        self.schedule = schedule
        self.learner = learner
        self.state = state
        self.total_samples = schedule.total_updates * stream.global_batch

    @property
    def update(self) -> int:
        """How many updates were made so far."""
        return self.state.samples // self.stream.global_batch

    @property
    def epoch(self) -> int:
        """How many epochs were completed so far."""
        return min(self.state.samples // self.stream.images, self.config.TRAIN.EPOCHS)

    @property
    def epoch_ended(self) -> bool:
        """Whether the last update completed an epoch."""
        return self.epoch > (self.state.samples - self.stream.global_batch) // self.stream.images

    @property
    def unevaluated(self) -> bool:
        """Whether an epoch is complete but for its evaluation."""
        return self.epoch_ended and self.state.epoch_sums["updates"] > 0

    @property
    def complete(self) -> bool:
        return self.state.samples >= self.total_samples and not self.unevaluated

    def to_the_end(self, stop: StopRequest, saver: Saver | None) -> bool:
        """Trains to the last epoch; False when asked to stop before. All is saved when it returns.

        Raises:
            UserError: the last state could not be saved; and all that `train` raises.
        """
        batches = TrainBatches(self.config, self.data, self.process, self.state.samples, self.total_samples)
        val = val_batches(self.config, self.data, self.process)
        reporter, stream = None, iter(batches)
        if self.process.is_main:
            reporter = self._open_reporter()
            if self.state.samples == 0:
                stream = show_first_batch(reporter.records, self.config, stream, self.data.class_names)
        try:
            with worker_death_named(self.config.DATA.NUM_WORKERS):
                done = self._loop(stop, saver, reporter, batches, stream, val)
        finally:
            if reporter:
                reporter.close()
        self._finish_saving(saver)
        return done

    def _loop(self, stop, saver, reporter, batches: TrainBatches, stream: Iterator[dict], val: ValBatches) -> bool:
        """The updates from here on, and what is done between them."""
        freq, state = self.config, self.state
        if self.unevaluated and not self._end_epoch(stop, saver, reporter, val):
            return self._say_stopped()
        for account in engine.train(self.learner, stream, state, self.schedule.at, self.stream.global_batch):
            stopping = stop.agreed()
            saving = self.epoch_ended or stopping or (freq.SAVE_STEPS > 0 and self.update % freq.SAVE_STEPS == 0)
            if saving or self.update % freq.PRINT_FREQ == 0:
                taken = account.settle()
                if reporter:
                    settings = {"lr": self.schedule.at(self.update - 1)} | optimizer_settings(self.config, self.learner)
                    reporter.updates(self.update, state.samples, batches.wait_seconds, taken, settings)
            if saving:
                # Before an epoch's evaluation too, so that whatever ends the run there loses the evaluation alone.
                self._save(saver)
            if stopping or (self.epoch_ended and not self._end_epoch(stop, saver, reporter, val)):
                return self._say_stopped()
            if saving and reporter:
                reporter.resume_clock(state.samples, batches.wait_seconds)
        return True

    def _end_epoch(self, stop: StopRequest, saver: Saver | None, reporter: Reporter | None, val: ValBatches) -> bool:
        """Evaluates, reports and saves the complete epoch; False, having changed nothing, when asked to stop."""
        most = broadcast_from_main(len(val))
        measured = evaluate_all(self.learner, lambda: stop.until_asked(val, most))
        if stop.agreed_now():
            return False
        state, epoch = self.state, self.epoch
        figures = {"train_loss": state.end_epoch()} | measured
        improved = state.improve(max(figures["acc1"], figures.get("ema_acc1", 0.0)))
        if reporter:
            figures |= {"lr": self.schedule.at(self.update - 1), "skipped": state.skipped, "best": state.best}
            reporter.epoch(epoch, self.update, state.samples, figures)
        numbered = epoch % self.config.SAVE_FREQ == 0 or epoch == self.config.TRAIN.EPOCHS
        self._save(saver, epoch if numbered else None, improved)
        return True

    def _save(self, saver: Saver | None, epoch: int | None = None, best: bool = False) -> None:
        """Saves in the background; see docs/FORMATS.md for the contents. A collective call.

        Raises:
            TrainingDiverged: not all numbers are finite; on all processes alike.
        """
        contents = {
            **self.learner.state_dict(),
            "format": 1,
            "state": self.state.state_dict(),
            "stream": self.stream.state_dict(),
            "class_names": self.data.class_names,
            "config": dump(self.config),
        }
        if broken := broadcast_from_main(not_finite(contents)):
            raise TrainingDiverged(f"{broken} is not finite: not saved")
        if saver:
            saver.save(contents, epoch, best)

    def _finish_saving(self, saver: Saver | None) -> None:
        """All processes leave alike: with an error where the last state is not on the disk."""
        refusal = None
        if saver:
            try:
                saver.finish()
            except UserError as error:
                refusal = str(error)
        if refusal := broadcast_from_main(refusal):
            raise UserError(refusal)

    def _say_stopped(self) -> bool:
        log.info("asked to stop: saved after %s images; the same command continues", f"{self.state.samples:,}")
        return False

    def _open_reporter(self) -> Reporter:
        self.folder.write_config(dump(self.config))
        details = {"samples": self.state.samples, "global_batch": self.stream.global_batch}
        self.folder.note_start(details | {"processes": self.process.world_size, "device": str(self.process.device)})
        progress = Progress(self.total_samples, self.state.samples, self.config.TRAIN.EPOCHS, self.stream.images)
        records = Records(self.folder.path, self.folder.tensorboard, self.update, self.state.samples, self.unevaluated)
        records.add_text("config", self.folder.config_file.read_text())
        return Reporter(records, progress, self.process.device, self.state.samples)


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


def evaluate_all(learner: Learner, val: Callable[[], Iterable[dict]]) -> dict[str, float]:
    """Metrics of the model, and with the prefix `ema_` those of its average, each over `val()`. A collective call."""
    with together(learner.bare):
        figures = engine.evaluate(learner, learner.bare, val())
    figures = {"val_loss": figures.pop("loss"), **figures}
    if learner.ema is not None:
        with together(learner.ema.module):
            averaged = engine.evaluate(learner, learner.ema.module, val())
        figures |= {f"ema_{name}": averaged[name] for name in ("acc1", "acc5")}
    return figures


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
