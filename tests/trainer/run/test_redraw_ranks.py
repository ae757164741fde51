"""Tables that begin anew in each epoch: their values and state, the network beside them, and a run that resumes."""

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.jobs import built_job, ranks_of, state_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer import train
from trainer.checkpoint import Reader
from trainer.modules.embeddings import is_wide_table
from trainer.run import build, loop
from trainer.run.redraw import Redraw
from trainer.runtime.progress import Progress

EPOCH = 13  # 3000 rows by 240
OPTIONS = (
    "model=deepfm",
    "model.hidden_units=[16]",
    "epochs=2",
    "redraw_tables=true",
    "optim.tables={name: adam, lr: 0.01}",
    "+optim.by_table={user: {name: adagrad, lr: 0.1}, hour: {name: rowwise_adagrad, lr: 0.1}}",
    "+sharding.by_table={category: row_wise, tag: data_parallel}",
)


def check_redrawn(rank, world_size, root):
    config, layout, loader, built = built_job(root, rank, world_size, OPTIONS)
    state = state_of(built, loader, ranks_of(rank, world_size))
    first = {table.name: gather_table(built.task, table.name).clone() for table in built.tables}
    manifest, ranks = build.scan(config.data, "train", layout), ranks_of(rank, world_size)
    progress = Progress()
    redraw = Redraw(built, config, manifest, ranks, epoch_steps=EPOCH, total_steps=2 * EPOCH)
    batches = loop.batches_from(loader, progress, EPOCH)
    due = [redraw.is_due(progress)]
    for _ in range(EPOCH):
        progress.advance(built.pipeline.progress(batches).cursor)
        due.append(redraw.is_due(progress))
    batches.close()
    assert due == [False] * EPOCH + [True]
    dense = {name: value.clone() for name, value in built.optimizer._dense_parameters.items()}
    pieces = {piece.name: piece.tensor for piece in state.pieces}
    moments = {name: t.clone() for name, t in pieces.items() if name.startswith("optimizer/")}
    assert any(t.any() for name, t in pieces.items() if name.endswith("/exp_avg"))
    redraw.tables(progress)
    for table in built.tables:
        now = gather_table(built.task, table.name)
        if is_wide_table(table.name):
            assert not now.any()
        else:  # other values of the same law
            assert not torch.isclose(now, first[table.name]).any(dim=1).all()
            assert now.std() == pytest.approx(0.01, rel=0.15)
    for name, tensor in {piece.name: piece.tensor for piece in state.pieces}.items():
        if name.startswith("clock/") or (name.startswith("tables/") and not name.endswith("/weight")):
            assert not tensor.any(), name
        if name.startswith("optimizer/"):
            assert torch.equal(tensor, moments[name])
    assert all(torch.equal(value, dense[name]) for name, value in built.optimizer._dense_parameters.items())
    assert built.optimizer.table_steps == -EPOCH and state.facts()["table_steps"] == -EPOCH
    return {table.name: gather_table(built.task, table.name).clone() for table in built.tables}


def test_rows_and_state_begin_anew_the_network_stays_and_ranks_draw_alike(click_log):
    two, _ = run_distributed(check_redrawn, 2, click_log)
    (one,) = run_distributed(check_redrawn, 1, click_log)
    assert all(torch.equal(two[name], one[name]) for name in one)


def test_a_run_that_stops_wherever_it_likes_ends_as_one_that_does_not(click_log, tmp_path):
    def run(name, *more):
        return train(tiny.job(click_log, *OPTIONS[:-1], f"run.dir={tmp_path / name}", *more))

    whole = run("whole")
    for steps in (5, EPOCH, EPOCH + 1):
        run("parts", f"steps={steps}")
    parts = run("parts")
    assert parts.metrics["test"]["logloss"] == whole.metrics["test"]["logloss"]
    readers = [Reader(next((tmp_path / name / "checkpoints").glob("step-26"))) for name in ("whole", "parts")]
    names = [name for name in readers[0].names if name.startswith(("tables/", "dense/", "optimizer/", "clock/"))]
    assert len(names) > 20 and all(torch.equal(*(reader.read(name) for reader in readers)) for name in names)
    kept = run("kept", "redraw_tables=false")
    assert kept.metrics["test"]["logloss"] != whole.metrics["test"]["logloss"]
