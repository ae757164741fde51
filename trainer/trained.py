"""A trained run opened again, for scoring: its recorded configuration, its model sharded anew, its newest checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer import build
from trainer.checkpoint import committed, read_best
from trainer.checkpoint.saving import Checkpoints
from trainer.compose import from_yaml
from trainer.config import TrainConfig
from trainer.distributed import Ranks, choose_device, process_group
from trainer.state import ModelState


@dataclass(frozen=True)
class Trained:
    config: TrainConfig
    ranks: Ranks
    built: build.Built
    layout: object
    checkpoint: Path


@contextmanager
def opened(run: Path, checkpoint: str | None, overrides: Sequence[str]) -> Iterator[Trained]:
    """Opens ``run`` at ``checkpoint`` (a name such as ``step-100``, or ``best``; the newest by default) on however many
    ranks there are.

    Raises ``ValueError`` when there is no such run or checkpoint, or it is damaged.
    """
    config = from_yaml(run / "config.yaml", overrides).config
    path = _find(run, checkpoint)
    model = build.build_model(config.model, config.data.schema, config.seed)
    with process_group(choose_device(config.device), config.timeout_seconds) as ranks:
        batch_size = config.evaluation.batch_size or config.batch_size
        built = build.build(config, model, ranks, -(-batch_size // ranks.world_size), total_steps=1)
        Checkpoints(path.parent, config.checkpoint, ModelState(built.task), {}, ranks).load(path)
        yield Trained(config, ranks, built, model.layout, path)


def _find(run: Path, checkpoint: str | None) -> Path:
    available = committed(run / "checkpoints")
    if not available:
        raise ValueError(f"{run} holds no checkpoint: give the folder of a run that has saved one")
    if checkpoint is None:
        return available[0]
    if checkpoint == "best":
        best = read_best(run / "checkpoints")
        if best is None:
            raise ValueError(f"--checkpoint best: {run} names no best one: train with checkpoint.best=valid.auc")
        checkpoint = f"step-{best['step']}"
    found = [path for path in available if path.name == checkpoint]
    if not found:
        raise ValueError(f"--checkpoint {checkpoint}: {run} has {', '.join(path.name for path in available)}")
    return found[0]
