"""Training, from wherever the run in its folder stands to its last epoch."""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from yacs.config import CfgNode

from config import dump
from data.build import Data, TrainBatches, ValBatches, build_datasets, model_inputs, val_batches
from data.loader.loader import explain_worker_crash
from engine import train_step
from engine.resume import TrainDataInfo, check_resume_data, load_resume_checkpoint, open_run_folder, resume_or_init
from engine.setup import build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState
from lr_scheduler import Schedule, build_schedule
from utils.checkpoint.async_saver import AsyncCheckpointer
from utils.checkpoint.io import CheckpointFolder, not_finite
from utils.distributed.fsdp import summon_full_params
from utils.distributed.preemption import PreemptionHandler
from utils.distributed.process_group import DistInfo, broadcast_from_main
from utils.errors import TrainingDiverged, UserError
from utils.tracking.image_grid import caption_of, captioned_grid
from utils.tracking.logger import FILE_ONLY
from utils.tracking.metric_writer import MetricWriter
from utils.tracking.progress import Progress
from utils.tracking.run_dir import RunDir
from utils.tracking.train_logger import TrainLogger

log = logging.getLogger(__name__)


def train(config: CfgNode, dist_info: DistInfo, allow_config_change: bool = False) -> None:
    """Trains from where the run in its folder stands to its last epoch, and says where the results are.

    Raises:
        UserError: anything the user can mend, in data, files or configuration.
        TrainingDiverged: the numbers stopped being finite.
    """
    # The folder first: whether this run may write there is known before anything slow happens.
    folder = RunDir(Path(config.OUTPUT, config.MODEL.NAME, config.TAG))
    checkpoints = CheckpointFolder(folder.checkpoints, config.SAVE_KEEP)
    with ExitStack() as stack:
        refusal = None
        if dist_info.is_main:
            try:
                stack.enter_context(folder.lock())
                open_run_folder(folder, checkpoints, config)
            except UserError as error:
                refusal = str(error)
        if refusal := broadcast_from_main(refusal):  # all leave alike, instead of waiting for one that has gone
            raise UserError(refusal)
        try:
            _train_locked(folder, checkpoints, config, dist_info, allow_config_change)
        except (UserError, KeyboardInterrupt) as error:  # said on the terminal by main.py
            log.error("%s", error or "interrupted", extra=FILE_ONLY)
            raise


def _train_locked(
    folder: RunDir, checkpoints: CheckpointFolder, config: CfgNode, dist_info: DistInfo, allow_config_change: bool
) -> None:
    """`train`, in a folder that is this run's own."""
    with ExitStack() as stack:
        stop = stack.enter_context(closing(PreemptionHandler(config.TIMEOUT)))  # first: a signal may come at any time

        # Data and the place where this run begins, and with them the number of classes and the length of everything.
        data = build_datasets(config, dist_info)
        source, saved = load_resume_checkpoint(config, dist_info, folder, checkpoints)
        stream = check_resume_data(config, dist_info, data, source, saved, allow_config_change)
        schedule = build_schedule(config, stream.images, stream.global_batch)

        # The model and what trains it.
        components = build_components(config, dist_info, data.num_classes)
        components.grad_accum_steps = stream.global_batch // (config.DATA.BATCH_SIZE * dist_info.world_size)
        log.info(
            "%s training images of %d classes; %d images an update, %s updates, learning rate up to %.3g",
            f"{stream.images:,}", data.num_classes, stream.global_batch, f"{schedule.total_updates:,}",
            schedule.base_lr,
        )  # fmt: skip
        if stream.global_batch > stream.images:
            log.warning(
                "an update takes more images than there are: it ends %.1f epochs", stream.global_batch / stream.images
            )
        state = resume_or_init(config, dist_info, components, data.class_names, source, saved)
        del saved  # as large as all that is trained
        run = Run(config, dist_info, folder, data, stream, schedule, components, state)
        if run.complete:
            log.info("this run is complete: all %d epochs are done", config.TRAIN.EPOCHS)
        elif stop.should_stop_now():
            log.info("asked to stop: nothing was done yet; the same command continues")
            return
        else:
            compile_and_wrap(config, dist_info, components)
            checkpointer = stack.enter_context(closing(AsyncCheckpointer(checkpoints))) if dist_info.is_main else None
            try:
                if not run.fit(stop, checkpointer):
                    return
            except TrainingDiverged as error:
                last = f"The last good checkpoint is {checkpoints.last}" if checkpoints.last.exists() else "None yet"
                raise TrainingDiverged(f"{error}. {last}") from error
        log_results(config, folder, checkpoints, state)


