"""Training: from wherever the run in its folder stopped to its last epoch.

From the outside in: `train` → `_train_locked` → `Trainer.fit` → `Trainer._loop` → `engine.train_step.train_steps`.
"""

import itertools
import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from config import dump
from data.build import Data, TrainBatches, ValBatches
from data.loader.loader import explain_worker_crash
from engine import evaluation, train_step
from engine.clock import Clock
from engine.resume import (
    TrainDataInfo,
    check_resume_data,
    load_resume_checkpoint,
    open_run_dir,
    resume_or_init,
    saved_global_batch_size,
)
from engine.setup import build_components, compile_and_wrap
from engine.train_step import StepMetrics, TrainComponents, TrainState
from lr_scheduler import Schedule, build_schedule
from tasks.build import open_data, train_batches, val_batches
from tasks.task import Batch, Task
from utils import interrupt
from utils.checkpoint.async_saver import AsyncCheckpointer
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.io import not_finite
from utils.checkpoint.schema import FORMAT
from utils.distributed.preemption import PreemptionHandler
from utils.distributed.process_group import DistInfo, broadcast_from_main, raise_on_all_ranks
from utils.errors import TrainingDiverged, UserError
from utils.tracking.logger import FILE_ONLY
from utils.tracking.metric_writer import MetricWriter
from utils.tracking.progress import Progress
from utils.tracking.run_dir import RunDir
from utils.tracking.train_logger import TrainLogger

log = logging.getLogger(__name__)


def train(config: CfgNode, dist_info: DistInfo, allow_config_change: bool = False) -> bool:
    """Trains from where the run in its folder stopped to its last epoch, and logs where the results are.

    Returns:
        Whether SIGINT asked to stop. Everything is saved in any case.

    Raises:
        UserError: anything in data, files or configuration that the user can change.
        TrainingDiverged: loss or gradients stayed non-finite.
    """
    # Lock the folder before anything slow happens.
    run_dir = RunDir(Path(config.OUTPUT, config.MODEL.NAME, config.TAG))
    checkpoints = CheckpointFolder(run_dir.checkpoints, config.SAVE_KEEP)
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if dist_info.is_main:
                stack.enter_context(run_dir.lock())
                open_run_dir(run_dir, checkpoints, config)
        try:
            return _train_locked(run_dir, checkpoints, config, dist_info, allow_config_change)
        except (UserError, KeyboardInterrupt) as error:  # main.py prints it on the terminal
            log.error("%s", str(error) or "interrupted", extra=FILE_ONLY)
            raise


def _train_locked(
    run_dir: RunDir, checkpoints: CheckpointFolder, config: CfgNode, dist_info: DistInfo, allow_config_change: bool
) -> bool:
    """Returns whether SIGINT asked to stop."""
    with ExitStack() as stack:
        preemption = stack.enter_context(closing(PreemptionHandler(config.TIMEOUT)))  # a signal may come at any time

        # The data and the checkpoint to resume from: the number of classes and the length of everything follow.
        data = open_data(config, dist_info)
        point = load_resume_checkpoint(config, dist_info, run_dir, checkpoints)
        train_data = check_resume_data(config, dist_info, data, point, allow_config_change)
        schedule = build_schedule(config, train_data.num_images, train_data.global_batch_size)

        # The model and what trains it.
        grad_accum_steps = train_data.global_batch_size // (config.DATA.BATCH_SIZE * dist_info.world_size)
        components = build_components(config, dist_info, data, grad_accum_steps)
        _log_plan(train_data, schedule)
        state = resume_or_init(config, dist_info, components, data.class_names, point)
        last_step_images = saved_global_batch_size(point) or train_data.global_batch_size
        resumed_from = point.path if point else None
        del point  # as large as everything that is trained

        clock = Clock(
            state=state,
            num_images=train_data.num_images,
            global_batch_size=train_data.global_batch_size,
            last_step_images=last_step_images,
            total_steps=schedule.total_steps,
            epochs=config.TRAIN.EPOCHS,
            val_freq=config.VAL_FREQ,
        )
        if clock.complete:
            log.info("this run is complete: all %d epochs are done", config.TRAIN.EPOCHS)
        elif preemption.should_stop(wait=True):
            log.info("stopped before the first step; the same command continues")
            return False
        else:
            components = compile_and_wrap(config, dist_info, components)
            trainer = Trainer(
                config=config,
                dist_info=dist_info,
                run_dir=run_dir,
                resumed_from=resumed_from,
                data=data,
                train_data=train_data,
                schedule=schedule,
                components=components,
                state=state,
                clock=clock,
            )
            checkpointer = stack.enter_context(closing(AsyncCheckpointer(checkpoints))) if dist_info.is_main else None
            try:
                done = trainer.fit(preemption, checkpointer)
            except TrainingDiverged as error:
                last = f"The last good checkpoint is {checkpoints.last}" if checkpoints.last.exists() else "None yet"
                raise TrainingDiverged(f"{error}. {last}") from error
            if not done:
                return preemption.interrupted
        log_results(
            components.module_without_ddp,
            best_metric_name(config, components.module_without_ddp),
            run_dir,
            checkpoints,
            state,
        )
        if preemption.interrupted and interrupt.claim_report():
            log.info("interrupted after the last step: the run is complete")
        return preemption.interrupted


