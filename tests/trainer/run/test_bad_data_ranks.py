"""Bad input on several ranks: the rows D7, D9 to D11, D15, D17, D18 and D28 of the failure matrix, trained through the
pipeline. The others, and these in one process: tests/data_loaders/test_bad_data.py.

All sub-cases of one number of ranks run in one launch. What they share: every rank takes the same number of steps, each
loss is the mean over the rows that count, and every table and layer is finite afterwards.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional

from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table
from tests.helpers import tiny
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer.checkpoint import clean, verify
from trainer.config.compose import check_model
from trainer.config.data import DataConfig, StreamConfig
from trainer.config.job import TrainConfig
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.models.construct import build_model
from trainer.run import build
from trainer.runtime.distributed import Ranks, all_reduce_sum

ROWS = 60
ITEMS = 10  # rows of the item table, of which good ids are 2 … 8: 0, 1 and 9 must not be touched
UNTOUCHED = [0, 1, 9]
BAD_IDS = [-1, -5, -(2**63), ITEMS, ITEMS + 1, 10**12, 2**63 - 1]
LAYOUTS = ("table_wise", "row_wise", "column_wise", "data_parallel")
BATCH = 12
# The second batch loses most of its rows, the third all of them.
LABELS = [None if i % 5 == 0 or 14 <= i < 23 or 24 <= i < 36 else i % 2 for i in range(ROWS)]


def log(rows=ROWS, first=0, **columns):
    ids = list(range(first, first + rows))
    return pa.table(
        {
            "label": pa.array([i % 2 for i in ids], "int8"),
            "price": pa.array([0.1 * (i % 10) for i in ids]),
            "item": pa.array([2 + i % 7 for i in ids], "int64"),
            "past": pa.array([[2 + j for j in range(i % 4)] for i in ids], pa.list_(pa.int64())),
            **columns,
        }
    )


def schema(on_bad_label="error", item=None, price=None):
    features = {
        "price": Feature("dense", **(price or {})),
        "item": Feature("sparse", table="item", **(item or {})),
        "past": Feature("sequence", table="item", max_length=3, target="item"),
    }
    return Schema(on_bad_label=on_bad_label, embedding_dim=8, tables={"item": Table(ITEMS)}, features=features)


def write(folder, table, sizes=(ROWS,)):
    """Row groups of these sizes; 0 is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(folder / "a.parquet", table.schema) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return folder


def configuration(given, root, model, layout):
    by_table = {"wide_item": "table_wise"} if layout == "column_wise" else {}  # 4 columns cannot be cut
    sgd = TableOptimizerConfig("sgd", lr=0.5)
    return TrainConfig(
        model=check_model({"name": model, "hidden_units": [8]}),
        data=DataConfig(name="bad", root=str(root), train=["."], schema=given, stream=StreamConfig(shards=BATCH)),
        optim=OptimConfig(tables=sgd, wide=sgd),
        sharding=ShardingConfig(types=[layout], by_table=by_table),
        device="cpu",
        precision="fp32",
        batch_size=BATCH,
    )


