"""What a run reads and where it begins: its checkpoint, its files, the loaders over them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.loader import BatchIterator, Loader
from data_loaders.schema import Layout
from trainer.checkpoint import AnyPath, note
from trainer.config.job import TrainConfig
from trainer.run import build, loop, training_files
from trainer.run.resume import checkpoints_folder, job_identity, resumable, starting_point
from trainer.run.training_files import Saved, TrainingFiles
from trainer.runtime.distributed import Ranks, from_first
from trainer.runtime.progress import Progress
from trainer.warm_start.start import whole_checkpoint


@dataclass(frozen=True)
class RunData:
    """What the run reads, and from where on: ``saved`` is the checkpoint it resumes from, if any; ``identity`` what must be
    the same in it; ``warm``, where it resumes from none, another run's checkpoint to begin with; ``batches`` are those
    still to train, ``held_out`` the loaders of ``valid`` and ``test``."""

    identity: dict[str, Any]
    saved: Saved | None
    warm: AnyPath | None
    files: TrainingFiles
    progress: Progress
    loader: Loader
    held_out: dict[str, Loader]
    total_steps: int
    batches: BatchIterator


def open_data(
    config: TrainConfig,
    tree: dict[str, Any],
    layout: Layout,
    folder: Path,
    ranks: Ranks,
    alive: Callable[[], None] = lambda: None,
) -> RunData:
    """Finds the checkpoint to resume from and the files to read, and begins to read them. ``alive`` is called now and then
    while checkpoints are hashed."""
    build.ensure_synthetic(config.data)
    identity = job_identity(config, tree)
    place = checkpoints_folder(config, folder)
    saved = resumable(config, place, identity, ranks, alive)
    from_first(lambda: note(folder, place))
    source = config.warm_start.path if saved is None else None  # a resumed run has its own state
    warm = whole_checkpoint(source, ranks, alive) if source is not None else None
    files = training_files.choose(config, layout, saved, ranks)
    progress = starting_point(saved, files)
    loader, _ = build.build_train_loader(
        config.data,
        layout,
        config.batch_size,
        config.seed,
        ranks,
        files.manifest,
        record_origin=config.debug.ledger,
    )
    total_steps = progress.total_steps(config.epochs, loader.steps_per_epoch, config.steps)
    held_out = held_out_loaders(config, layout, ranks)
    batches = loop.batches_from(loader, progress, total_steps)  # reading begins, while the model is built
    return RunData(identity, saved, warm, files, progress, loader, held_out, total_steps, batches)


def held_out_loaders(config: TrainConfig, layout: Any, ranks: Ranks) -> dict[str, Any]:
    """Loaders of ``valid`` and ``test``, where the data has them; made before training, so that a wrong path shows at once."""
    data = config.data
    batch_size = config.evaluation.batch_size or config.batch_size
    return {
        split: build.build_ordered_loader(
            build.scan(data, split, layout),
            data.schema,
            layout,
            batch_size,
            data.stream,
            ranks,
            group_by=config.evaluation.columns,
        )
        for split in ("valid", "test")
        if getattr(data, split)
    }