def _log_plan(train_data: TrainDataInfo, schedule: Schedule) -> None:
    log.info(
        "%d images a step, %s steps, learning rate up to %.3g",
        train_data.global_batch_size,
        f"{schedule.total_steps:,}",
        schedule.base_lr,
    )
    if train_data.global_batch_size > train_data.num_images:
        epochs = train_data.global_batch_size / train_data.num_images
        log.warning("a step takes more images than there are: it completes %.1f epochs", epochs)


@dataclass(frozen=True)
class Trainer:
    """The steps, evaluations and saves of one start of a run, from `state` on."""

    config: CfgNode
    dist_info: DistInfo
    run_dir: RunDir
    resumed_from: str | None  # the checkpoint that this start has read
    data: Data
    train_data: TrainDataInfo
    schedule: Schedule
    components: TrainComponents
    state: TrainState
    clock: Clock

    def fit(self, preemption: PreemptionHandler, checkpointer: AsyncCheckpointer | None) -> bool:
        """Trains to the last epoch. Returns False if asked to stop before. Everything is saved when it returns.

        Raises:
            UserError: the last state could not be saved; and everything that `train` raises.
        """
        preemption.defer_interrupts()
        train = train_batches(self.config, self.data, self.dist_info, self.state.images_seen, self.clock.total_images)
        val = val_batches(self.config, self.data, self.dist_info)
        logger = None
        stream: Iterator[Batch] = iter(train)
        if self.dist_info.is_main:
            logger = self._open_logger()
            if self.state.images_seen == 0:
                stream = show_first_batch(logger.writer, self.components.module_without_ddp, stream)
        try:
            with explain_worker_crash(self.config.DATA.NUM_WORKERS), val.keep_workers():
                done = self._loop(preemption, checkpointer, logger, train, stream, val)
        finally:
            if logger:
                logger.close()
        self._finish_saving(checkpointer)
        if not done and (not preemption.interrupted or interrupt.claim_report()):
            log.info(
                "%sstopped and saved after %s images; the same command continues",
                "interrupted: " if preemption.interrupted else "",
                f"{self.state.images_seen:,}",
            )
        return done

    def _loop(
        self,
        preemption: PreemptionHandler,
        checkpointer: AsyncCheckpointer | None,
        logger: TrainLogger | None,
        train: TrainBatches,
        stream: Iterator[Batch],
        val: ValBatches,
    ) -> bool:
        config, state, clock = self.config, self.state, self.clock
        if clock.eval_pending and not self._end_epoch(preemption, checkpointer, logger, val):
            return False
        steps = train_step.train_steps(
            self.components, stream, state, self.schedule.at, self.train_data.global_batch_size
        )
        for metrics in steps:
            stopping, epoch_ended = preemption.should_stop(), clock.epoch_ended
            # Also before the evaluation of an epoch, so that a crash there loses the evaluation alone.
            saving = stopping or (epoch_ended and clock.eval_due)
            saving = saving or (config.SAVE_STEPS > 0 and clock.step % config.SAVE_STEPS == 0)
            if saving or epoch_ended or clock.step % config.PRINT_FREQ == 0:
                self._log_steps(metrics, logger, train)
            if saving:
                self._save(checkpointer)
            if stopping or (epoch_ended and not self._end_epoch(preemption, checkpointer, logger, val)):
                return False
            if (saving or epoch_ended) and logger:
                logger.resume_clock(state.images_seen, train.wait_seconds)
        return True

    def _log_steps(self, metrics: StepMetrics, logger: TrainLogger | None, train: TrainBatches) -> None:
        sums = metrics.sync_and_reset()
        if logger:
            settings = {"lr": self.schedule.at(self.clock.step - 1), "weight_decay": self.config.TRAIN.WEIGHT_DECAY}
            if self.components.scaler.is_enabled():
                settings["loss_scale"] = self.components.scaler.get_scale()
            logger.log_steps(self.clock.step, self.state.images_seen, train.wait_seconds, sums, settings)

    def _end_epoch(
        self,
        preemption: PreemptionHandler,
        checkpointer: AsyncCheckpointer | None,
        logger: TrainLogger | None,
        val: ValBatches,
    ) -> bool:
        """Evaluates the complete epoch if that is due, logs and saves it. A collective call.

        Returns:
            False, having changed nothing, if asked to stop.
        """
        evaluated: dict[str, float] = {}
        if self.clock.eval_due:
            most = broadcast_from_main(len(val))
            evaluated = evaluation.evaluate_model_and_ema(
                self.components, lambda: preemption.iterate_until_stop(val, most)
            )
            if preemption.should_stop(wait=True):
                return False
        state, epoch = self.state, self.clock.epoch
        metrics = {f"train_{name}": mean for name, mean in state.end_epoch().items()} | evaluated
        improved = bool(evaluated) and self._update_best(evaluated)
        if logger:
            metrics |= {"lr": self.schedule.at(self.clock.step - 1), "skipped": state.skipped}
            logger.log_epoch(epoch, self.clock.step, state.images_seen, metrics | state.best_as("best"))
        numbered = epoch % self.config.SAVE_FREQ == 0 or epoch == self.config.TRAIN.EPOCHS
        self._save(checkpointer, epoch if numbered else None, improved)
        return True

    def _update_best(self, evaluated: dict[str, float]) -> bool:
        """Returns whether the model or its average is the best so far; the state remembers which one is better."""
        name = best_metric_name(self.config, self._task)
        key, higher_is_better = ("val_loss", False) if name == "loss" else (name, self._task.metrics[name])
        results = {
            kind: (evaluated[prefix + key], evaluated[prefix + "val_loss"])
            for kind, prefix in (("model", ""), ("ema", "ema_"))
            if prefix + key in evaluated
        }
        return self.state.update_best(results, higher_is_better)

    def _save(self, checkpointer: AsyncCheckpointer | None, epoch: int | None = None, best: bool = False) -> None:
        """Saves in the background; docs/FORMATS.md describes the contents. A collective call.

        Raises:
            TrainingDiverged: not all numbers are finite; on all ranks.
        """
        contents = {
            **self.components.state_dict(),
            "format": FORMAT,
            "state": self.state.state_dict(),
            "train_data": self.train_data.state_dict(),
            "class_names": self.data.class_names,
            "config": dump(self.config),
        }
        if broken := broadcast_from_main(not_finite(contents)):
            raise TrainingDiverged(f"{broken} is not finite: not saved")
        if checkpointer:
            checkpointer.save(contents, epoch, best)

    def _finish_saving(self, checkpointer: AsyncCheckpointer | None) -> None:
        """Waits for the last save. All ranks raise the same error if it failed."""
        with raise_on_all_ranks():
            if checkpointer:
                checkpointer.finish()

    def _open_logger(self) -> TrainLogger:
        state, clock = self.state, self.clock
        self.run_dir.write_config(dump(self.config))
        self.run_dir.record_launch(
            {
                "resumed_from": self.resumed_from,
                "images_seen": state.images_seen,
                "global_batch_size": self.train_data.global_batch_size,
                "world_size": self.dist_info.world_size,
                "device": str(self.dist_info.device),
                "main_metric": best_metric_name(self.config, self._task),
            }
        )
        progress = Progress(clock.total_images, state.images_seen, clock.epochs, clock.num_images)
        writer = MetricWriter(self.run_dir.path, self.run_dir.tensorboard, state.images_seen, clock.eval_pending)
        writer.add_text("config", self.run_dir.config_file.read_text())
        return TrainLogger(writer, progress, self.dist_info.device, state.images_seen)

    @property
    def _task(self) -> Task:
        return self.components.module_without_ddp


