"""Whether there is a checkpoint to resume from, and how a run resumes."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_loaders.errors import UserError
from data_loaders.messages import note, warn
from data_loaders.order import ORDER_VERSION
from data_loaders.schema import Feature, Table
from trainer import checkpoint
from trainer.checkpoint.loading import Restorable, load
from trainer.checkpoint.verification import newest_whole
from trainer.config.job import TrainConfig
from trainer.monitoring.row_log import cut
from trainer.run.training_files import Saved, TrainingFiles
from trainer.runtime.distributed import Ranks, from_first
from trainer.runtime.progress import Progress

LATER = ("dim", "project", "normalize", "weights", "init_from", "freeze")  # keys of features and tables since 0.1


def job_identity(config: TrainConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: else rows would be lost or repeated, or tensors misread.
    (The data are a matter of their own: ``trainer.run.training_files``.)"""
    stream = config.data.stream
    return {
        "model": tree["model"],
        "schema": _without_later(tree["data"]["schema"]),
        "new_since": config.data.new_since,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "stream": {"shards": stream.shards, "shuffle": stream.shuffle, "shuffle_rows": stream.shuffle_rows},
        "order": ORDER_VERSION,
    }


def _without_later(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that older checkpoints do not know, where they have their defaults and so say nothing."""
    kinds = {"features": asdict(Feature()), "tables": asdict(Table())}
    defaults = {part: {key: kind[key] for key in LATER if key in kind} for part, kind in kinds.items()}
    kept = {
        part: {
            name: {key: value for key, value in spec.items() if key not in keys or value != keys[key]}
            for name, spec in schema[part].items()
        }
        for part, keys in defaults.items()
    }
    return {**schema, **kept}


def checkpoints_folder(config: TrainConfig, run: Path) -> checkpoint.AnyPath:
    """Where the checkpoints of the run in the folder ``run`` are: there, or below ``checkpoint.root``."""
    root = None if config.warm_start.dry_run else config.checkpoint.root  # a dry run leaves nothing behind
    return checkpoint.chosen(root, run, dated=config.run.dir is None)


def resumable(
    config: TrainConfig,
    folder: checkpoint.AnyPath,
    identity: dict[str, Any],
    ranks: Ranks,
    alive: Callable[[], None] = lambda: None,
) -> Saved | None:
    """The newest whole checkpoint in ``folder``, its bytes hashed by all ranks together; None where there is none. Raises
    ``UserError`` on every rank where it belongs to another job, where ``resume=never`` meets a checkpoint, and where
    checkpoints cannot be written to ``folder``; ``OSError`` for a store that does not answer. ``alive`` is called now and
    then."""
    from_first(lambda: _make_ready(config, folder))
    path = newest_whole(folder, config.checkpoint.on_corrupt, ranks, alive)
    return None if path is None else from_first(lambda: _saved_at(path, config, identity))


def _make_ready(config: TrainConfig, folder: checkpoint.AnyPath) -> None:
    checkpoint.place_of(folder).probe(folder)
    checkpoint.clean(folder)
    if config.resume == "never" and (found := checkpoint.committed(folder)):
        raise UserError(
            f"resume=never, but {folder} holds {found[0].name}, which a run from scratch would get mixed up with: choose "
            "another run.dir, or take its checkpoints away"
        )


def _saved_at(path: checkpoint.AnyPath, config: TrainConfig, identity: dict[str, Any]) -> Saved:
    facts = checkpoint.read_json(path, checkpoint.FACTS, checkpoint.JOB_FACTS)
    checkpoint.check_identity(path, facts["identity"], identity)
    return Saved.at(path, config.data.root)


def starting_point(saved: Saved | None, files: TrainingFiles) -> Progress:
    progress = Progress() if saved is None else replace(saved.progress)
    if progress.epoch < files.first_epoch:  # its files are of this epoch on, so the last one is over
        progress.begin_epoch()
    return progress


def resume(saved: Saved | None, state: Restorable, row_log: Path, *, recording: bool, ranks: Ranks) -> None:
    """Resumes from ``saved``, if there is one. The row log loses the steps that will be trained again."""
    step = saved.progress.step if saved else 0
    recorded = from_first(lambda: cut(row_log, step))
    if saved is None:
        return
    load(saved.path, state, ranks, verified=True)
    if ranks.is_first:
        note(f"Resumed from {saved.path}: step {step}, {saved.progress.rows:,} rows trained")
        if recording and recorded < step:
            warn(f"steps {recorded + 1} to {step} are not in the ledger: debug.ledger was off")
