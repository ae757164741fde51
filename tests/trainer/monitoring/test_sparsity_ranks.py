"""The share of linear weights that are not 0, counted over the shards of all ranks."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.jobs import built_job, ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer.monitoring.sparsity import wide_weights
from trainer.run import loop
from trainer.runtime.progress import Progress

PLANS = {
    "row-wise": ["sharding.types=[row_wise]"],
    "table-wise": ["sharding.types=[table_wise]"],
    "replicated": ["optim.wide={name: adagrad, lr: 0.05}", "+sharding.by_table.wide_user_id=data_parallel"],
}


def train(root: str, rank: int, world_size: int, overrides: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """What is reported after six steps, and the rows of all wide tables."""
    _, _, loader, built = built_job(root, rank, world_size, overrides)
    batches = loop.batches_from(loader, Progress(), 6)
    for _ in range(6):
        built.pipeline.progress(batches)
    batches.close()
    names = [table.name for table in built.tables if table.name.startswith("wide_")]
    tables = {name: gather_table(built.task, name) for name in names}
    return wide_weights(built.task, built.tables, ranks_of(rank, world_size)), tables


def measure(rank: int, world_size: int, root: str) -> dict[str, Any]:
    found = {name: train(root, rank, world_size, ["model=wide_deep", *plan]) for name, plan in PLANS.items()}
    _, _, _, without = built_job(root, rank, world_size, ["model=din"])
    return {"plans": found, "without": wide_weights(without.task, without.tables, ranks_of(rank, world_size))}


@pytest.fixture(scope="module")
def results(click_log) -> dict[int, list[Mapping[str, Any]]]:
    return {n: run_distributed(measure, n, click_log) for n in (1, 2)}


@pytest.mark.parametrize("plan", PLANS)
def test_every_weight_is_counted_once_and_alike_on_every_rank(results, plan):
    for ranks in results.values():
        values, tables = ranks[0]["plans"][plan]
        weights = torch.cat([table[:, 0] for table in tables.values()])
        assert values["rows"] == len(weights) and values["nonzero"] == int((weights != 0).sum()) > 0
        assert values["share"] == values["nonzero"] / values["rows"]
        assert values["by_table"] == {n: float((t[:, 0] != 0).double().mean()) for n, t in tables.items()}
        assert all(rank["plans"][plan][0] == values for rank in ranks)
    assert results[1][0]["plans"][plan][0] == results[2][0]["plans"][plan][0]


def test_ftrl_tells_how_many_of_the_trained_rows_are_left(results):
    values, tables = results[2][0]["plans"]["row-wise"]
    trained = sum(int((table[:, 2] > 0).sum()) for table in tables.values())
    assert values["trained"] == trained > values["nonzero"]
    assert values["share_of_trained"] == values["nonzero"] / trained < 1
    assert "trained" not in results[2][0]["plans"]["replicated"][0]


def test_a_model_without_a_linear_part_has_none(results):
    assert results[2][0]["without"] is None


def test_more_l1_leaves_fewer_weights_in_metrics_json_and_the_summary(click_log, tmp_path):
    shares = []
    for l1 in (0.0, 0.01):
        run = tmp_path / f"l1-{l1}"
        done = tiny.train(
            1, click_log, run, "model=lr", f"optim.wide.l1={l1}", "epochs=1", "sharding.types=[table_wise]"
        )
        assert done.returncode == 0, done.stderr
        wide = json.loads((run / "metrics.json").read_text())["wide"]
        shares.append(wide["share_of_trained"])
        assert f"{wide['nonzero']:,} of {wide['rows']:,} ({wide['share']:.1%})" in done.stdout
    assert shares[0] > 0.9 > 0.6 > shares[1]
