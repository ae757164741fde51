"""A trained run opened again, for scoring: its recorded configuration, its model sharded anew, its newest checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.schema import Layout
from trainer.checkpoint import AnyPath, committed, of_run, read_best
from trainer.checkpoint.loading import load
from trainer.config.compose import from_yaml
from trainer.config.job import TrainConfig
from trainer.models.construct import build_model
from trainer.run import build
from trainer.run.training_state import ModelState
from trainer.runtime import run_folder
from trainer.runtime.distributed import Ranks, choose_device, identity, make_deterministic, unordered_operation_named
from trainer.runtime.rendezvous import process_group


@dataclass(frozen=True)
class LoadedRun:
    config: TrainConfig
    ranks: Ranks
    built: build.Built
    layout: Layout
    checkpoint: AnyPath


@contextmanager
def open_run(run: Path, checkpoint: str | None, overrides: Sequence[str]) -> Iterator[LoadedRun]:
    """Opens ``run`` at ``checkpoint`` (a name such as ``step-100``, or ``best``) on however many ranks there are. By default
    it is what the run itself ends with: the best one with ``checkpoint.restore_best`` or ``early_stopping``, else the
    newest. The run is a folder of this machine; its checkpoints may be elsewhere.

    Raises ``UserError`` when there is no such run or checkpoint, or it is damaged.
    """
    config = from_yaml(run / run_folder.CONFIG, overrides).config
    path = find_checkpoint(run, checkpoint, prefer_best=config.checkpoint.restore_best)
    model = build_model(config.model, config.data.schema, config.seed, build.execution(config, identity()[1]))
    limits = config.timeout_seconds, config.rendezvous_timeout_seconds
    if config.deterministic:
        make_deterministic()
    with process_group(choose_device(config.device), *limits) as ranks, unordered_operation_named():
        batch_size = config.evaluation.batch_size or config.batch_size
        built = build.build(config, model, ranks, -(-batch_size // ranks.world_size), total_steps=1)
        load(path, ModelState(built), ranks, weights_only=True)
        yield LoadedRun(config, ranks, built, model.layout, path)


def find_checkpoint(run: Path, checkpoint: str | None, *, prefer_best: bool) -> AnyPath:
    """The checkpoint that ``open_run`` means. Raises ``UserError`` where there is none."""
    folder = of_run(run)
    available = committed(folder)
    if not available:
        raise UserError(f"{run} holds no checkpoint: give the folder of a run that has saved one")
    if checkpoint is None and prefer_best and read_best(folder) is not None:
        checkpoint = "best"
    if checkpoint is None:
        return available[0]
    if checkpoint == "best":
        best = read_best(folder)
        if best is None:
            raise UserError(f"--checkpoint best: {run} names no best one: train with checkpoint.best=valid.auc")
        checkpoint = f"step-{best['step']}"
    found = [path for path in available if path.name == checkpoint]
    if not found:
        raise UserError(f"--checkpoint {checkpoint}: {run} has {', '.join(path.name for path in available)}")
    return found[0]
