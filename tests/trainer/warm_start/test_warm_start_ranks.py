"""A warm start through the program's own checkpoints: the same model on any number of ranks, under any plan; a dry run
that changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from tests.helpers import tiny
from tests.helpers.jobs import built_job, ranks_of, state_of
from tests.helpers.model_states import assembled
from tests.helpers.old_runs import vocabulary
from tests.helpers.ranks import run_distributed
from trainer.checkpoint.format import Reader
from trainer.checkpoint.saving import Checkpoints
from trainer.config.warm_start import WarmStartConfig
from trainer.run import loop
from trainer.run.resume import job_identity
from trainer.runtime.progress import Progress
from trainer.warm_start.start import warm_start, whole_checkpoint

MODEL = ["model=wide_deep", "model.hidden_units=[8]"]
GROWN = ["data.schema.tables.item.num_embeddings=261", "seed=5"]
PLANS = {1: ("table_wise",), 2: ("row_wise", "table_wise", "column_wise"), 3: ("row_wise",)}
STEPS = 3
WIDE = ("user_id", "item_id", "category_id", "hour", "tags", "hour_x_category")
BEFORE, NOW = "abcdefghijklmnop", "xponmlkyjihgfedz"  # values of table category; a, b and c are gone
ROWS = [0, 1, *(2 + BEFORE.index(value) if value in BEFORE else -1 for value in NOW), -1, -1]


def save_old_run(root, folder):
    """On one rank: a checkpoint after a few steps, as the program writes them."""
    ranks = ranks_of(0, 1)
    config, _, loader, built = built_job(root, 0, 1, MODEL)
    progress = Progress()
    batches = loop.batches_from(loader, progress, STEPS)
    for _ in range(STEPS):
        progress.advance(built.pipeline.progress(batches).cursor)
    batches.close()
    tree = tiny.job(root, *MODEL).tree
    state, identity = state_of(built, loader, ranks), job_identity(config, tree)
    texts = {"config.yaml": yaml.safe_dump(tree)}
    (folder / "checkpoints").mkdir()
    Checkpoints(folder / "checkpoints", config.checkpoint, state, identity, ranks, texts=texts).save(progress)


def start_new_run(rank, world_size, root, plan, rules, folder):
    """(whole tensors before, and after the warm start, the report)."""
    ranks = ranks_of(rank, world_size)
    by_table = ",".join(f"wide_{key}:table_wise" for key in WIDE)
    cut = [f"+sharding.by_table={{{by_table}}}"] if plan == "column_wise" else []  # rows of 4 columns cannot be cut
    overrides = [*MODEL, *GROWN, f"sharding.types=[{plan}]", *cut, f"data.prepared={folder / 'new_data'}"]
    config, _, loader, built = built_job(root, rank, world_size, overrides)
    pieces = state_of(built, loader, ranks).pieces
    before = assembled(pieces)

    dry = WarmStartConfig(**vars(rules) | {"dry_run": True})
    out = folder / f"{plan}-{world_size}"
    if ranks.is_first:
        out.mkdir()
    source = whole_checkpoint(rules.path, ranks)
    told = warm_start(dry, config, pieces, built.tables, out, ranks, source)
    unchanged = assembled(pieces)
    assert not list(out.iterdir()) and told.table_steps == STEPS
    assert all(torch.equal(unchanged[name][0], values) for name, (values, _) in before.items())

    unexplained = WarmStartConfig(rules.path, prepared=rules.prepared)
    with pytest.raises(ValueError, match=r"tables/item has 261 rows, had 200, and no vocabulary shows its ids: grow"):
        warm_start(unexplained, config, pieces, built.tables, out, ranks, source)
    assert not list(out.iterdir())
    dist.barrier()  # the first rank is about to write there

    done = warm_start(rules, config, pieces, built.tables, out, ranks, source)
    assert done.report == told.report and done.clock_steps == STEPS
    dist.barrier()
    assert json.loads((out / "warm_start.json").read_text()) == json.loads(json.dumps(done.report))
    return before, assembled(pieces), done.report


def start_new_runs(rank, world_size, root, rules, folder):
    if world_size == 1:
        save_old_run(root, folder)
    return {plan: start_new_run(rank, world_size, root, plan, rules, folder) for plan in PLANS[world_size]}


def test_a_warm_start_is_the_same_on_1_2_and_3_ranks_under_every_plan_and_a_dry_run_changes_nothing(
    click_log, tmp_path
):
    vocabulary(tmp_path / "old_data", "category", [*BEFORE])
    vocabulary(tmp_path / "new_data", "category", [*NOW])
    rules = WarmStartConfig(
        str(tmp_path),
        prepared=str(tmp_path / "old_data"),
        grow=["tables/*item*"],
        skip=["tables/wide_hour_x_category"],
        optimizer={"tables/tag": "reset", "tables/hour": "decay=0.5"},
    )
    runs = {n: run_distributed(start_new_runs, n, click_log, rules, tmp_path)[0] for n in PLANS}
    reader = Reader(next(Path(tmp_path / "checkpoints").glob("step-*")))
    initial, first, report = runs[1]["table_wise"]
    assert {it["table"]: it["status"] for it in report["tables"]}["item"] == "grown"
    for found in (run for by_plan in runs.values() for run in by_plan.values()):
        assert found[2] == report
        check_values(reader, initial, found[1])


def check_values(reader, initial, found):
    """Against what a naive reading of the checkpoint gives, from the initial values of a run on one rank."""
    for name, (values, widths) in found.items():
        old, fresh = (None if source is None else source.numpy() for source in (reader.read(name), initial[name][0]))
        if name.split("/")[1] in ("item", "wide_item_id"):
            expected = np.concatenate([old, fresh[200:]])
        elif name.split("/")[1] in ("category", "wide_category_id"):
            expected = np.stack([fresh[row] if before < 0 else old[before] for row, before in enumerate(ROWS)])
        elif name.split("/")[1] == "wide_hour_x_category" or name == "tables/tag/sum":
            expected = fresh
        else:
            expected = old * np.float32(0.5) if name == "tables/hour/sum" else old
        expected = np.broadcast_to(expected, values.shape)  # row-wise AdaGrad's sum, once for each part of a row
        np.testing.assert_array_equal(values.numpy(), expected, err_msg=name)
        assert widths is None or sum(widths) == 8