def train(rank, world_size, given, root, *, model="deepfm", layout="table_wise", shuffle=False):
    """An epoch. Returns the global losses, the rows trained step by step (of each rank, and of all), the counters, and the
    item table before and after."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    config = configuration(given, root, model, layout)
    built_model = build_model(config.model, given, config.seed, build.execution(config, world_size))
    columns = ["label", *given.columns(built_model.layout)]
    manifest = Manifest.scan(["."], str(root), columns)
    loader = Loader(
        manifest,
        given,
        built_model.layout,
        batch_size=BATCH,
        shards=BATCH,
        shuffle=shuffle,
        shuffle_rows=24,
        threads=1,
        prefetch_batches=2,
        rank=rank,
        world_size=world_size,
        seed=1,
        record_origin=True,
    )
    built = build.build(config, built_model, ranks, loader.local_batch_size, total_steps=100)
    before = tables_of(built)
    losses, ledger, batches = [], [], loader.epoch(0)
    while True:
        try:
            outputs = built.pipeline.progress(batches)
        except StopIteration:
            break
        losses.append(checked_loss(outputs, world_size))
        ledger.append(outputs.cursor.origin.tolist())
        assert len(outputs.logits) == loader.local_batch_size and outputs.logits.isfinite().all()
    assert len(losses) == loader.steps_per_epoch
    after = tables_of(built)
    dense = [value for value in built.task.state_dict().values() if not isinstance(value, ShardedTensor)]
    assert all(value.isfinite().all() for value in (*dense, *after.values()))
    gathered = [None] * world_size
    dist.all_gather_object(gathered, (ledger, loader.counters))
    ledgers = [part for part, _ in gathered]
    steps = [sum(parts, []) for parts in zip(*ledgers, strict=True)]
    counters = {}
    for _, found in gathered:
        for key, count in found.items():
            counters[key] = counters.get(key, 0) + count
    tables = {"before": before["item"], "after": after["item"]}
    return {"losses": losses, "ledgers": ledgers, "steps": steps, "counters": counters, **tables}


def tables_of(built):
    return {table.name: gather_table(built.task, table.name) for table in built.tables}


def checked_loss(outputs, world_size):
    """The global loss of a step, after holding it against the mean over all ranks' rows that count."""
    losses = functional.binary_cross_entropy_with_logits(outputs.logits, outputs.labels, reduction="none").double()
    counts = outputs.weights > 0
    sums = all_reduce_sum(torch.stack([losses[counts].sum(), counts.double().sum()]))
    loss = all_reduce_sum(outputs.loss.double().clone()).item() / world_size
    expected = (sums[0] / sums[1].clamp(min=1)).item()
    assert loss == pytest.approx(expected, abs=1e-6), (loss, expected)
    return loss


DROP_NUMBERS = {"on_non_finite": "drop", "on_null": "drop"}
POLICIES = {
    "missing": {"on_out_of_range": "missing"},
    "missing_id": {"on_out_of_range": "missing", "missing_id": 4},
    "drop": {"on_out_of_range": "drop"},
}
# Case: (numbers of ranks, schema, folder, further arguments of ``train``).
CASES = {
    "d07": ((1, 2, 3), schema("drop"), "labels", {}),
    "d07 shuffled": ((1, 2), schema("drop"), "labels", {"shuffle": True}),
    "d09 fill": ((1, 2), schema(price={"fill": 0.5}), "numbers", {}),
    "d09 drop": ((1, 2), schema(price=DROP_NUMBERS), "numbers", {}),
    "d10 null missing": ((2,), schema(), "null ids", {}),
    "d10 null drop": ((2,), schema(item={"on_null": "drop"}), "null ids", {}),
    "d15 full": ((1, 2), schema(), "full", {}),
    "d15 holes": ((2,), schema(), "holes", {}),
    "d17": ((1, 3), schema(), "one", {}),
    "d18": ((1, 2, 3), schema(), "unequal", {"shuffle": True}),
    "d18 in order": ((2, 3), schema(), "unequal", {}),
    "d28 some": ((1, 2), schema(), "history", {"model": "din"}),
    "d28 none": ((2,), schema(), "no history", {"model": "din"}),
    **{
        f"d10 {policy} {layout}": ((2,), schema(item=item), "ids", {"layout": layout})
        for policy, item in POLICIES.items()
        for layout in LAYOUTS
    },
}


def on_ranks(rank, world_size, root):
    """All results that need this number of ranks, by case."""
    wanted = {name: case for name, (sizes, *case) in CASES.items() if world_size in sizes}
    found = {
        name: train(rank, world_size, given, root / folder, **options)
        for name, (given, folder, options) in wanted.items()
    }
    if world_size == 2:
        found["d10 error"] = refusal(rank, world_size, root / "ids")
    return found


