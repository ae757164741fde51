"""Training a log in which a policy leaves rows out, against a plain model that never sees them: on two ranks, batch by
batch, the loss, the tables and the dense layers of the rows that remain."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from data_loaders.manifest import Manifest
from tests.helpers import tiny
from tests.helpers.jobs import ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer.models.construct import build_model
from trainer.modules.task import ClickTask
from trainer.run import build, loop
from trainer.runtime.distributed import all_reduce_sum
from trainer.runtime.progress import Progress

STEPS, BATCH, RATE = 6, 60, 0.2
LOST_USERS = range(400, 500)  # named by bad rows only
POLICIES = (
    "model.hidden_units=[16]",
    "data.train=[bad.parquet]",
    "batch_size=60",
    "data.stream.shuffle_rows=120",
    "data.schema.on_bad_label=drop",
    "data.schema.features.user_id.ids=identity",
    "data.schema.features.item_id.on_out_of_range=drop",
    "data.schema.features.age.on_null=drop",
)
SGD = tuple(f"optim.{part}={{name: sgd, lr: {RATE}}}" for part in ("wide", "tables", "dense"))
IN_ORDER = "data.stream.shuffle=false"


def bad_log(root, seed=0):
    """``bad.parquet``: the start of the tiny log, 40 of its rows bad in one of three ways, and all of rows 120 … 179."""
    table = pq.read_table(root / "train" / "part-00000.parquet").slice(0, STEPS * BATCH - 20)
    random = np.random.default_rng(seed)
    bad = np.zeros(len(table), bool)
    bad[random.permutation(len(table))[:40]] = True
    bad[2 * BATCH : 3 * BATCH] = True
    how = random.integers(0, 3, len(table))
    user = random.integers(0, LOST_USERS.start, len(table))
    user[bad] = random.integers(LOST_USERS.start, LOST_USERS.stop, len(table))[bad]
    changed = {
        "user_id": pa.array(user),
        "label": _null_where(table["label"], bad & (how == 0)),
        "age": _null_where(table["age"], bad & (how == 1)),
        "item_id": pa.array(np.where(bad & (how == 2), 10**6, table["item_id"].to_numpy())),
    }
    for name, values in changed.items():
        table = table.set_column(table.schema.names.index(name), name, values)
    pq.write_table(table, root / "bad.parquet", row_group_size=50)
    return table, bad


def _null_where(column, mask):
    return pa.array(column.to_numpy(zero_copy_only=False).tolist(), column.type, mask=mask)


class Plain:
    """The unsharded model and SGD, on one rank, on batches of good rows only."""

    def __init__(self, config, built, ranks, table, folder):
        model = build_model(config.model, config.data.schema, config.seed).to_empty(device="cpu")
        self.tables = {t.parameter.removeprefix("model."): t.name for t in built.tables}
        self.names = set(model.state_dict())
        model.load_state_dict(whole_state(built, self.tables))
        self.task = ClickTask(model).train()
        self.config, self.ranks, self.table, self.folder = config, ranks, table, folder

    def step(self, rows, number):
        if not len(rows):
            return 0.0
        path = self.folder / f"step-{number}-rank-{self.ranks.rank}.parquet"
        pq.write_table(self.table.take(rows), path)
        data = self.config.data
        manifest = Manifest.scan([path.name], str(self.folder), [])
        alone = ranks_of(0, 1)
        loader = build.build_ordered_loader(
            manifest, data.schema, self.task.model.layout, len(rows), data.stream, alone
        )
        (batch,) = loader.epoch(0)
        assert batch.cursor.dropped is None and batch.normalizer == len(rows)
        loss, _ = self.task(batch)
        parameters = list(self.task.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= RATE * gradient
        return loss.item()


def whole_state(built, tables):
    own = {key.removeprefix("model."): value for key, value in built.task.state_dict().items()}
    return {**own, **{key: gather_table(built.task, table) for key, table in tables.items()}}


def job(rank, world_size, root, *overrides):
    ranks = ranks_of(rank, world_size)
    config = tiny.job(root, *POLICIES, "sharding.types=[row_wise]", *overrides).config
    model = build_model(config.model, config.data.schema, config.seed, build.execution(config, world_size))
    loader, _ = build.build_train_loader(
        config.data, model.layout, config.batch_size, config.seed, ranks, record_origin=True
    )
    return config, loader, build.build(config, model, ranks, loader.local_batch_size, total_steps=100)


def steps(built, batches, count):
    """Trains; yields the global loss and outputs of each step."""
    for _ in range(count):
        outputs = built.pipeline.progress(batches)
        yield all_reduce_sum(outputs.loss.double().clone()).item() / dist.get_world_size(), outputs
    batches.close()


def check_against_plain(rank, world_size, root, folder, table, bad, *overrides):
    """Two epochs; returns how many rows this rank has left out."""
    config, loader, built = job(rank, world_size, root, *SGD, *overrides)
    plain = Plain(config, built, ranks_of(rank, world_size), table, folder)
    initial = whole_state(built, plain.tables)
    count, seen = 2 * loader.steps_per_epoch, []
    for loss, outputs in steps(built, loop.batches_from(loader, Progress(), count), count):
        rows, dropped = whole_batch(outputs.cursor)
        assert np.array_equal(dropped, bad[rows])
        counts = ~bad[outputs.cursor.origin]
        assert outputs.weights.tolist() == [*counts, *[0] * (len(outputs.weights) - len(counts))]
        assert loss == pytest.approx(plain.step(rows[~dropped], len(seen)), abs=1e-6)
        seen.append(rows)
    for epoch in (seen[: count // 2], seen[count // 2 :]):
        assert sorted(np.concatenate(epoch)) == list(range(len(table)))
    final, expected = whole_state(built, plain.tables), plain.task.model.state_dict()
    for key, value in final.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6, msg=key)
    (users,) = (key for key, name in plain.tables.items() if name == "user")
    changed = (final[users] != initial[users]).any(1)
    assert not changed[LOST_USERS.start :].any() and changed[: LOST_USERS.start].any()
    return loader.counters["rows.dropped"]


def check_batch_without_rows(rank, world_size, root, *overrides):
    """In time order the third batch has bad rows only: its loss is 0, and no table changes, optimizer's memory or not."""
    _, loader, built = job(rank, world_size, root, IN_ORDER, *overrides)
    tables = {t.parameter: t.name for t in built.tables}
    before = None
    for number, (loss, outputs) in enumerate(steps(built, loop.batches_from(loader, Progress(), 4), 4)):
        rows, dropped = whole_batch(outputs.cursor)
        assert sorted(rows) == list(range(number * BATCH, (number + 1) * BATCH))
        after = {key: gather_table(built.task, name) for key, name in tables.items()}
        assert (loss == 0) == dropped.all() == (number == 2)
        if before is not None:
            assert all(torch.equal(before[key], after[key]) for key in after) == (number == 2)
        before = after


def check(rank, world_size, root, folder):
    table, bad = broadcast(bad_log(root) if rank == 0 else None)
    counts = [
        check_against_plain(rank, world_size, root, folder, table, bad, "model=din"),
        check_against_plain(rank, world_size, root, folder, table, bad, "model=deepfm", IN_ORDER),
    ]
    check_batch_without_rows(rank, world_size, root, "model=wide_deep")  # FTRL, AdaGrad
    return counts, int(bad.sum())


def whole_batch(cursor):
    """The rows of a step over all ranks, and which were left out."""
    found = [None] * dist.get_world_size()
    dropped = np.zeros(cursor.local_rows, bool) if cursor.dropped is None else cursor.dropped
    dist.all_gather_object(found, (cursor.origin, dropped))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def broadcast(value):
    payload = [value]
    dist.broadcast_object_list(payload, src=0)
    return payload[0]


def test_dropped_rows_train_nothing_and_the_rest_as_if_they_were_alone(click_log, tmp_path):
    found = run_distributed(check, 2, click_log, tmp_path)
    for counts in zip(*(counts for counts, _ in found)):
        assert sum(counts) == 2 * found[0][1]  # two epochs, both ranks