class Run:
    """The updates, evaluations and saves of one start of a run, beginning at `state`."""

    def __init__(
        self,
        config: CfgNode,
        dist_info: DistInfo,
        folder: RunDir,
        data: Data,
        stream: TrainDataInfo,
        schedule: Schedule,
        components: TrainComponents,
        state: TrainState,
    ):
        self.config = config
        self.dist_info = dist_info
        self.folder = folder
        self.data = data
        self.stream = stream
        self.schedule = schedule
        self.components = components
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
    def eval_pending(self) -> bool:
        """Whether an epoch is complete but for its evaluation."""
        return self.epoch_ended and self.state.epoch_sums["updates"] > 0

    @property
    def complete(self) -> bool:
        return self.state.samples >= self.total_samples and not self.eval_pending

    def fit(self, stop: PreemptionHandler, checkpointer: AsyncCheckpointer | None) -> bool:
        """Trains to the last epoch; False when asked to stop before. All is saved when it returns.

        Raises:
            UserError: the last state could not be saved; and all that `train` raises.
        """
        batches = TrainBatches(self.config, self.data, self.dist_info, self.state.samples, self.total_samples)
        val = val_batches(self.config, self.data, self.dist_info)
        reporter, stream = None, iter(batches)
        if self.dist_info.is_main:
            reporter = self._open_reporter()
            if self.state.samples == 0:
                stream = show_first_batch(reporter.records, self.config, stream, self.data.class_names)
        try:
            with explain_worker_crash(self.config.DATA.NUM_WORKERS):
                done = self._loop(stop, checkpointer, reporter, batches, stream, val)
        finally:
            if reporter:
                reporter.close()
        self._finish_saving(checkpointer)
        return done

    def _loop(
        self, stop, checkpointer, reporter, batches: TrainBatches, stream: Iterator[dict], val: ValBatches
    ) -> bool:
        """The updates from here on, and what is done between them."""
        freq, state = self.config, self.state
        if self.eval_pending and not self._end_epoch(stop, checkpointer, reporter, val):
            return self._log_stopped()
        for account in train_step.train(self.components, stream, state, self.schedule.at, self.stream.global_batch):
            stopping = stop.should_stop()
            saving = self.epoch_ended or stopping or (freq.SAVE_STEPS > 0 and self.update % freq.SAVE_STEPS == 0)
            if saving or self.update % freq.PRINT_FREQ == 0:
                taken = account.sync_and_reset()
                if reporter:
                    settings = {"lr": self.schedule.at(self.update - 1)} | optimizer_settings(
                        self.config, self.components
                    )
                    reporter.updates(self.update, state.samples, batches.wait_seconds, taken, settings)
            if saving:
                # Before an epoch's evaluation too, so that whatever ends the run there loses the evaluation alone.
                self._save(checkpointer)
            if stopping or (self.epoch_ended and not self._end_epoch(stop, checkpointer, reporter, val)):
                return self._log_stopped()
            if saving and reporter:
                reporter.resume_clock(state.samples, batches.wait_seconds)
        return True

    def _end_epoch(
        self,
        stop: PreemptionHandler,
        checkpointer: AsyncCheckpointer | None,
        reporter: TrainLogger | None,
        val: ValBatches,
    ) -> bool:
        """Evaluates, reports and saves the complete epoch; False, having changed nothing, when asked to stop."""
        most = broadcast_from_main(len(val))
        measured = evaluate_all(self.components, lambda: stop.iterate_until_stop(val, most))
        if stop.should_stop_now():
            return False
        state, epoch = self.state, self.epoch
        figures = {"train_loss": state.end_epoch()} | measured
        improved = state.update_best(max(figures["acc1"], figures.get("ema_acc1", 0.0)))
        if reporter:
            figures |= {"lr": self.schedule.at(self.update - 1), "skipped": state.skipped, "best": state.best}
            reporter.epoch(epoch, self.update, state.samples, figures)
        numbered = epoch % self.config.SAVE_FREQ == 0 or epoch == self.config.TRAIN.EPOCHS
        self._save(checkpointer, epoch if numbered else None, improved)
        return True

    def _save(self, checkpointer: AsyncCheckpointer | None, epoch: int | None = None, best: bool = False) -> None:
        """Saves in the background; see docs/FORMATS.md for the contents. A collective call.

        Raises:
            TrainingDiverged: not all numbers are finite; on all processes alike.
        """
        contents = {
            **self.components.state_dict(),
            "format": 1,
            "state": self.state.state_dict(),
            "stream": self.stream.state_dict(),
            "class_names": self.data.class_names,
            "config": dump(self.config),
        }
        if broken := broadcast_from_main(not_finite(contents)):
            raise TrainingDiverged(f"{broken} is not finite: not saved")
        if checkpointer:
            checkpointer.save(contents, epoch, best)

    def _finish_saving(self, checkpointer: AsyncCheckpointer | None) -> None:
        """All processes leave alike: with an error where the last state is not on the disk."""
        refusal = None
        if checkpointer:
            try:
                checkpointer.finish()
            except UserError as error:
                refusal = str(error)
        if refusal := broadcast_from_main(refusal):
            raise UserError(refusal)

    def _log_stopped(self) -> bool:
        log.info("asked to stop: saved after %s images; the same command continues", f"{self.state.samples:,}")
        return False

    def _open_reporter(self) -> TrainLogger:
        self.folder.write_config(dump(self.config))
        details = {"samples": self.state.samples, "global_batch": self.stream.global_batch}
        self.folder.record_launch(
            details | {"processes": self.dist_info.world_size, "device": str(self.dist_info.device)}
        )
        progress = Progress(self.total_samples, self.state.samples, self.config.TRAIN.EPOCHS, self.stream.images)
        records = MetricWriter(
            self.folder.path, self.folder.tensorboard, self.update, self.state.samples, self.eval_pending
        )
        records.add_text("config", self.folder.config_file.read_text())
        return TrainLogger(records, progress, self.dist_info.device, self.state.samples)


