"""Jobs that are built in this process, on the ranks of a test."""

from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers import tiny
from tests.helpers.whole_tables import gather_table
from trainer.checkpoint.loading import load
from trainer.checkpoint.saving import Checkpoints
from trainer.checkpoint.verification import newest_whole
from trainer.models.construct import build_model
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.run import build, loop
from trainer.run.training_state import TrainingState
from trainer.runtime.distributed import Ranks, all_reduce_sum
from trainer.runtime.progress import Progress


def ranks_of(rank, world_size):
    return Ranks(rank, world_size, rank, world_size, torch.device("cpu"))


def built_job(root, rank, world_size, overrides):
    ranks = ranks_of(rank, world_size)
    config = tiny.job(root, *overrides).config
    model = build_model(config.model, config.data.schema, config.seed, build.execution(config, world_size))
    loader, _ = build.build_train_loader(config.data, model.layout, config.batch_size, config.seed, ranks)
    built = build.build(config, model, ranks, loader.local_batch_size, total_steps=100)
    return config, model.layout, loader, built


def state_of(built, loader, ranks):
    reporter = MetricsLogger(Path("unused"), loader, 100, 1000, ranks)
    reporter.close()
    return TrainingState(built, reporter)


def curve(built, batches, steps):
    """The global loss of each of ``steps`` steps."""
    losses = []
    for _ in range(steps):
        outputs = built.pipeline.progress(batches)
        losses.append(all_reduce_sum(outputs.loss.double().clone()).item() / dist.get_world_size())
    return losses


def check_against_unsharded(rank, world_size, root, overrides):
    config, layout, loader, built = built_job(root, rank, world_size, overrides)
    batches = loop.batches_from(loader, Progress(), 3)
    built.pipeline.progress(batches)
    built.pipeline.detach()
    batch = next(iter(loader.epoch(1)))
    built.task.eval()  # in training mode Dice takes its statistics from both ranks
    _, sharded = built.task(batch)
    plain = build_model(config.model, config.data.schema, config.seed)
    plain.to_empty(device="cpu")
    tables = {table.parameter.removeprefix("model."): table.name for table in built.tables}
    own = {key.removeprefix("model."): value for key, value in built.task.state_dict().items()}
    whole = {key: gather_table(built.task, table) for key, table in tables.items()}
    full = {**own, **whole}
    plain.load_state_dict(full)
    plain.eval()
    torch.testing.assert_close(sharded.logits, plain(batch), rtol=1e-5, atol=1e-6)
    batches.close()


def check_round_trip(rank, world_size, root, overrides, folder):
    ranks = ranks_of(rank, world_size)
    config, _, loader, built = built_job(root, rank, world_size, overrides)
    progress = Progress()
    batches = loop.batches_from(loader, progress, 9)
    for _ in range(4):
        outputs = built.pipeline.progress(batches)
        progress.advance(outputs.cursor)
    saved = Checkpoints(folder, config.checkpoint, state_of(built, loader, ranks), {"a": 1}, ranks)
    path = saved.save(progress)
    rest = curve(built, batches, 5)
    batches.close()

    _, _, loader, fresh = built_job(root, rank, world_size, [*overrides, "seed=1"])
    with torch.no_grad():
        for parameter in fresh.task.parameters():
            parameter.uniform_(-1, 1)
    again = Progress()
    assert newest_whole(folder, "error", ranks) == path
    facts = load(path, state_of(fresh, loader, ranks), ranks)
    again.load_state_dict(facts["progress"])
    assert again == progress and facts["identity"] == {"a": 1}
    batches = loop.batches_from(loader, again, 9)
    assert curve(fresh, batches, 5) == rest
    batches.close()
