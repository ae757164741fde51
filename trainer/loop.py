"""The order of events in a step."""

from collections.abc import Callable, Iterator

from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data_loaders.batch import Batch
from data_loaders.loader import Loader
from trainer.checkpoint import Checkpoints
from trainer.progress import Progress
from trainer.reporting import Reporter
from trainer.scoring import Evaluator


def run(
    pipeline: TrainPipelineSparseDist,
    batches: Iterator[Batch],
    progress: Progress,
    reporter: Reporter,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    on_first_step: Callable[[], None],
) -> None:
    """Trains until ``batches`` end. Every event keeps its own cadence.

    ``on_first_step`` runs after the first step, when the pipeline has rewritten the model.
    """
    while True:
        try:
            outputs = pipeline.progress(batches)
        except StopIteration:
            return
        on_first_step()
        progress.advance(outputs.cursor)
        reporter.update(outputs, progress)
        reporter.maybe_report(progress)
        checkpoints.maybe_save(progress)
        evaluator.maybe_evaluate(progress)


def batches_from(loader: Loader, progress: Progress, total_steps: int) -> Iterator[Batch]:
    """The batches still to train, from ``progress`` on, over epochs, up to ``total_steps`` optimizer steps."""
    left = total_steps - progress.step
    epoch, start = progress.epoch, progress.epoch_step
    while left > 0:
        if start >= loader.steps_per_epoch:
            epoch, start = epoch + 1, 0
        stream = loader.epoch(epoch, start)
        try:
            for batch in stream:
                yield batch
                left -= 1
                if left == 0:
                    return
        finally:
            stream.close()
        start = loader.steps_per_epoch