def show_first_batch(writer: MetricWriter, task: Task, stream: Iterator[Batch]) -> Iterator[Batch]:
    """Draws the first batch as the network sees it, and returns the whole stream."""
    first = next(stream)
    writer.add_image("first_batch", task.batch_image(first))
    return itertools.chain([first], stream)


def best_metric_name(config: CfgNode, task: Task) -> str:
    """Returns the metric that selects the best checkpoint.

    Raises:
        UserError: TRAIN.BEST_METRIC is no metric of the task.
    """
    name = task.main_metric if config.TRAIN.BEST_METRIC == "auto" else config.TRAIN.BEST_METRIC
    if name not in task.metrics:
        raise UserError(f"TRAIN.BEST_METRIC {name} is not measured here. Take one of auto, {', '.join(task.metrics)}")
    return name


def log_results(task: Task, metric: str, run_dir: RunDir, checkpoints: CheckpointFolder, state: TrainState) -> None:
    if state.best_metric is None:  # EPOCHS was made smaller, and no epoch up to it was due for evaluation
        log.info("no epoch was evaluated (VAL_FREQ); the last checkpoint is %s", checkpoints.last)
        return
    # A run that resumed another one's checkpoint, and did not improve on it, has no best.pth of its own.
    weights = checkpoints.best if checkpoints.best.exists() else checkpoints.last
    evaluate = ["python", "main.py", "--cfg", str(run_dir.config_file), "--eval", "--resume", str(weights)]
    log.info(
        "best %s\n  log           less %s\n  TensorBoard   tensorboard --logdir %s\n  best weights  %s",
        task.describe(state.best_as(metric)),
        shlex.quote(str(run_dir.log_file)),
        shlex.quote(str(run_dir.tensorboard)),
        shlex.join(evaluate),
    )
