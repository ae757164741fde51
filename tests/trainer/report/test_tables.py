"""Table statistics against the ids that were really looked up, on 1 and 2 ranks, whatever the sharding."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.jobs import built_job, ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer.report import table_statistics as module
from trainer.report.table_statistics import QUANTILES, sampled_rows, table_statistics
from trainer.run import loop
from trainer.runtime.progress import Progress
from trainer.sharding.model_state import model_pieces

STEPS, MOST = 6, 64
SGD = ["optim.tables={name: sgd, lr: 0.1}", "optim.wide={name: sgd, lr: 0.1}"]
JOBS = {
    "row-wise": ["model=deepfm", "sharding.types=[row_wise]"],
    "table-wise, FTRL": ["model=wide_deep", "sharding.types=[table_wise]"],
    "AdaGrad": ["model=deepfm", "optim.tables.name=adagrad", "sharding.types=[table_wise]"],
    "mixed": ["model=deepfm", "+sharding.by_table={user: data_parallel, item: row_wise, wide_user_id: data_parallel}"],
    "cut": ["model=deepfm", "+sharding.by_table={user: column_wise, item: column_wise}"],
    "SGD": ["model=deepfm", *SGD],
    "decayed": [
        "model=deepfm",
        "+sharding.by_table={user: data_parallel}",
        "+optim.by_table={user: {name: adagrad, lr: 0.1, weight_decay: 0.01, weight_decay_rows: all}}",
    ],
}
ON_TWO = ("cut",)  # a table is not cut for one rank


def seen_of(batches: Iterator[Any], seen: dict[str, set[int]]) -> Iterator[Any]:
    for batch in batches:
        for kjt in (batch.sparse, batch.sequence):
            for key in kjt.keys() if kjt is not None else ():
                seen.setdefault(key, set()).update(kjt[key].values().tolist())
        yield batch


def train(root: str, rank: int, world_size: int, overrides: list[str]) -> dict[str, Any]:
    """After some steps: the statistics, those of a sample; and for each table its rows and the ids that came."""
    config, layout, loader, built = built_job(root, rank, world_size, overrides)
    mine: dict[str, set[int]] = {}
    batches = loop.batches_from(loader, Progress(), STEPS)
    for _, steps in zip(range(STEPS), [seen_of(batches, mine)] * STEPS):
        built.pipeline.progress(steps)
    batches.close()
    every: list[dict[str, set[int]]] = [{}] * world_size
    dist.all_gather_object(every, mine)
    tables, pieces = built.tables, [*model_pieces(built.task, built.tables), *built.optimizer.pieces()]
    parts = (tables, pieces, config.data.schema, ranks_of(rank, world_size))
    whole = table_statistics(*parts)
    module.CHUNK = 100  # a few rows at a time
    chunked, sampled = table_statistics(*parts), table_statistics(*parts, most_rows=MOST)
    naive = {}
    for table in tables:
        ids = set().union(*(ranks.get(feature, set()) for ranks in every for feature in table.features))
        naive[table.name] = (gather_table(built.task, table.name), ids)
    return {"whole": whole, "chunked": chunked, "sampled": sampled, "naive": naive}


def measure(rank: int, world_size: int, root: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        name: train(root, rank, world_size, job) for name, job in JOBS.items() if world_size > 1 or name not in ON_TWO
    }


@pytest.fixture(scope="module")
def results(click_log) -> dict[int, list[dict[str, Any]]]:
    return {n: run_distributed(measure, n, click_log) for n in (1, 2)}


def cases():
    return [(n, name) for n in (1, 2) for name in JOBS if n > 1 or name not in ON_TWO]


def check(values: dict[str, Any], rows: Tensor, ids: set[int], places: list[int]) -> None:
    """``values`` of one table against its ``rows``, of which those at ``places`` were looked at."""
    norms = rows.double()[:, 0].abs() if values["table"].startswith("wide_") else rows.double().norm(dim=1)
    trained = torch.tensor([row in ids for row in range(len(rows))])
    assert values["rows"] == len(rows) and values["sampled"] == len(places)
    assert values["trained"] == pytest.approx(trained[places].double().mean().item())
    assert values["missing_row_trained"] == (
        bool(trained[values["missing_row"]]) if values["missing_row"] is not None else None
    )
    for part, mask in (("trained", trained), ("never_trained", ~trained)):
        expected = norms[places][mask[places]].numpy()
        assert (part in values["norms"]) == bool(len(expected))
        if len(expected):
            assert values["norms"][part]["mean"] == pytest.approx(expected.mean(), rel=1e-5)
            np.testing.assert_allclose(values["norms"][part]["quantiles"], np.quantile(expected, QUANTILES), rtol=1e-5)


@pytest.mark.parametrize(("world_size", "job"), [case for case in cases() if case[1] not in ("SGD", "decayed")])
def test_rows_trained_are_those_whose_ids_came(results, world_size, job):
    found = results[world_size][0][job]
    assert {values["table"] for values in found["whole"]} == set(found["naive"])
    some = set()
    for values, sample in zip(found["whole"], found["sampled"], strict=True):
        rows, ids = found["naive"][values["table"]]
        check(values, rows, ids, list(range(len(rows))))
        check(sample, rows, ids, sampled_rows(len(rows), MOST).tolist())
        some.add(0 < values["trained"] < 1)
    assert some == {True, False} or some == {True}, "not all of all tables"
    sizes = [values["rows"] * values["dim"] for values in found["whole"] if values["dim"] > 1]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("world_size", "job"), cases())
def test_chunks_change_nothing_and_only_rank_0_has_values(results, world_size, job):
    ranks = results[world_size]
    assert ranks[0][job]["chunked"] == ranks[0][job]["whole"]
    assert all(rank[job]["whole"] == [] for rank in ranks[1:])
    json.dumps(ranks[0][job]["whole"], allow_nan=False)


def test_without_state_it_is_unknown_which_rows_were_trained(results):
    for world_size in (1, 2):
        for values in results[world_size][0]["SGD"]["whole"]:
            assert values["trained"] is None and list(values["norms"]) == ["all"]
            rows, _ = results[world_size][0]["SGD"]["naive"][values["table"]]
            norms = rows[:, 0].abs() if values["table"].startswith("wide_") else rows.norm(dim=1)
            assert values["norms"]["all"]["mean"] == pytest.approx(norms.double().mean().item(), rel=1e-5)
        known = {values["table"]: values["trained"] for values in results[world_size][0]["decayed"]["whole"]}
        assert known["user"] is None and known["item"] > 0


def test_a_table_of_hashed_ids_has_a_row_for_missing_ones(results):
    rows = {values["table"]: values["missing_row"] for values in results[1][0]["table-wise, FTRL"]["whole"]}
    assert rows["user"] == 0 and rows["wide_user_id"] == 0 and rows["wide_hour_x_category"] == 0
    assert rows["item"] is None and rows["hour"] is None and rows["wide_item_id"] is None
