"""The order of events in a step."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.profiler import record_function

from data_loaders.batch import Batch
from data_loaders.loader import BatchIterator, Loader
from trainer.checkpoint.saving import Checkpoints
from trainer.modules.task import TaskOutput
from trainer.monitoring.feature_coverage import FeatureCoverage
from trainer.monitoring.grace_period import GraceCheck
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.monitoring.row_log import RowLog
from trainer.run.early_stopping import EarlyStopping
from trainer.run.evaluator import Evaluator
from trainer.run.redraw import Redraw
from trainer.run.step_seeds import StepSeeds
from trainer.runtime import fault_injection
from trainer.runtime.progress import Progress
from trainer.runtime.step_guard import StepGuard
from trainer.runtime.watchdog import Watchdog
from trainer.sharding.pipeline import StepPipeline


def run(
    *,
    batches: Iterator[Batch],
    pipeline: StepPipeline,
    progress: Progress,
    guard: StepGuard,
    watchdog: Watchdog,
    row_log: RowLog,
    coverage: FeatureCoverage,
    logger: MetricsLogger,
    evaluator: Evaluator,
    early_stopping: EarlyStopping,
    checkpoints: Checkpoints,
    grace: GraceCheck,
    profile: Callable[[int], None],
    seeds: StepSeeds,
    redraw: Redraw,
) -> None:
    """Trains until ``batches`` end, ``early_stopping`` has stopped, or ``guard`` has seen that a rank was asked to stop: then
    all ranks return after the same step, without saving or evaluating. Every event has its own cadence, and all ranks take
    part in it. The host runs ahead of a GPU: only before an event that reads or keeps what the step has made does it wait for
    the answer whether the step counts (``guard.settle``)."""

    def between(batch: Batch, outputs: TaskOutput) -> None:
        with record_function("## guard ##"):  # such names are read in traces (trainer/monitoring/profiling)
            guard.check(outputs.loss, outputs.logits, outputs.cursor)
        coverage.look(batch)

    incoming = _read(batches, progress.step + 1)
    while True:
        guard.begin(progress.step + 1)
        profile(progress.step)
        grace.look()
        seeds.begin(progress.step)
        if redraw.is_due(progress):
            guard.settle()
            redraw.tables(progress)
        try:
            # Next batch -> forward -> guard, coverage -> backward, with the tables' optimizers -> dense optimizer.
            outputs = pipeline.step(incoming, between)
        except StopIteration:
            return guard.over(progress.step)
        with record_function("## metrics ##"):
            progress.advance(outputs.cursor)
            row_log.record(outputs.cursor, progress.step)
            logger.update(outputs, progress)
            if logger.is_due(progress) or evaluator.is_due(progress) or checkpoints.may_be_due(progress.step):
                guard.settle()
            logger.maybe_report(progress)  # when a line is due: with stragglers and alerts, to trackers too
        guard.end()
        if guard.stop_requested:
            return guard.over(progress.step)
        with watchdog.paused(), record_function("## evaluation and checkpoint ##"):
            waited = checkpoints.seconds
            if evaluator.is_due(progress):
                evaluate(progress, evaluator, early_stopping, checkpoints)
            checkpoints.maybe_save(progress)
            logger.outside(checkpoints.seconds - waited)
        if early_stopping.stopped is not None:
            return guard.over(progress.step)


def evaluate(
    progress: Progress, evaluator: Evaluator, early_stopping: EarlyStopping, checkpoints: Checkpoints
) -> Mapping[str, Any]:
    """Metrics of ``valid`` at this step, and what follows from them. A second call at the same step computes and changes
    nothing."""
    values = evaluator.evaluate(progress)  # logs them and keeps the distribution of the scores
    early_stopping.consider(progress, "valid", values)  # before the checkpoint of this step, which holds its counts
    checkpoints.consider(progress, "valid", values)
    return values


def _read(batches: Iterator[Batch], first_step: int) -> Iterator[Batch]:
    """``batches``, that of ``first_step`` first."""
    for step, batch in enumerate(batches, first_step):
        fault_injection.at("reader", step=step)
        yield batch


def batches_from(loader: Loader, progress: Progress, total_steps: int) -> BatchIterator:
    """The batches still to train, from ``progress`` on, over epochs, up to ``total_steps`` optimizer steps."""
    epoch, start = progress.epoch, progress.epoch_step
    if start >= loader.steps_per_epoch:
        epoch, start = epoch + 1, 0
    return loader.batches(epoch, start, total_steps - progress.step)