def show_first_batch(
    records: MetricWriter, config: CfgNode, stream: Iterator[dict], class_names: list[str] | None
) -> Iterator[dict]:
    """Draws the first batch as the network gets it, and gives the stream back whole."""
    first = next(stream)
    inputs = model_inputs(config)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (inputs.mean, inputs.std))
    images = first["image"][:32].cpu() * std + mean
    captions = [caption_of(target, class_names) for target in first["target"][:32].cpu()]
    records.add_picture("first_batch", captioned_grid(images, captions))
    return itertools.chain([first], stream)


def optimizer_settings(config: CfgNode, components: TrainComponents) -> dict[str, float]:
    scale = {"loss_scale": components.scaler.get_scale()} if components.scaler.is_enabled() else {}
    return {"weight_decay": config.TRAIN.WEIGHT_DECAY} | scale


def evaluate_all(components: TrainComponents, val: Callable[[], Iterable[dict]]) -> dict[str, float]:
    """Metrics of the model, and with the prefix `ema_` those of its average, each over `val()`. A collective call."""
    with summon_full_params(components.module_without_ddp):
        figures = train_step.evaluate(components, components.module_without_ddp, val())
    figures = {"val_loss": figures.pop("loss"), **figures}
    if components.ema is not None:
        with summon_full_params(components.ema.module):
            averaged = train_step.evaluate(components, components.ema.module, val())
        figures |= {f"ema_{name}": averaged[name] for name in ("acc1", "acc5")}
    return figures


def log_results(config: CfgNode, folder: RunDir, checkpoints: CheckpointFolder, state: TrainState) -> None:
    log.info(
        "best top-1 %.2f %%\n  log           less %s\n  TensorBoard   tensorboard --logdir %s\n  best weights  %s",
        state.best,
        shlex.quote(str(folder.log_file)),
        shlex.quote(str(folder.tensorboard)),
        shlex.join(
            ["python", "main.py", "--cfg", str(folder.config_file), "--eval", "--resume", str(checkpoints.best)]
        ),
    )