def refusal(rank, world_size, root):
    """The messages of all ranks that refuse an epoch: those that meet a bad id."""
    given = schema()
    layout = given.layout()
    manifest = Manifest.scan(["."], str(root), ["label", *given.columns(layout)])
    loader = Loader(
        manifest,
        given,
        layout,
        batch_size=BATCH,
        shards=BATCH,
        shuffle=False,
        shuffle_rows=24,
        threads=1,
        prefetch_batches=2,
        rank=rank,
        world_size=world_size,
        seed=1,
    )
    try:
        list(loader.epoch(0))
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    bad = {i: BAD_IDS[n % len(BAD_IDS)] for n, i in enumerate(range(3, ROWS, 4))}
    numbers = [[0.5, math.nan, math.inf, -math.inf, None, 1e300][i % 6] for i in range(ROWS)]
    write(folder / "labels", log(label=pa.array(LABELS, "int8")))
    write(folder / "numbers", log(price=pa.array(numbers, "float64")))
    write(folder / "ids", log(item=pa.array([bad.get(i, 2 + i % 7) for i in range(ROWS)], "int64")))
    write(folder / "null ids", log(item=pa.array([None if i in bad else 2 + i % 7 for i in range(ROWS)], "int64")))
    write(folder / "full", log())
    write(folder / "holes", log(), (0, 7, 0, 0, 53, 0))
    pq.write_table(log().slice(0, 0), folder / "holes" / "0.parquet")
    pq.write_table(log().slice(0, 0), folder / "holes" / "b.parquet")
    write(folder / "one", log(1, first=5), (1,))
    for name, first, rows in (("a", 0, 1), ("b", 1, 150), ("c", 151, 2)):
        write(folder / "unequal" / name, log(rows, first=first), (rows,))
    halves = [[] if i % BATCH < BATCH // 2 else [2, 3] for i in range(ROWS)]  # one rank of two has none
    write(folder / "history", log(past=pa.array(halves, pa.list_(pa.int64()))))
    write(folder / "no history", log(past=pa.array([None, []] * (ROWS // 2), pa.list_(pa.int64()))))
    return folder


@pytest.fixture(scope="module")
def runs(root):
    return {world_size: run_distributed(on_ranks, world_size, root) for world_size in (1, 2, 3)}


def results(runs, world_size, case):
    """Of the first rank, after checking that all ranks agree."""
    first, *others = (rank[case] for rank in runs[world_size])
    for other in others:
        assert other["losses"] == first["losses"] and other["steps"] == first["steps"]
        assert torch.equal(other["after"], first["after"])
    return first


@pytest.mark.parametrize("case", [name for name, (sizes, *_) in CASES.items() if 1 in sizes])
def test_losses_tables_and_counts_do_not_depend_on_the_number_of_ranks(runs, case):
    expected = results(runs, 1, case)
    for world_size in CASES[case][0][1:]:
        found = results(runs, world_size, case)
        assert [sorted(step) for step in found["steps"]] == [sorted(step) for step in expected["steps"]]
        np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-5)
        torch.testing.assert_close(found["after"], expected["after"], rtol=0, atol=1e-5)
        assert found["counters"] == expected["counters"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_d07_rows_with_bad_labels_are_left_out_and_steps_stay_equal(runs, world_size):
    found = results(runs, world_size, "d07")
    assert len(found["losses"]) == ROWS // BATCH
    assert found["counters"]["rows.dropped"] == sum(label is None for label in LABELS)
    assert [sorted(step) for step in found["steps"]] == [list(range(k, k + BATCH)) for k in range(0, ROWS, BATCH)]
    assert [loss == 0 for loss in found["losses"]] == [False, False, True, False, False]  # a step without any row
    if world_size == 2:
        shuffled = results(runs, 2, "d07 shuffled")
        assert shuffled["counters"] == found["counters"] and sorted(sum(shuffled["steps"], [])) == list(range(ROWS))


def test_d09_numbers_that_are_not_finite_reach_no_table(runs):
    """That all tables and layers are finite is checked on the ranks."""
    counters = {"price.non_finite": 40, "price.null": 10}
    assert results(runs, 2, "d09 fill")["counters"] == counters
    found = results(runs, 2, "d09 drop")
    assert found["counters"] == {**counters, "rows.dropped": 50}
    assert all(math.isfinite(loss) for loss in found["losses"])


@pytest.mark.parametrize("policy", POLICIES)
def test_d10_d11_ids_outside_the_table_do_the_same_in_every_layout_and_touch_no_row(runs, policy):
    expected = results(runs, 2, f"d10 {policy} table_wise")
    bad = len(range(3, ROWS, 4))
    counters = {"item.out_of_range": bad, **({"rows.dropped": bad} if policy == "drop" else {})}
    for layout in LAYOUTS:
        found = results(runs, 2, f"d10 {policy} {layout}")
        assert found["counters"] == counters
        assert torch.equal(found["after"][UNTOUCHED], found["before"][UNTOUCHED])
        assert not (found["after"] == found["before"]).all(dim=1)[2:9].any()
        np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-6)
        torch.testing.assert_close(found["after"], expected["after"], rtol=0, atol=1e-6)
    if policy != "missing_id":  # as if the ids had not been there at all
        null = results(runs, 2, f"d10 null {policy}")
        assert null["losses"] == expected["losses"] and torch.equal(null["after"], expected["after"])


def test_d10_d11_ids_outside_the_table_are_an_error_by_default(runs):
    messages = [rank["d10 error"] for rank in runs[2]]
    assert any(messages)
    for message in filter(None, messages):
        for part in ("a.parquet', row group 0, row ", "'item'", "has id ", "rows 0 … 9", "on_out_of_range", "mend"):
            assert part in message


def test_d15_files_and_row_groups_without_rows_change_nothing(runs):
    full, holes = (results(runs, 2, f"d15 {what}") for what in ("full", "holes"))
    assert holes["steps"] == full["steps"] and holes["losses"] == full["losses"]
    assert torch.equal(holes["after"], full["after"])


def test_d17_one_row_on_three_ranks_is_one_padded_step_and_trains_that_row(runs):
    """That its loss is the row's is checked on the ranks, and against one rank."""
    found = results(runs, 3, "d17")
    assert found["steps"] == [[0]] and len(found["losses"]) == 1
    touched = (found["after"] != found["before"]).any(dim=1)
    assert touched.nonzero().flatten().tolist() == [2, 7]  # the history 2, the item 2 + 5


@pytest.mark.parametrize("world_size", [2, 3])
def test_d18_unequal_files_are_trained_row_by_row_once(runs, world_size):
    for case in ("d18", "d18 in order"):
        found = results(runs, world_size, case)
        assert len(found["steps"]) == -(-153 // BATCH)
        assert sorted(sum(found["steps"], [])) == list(range(153))
    in_order = [sorted(step) for step in results(runs, world_size, "d18 in order")["steps"]]
    assert in_order == [list(range(k, min(k + BATCH, 153))) for k in range(0, 153, BATCH)]


def test_d28_empty_histories_on_one_rank_or_all_are_finite(runs):
    """That logits and tables are, is checked on the ranks."""
    with_none, _ = results(runs, 2, "d28 some")["ledgers"]
    assert all(i % BATCH < BATCH // 2 for i in sum(with_none, []))
    for case in ("d28 some", "d28 none"):
        assert all(math.isfinite(loss) for loss in results(runs, 2, case)["losses"])


def test_a_bad_value_in_mid_epoch_ends_both_ranks_in_one_line(click_log, tmp_path):
    folder = Path(shutil.copytree(click_log, tmp_path / "log"))
    path = sorted((folder / "train").glob("*.parquet"))[1]
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    labels[507] = 2
    bad = table.set_column(table.column_names.index("label"), "label", pa.array(labels, "int8"))
    pq.write_table(bad, path, row_group_size=250)
    run = tmp_path / "run"
    done = tiny.train(2, folder, run, "checkpoint.every_steps=1", "data.stream.shuffle_rows=240")
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for part in (f"{path.name}', row group 2, row 7", "label 'label' is 2", "0 or 1", "mend"):
        assert part in line
    assert "Traceback" not in done.stderr.split("error: ")[0]
    clean(run / "checkpoints")  # of what was being written in that instant, as the next start does
    for checkpoint in (run / "checkpoints").glob("*"):
        assert checkpoint.name.startswith("step-") and verify(checkpoint) is None
