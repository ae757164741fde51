"""Plans for clusters that are not here: what fits, where, how large, how long, and what would help."""

import io
import json

import pytest
import torch

from data_loaders.manifest import Manifest
from tests.helpers import tiny, warm
from trainer.config.compose import compose
from trainer.models import load_model_class
from trainer.models.construct import build_model
from trainer.modules.execution import PLAIN
from trainer.modules.task import ClickTask
from trainer.plan.__main__ import start
from trainer.plan.advice import advice
from trainer.plan.dense import DensePart, _batch, _measure, _small
from trainer.plan.estimate import HELD, Planned
from trainer.plan.smallest import cluster_sizes, smallest_cluster
from trainer.plan.step import HOST_MS, LOOKUP, all_reduce_ms
from trainer.run import build
from trainer.runtime.distributed import Ranks
from trainer.sharding import planner
from trainer.sharding.hardware import GIB, Cluster, Hardware, parse_cluster

HERE = Hardware("CPU", "cpu", 8 * GIB, 8 * GIB, 1e10, 3e9, 1e9, 1e11, bf16=False)
NO_CLOCK = ("optim.tables.clock=false", "optim.wide.clock=false")
USERS = "data.schema.tables.user.num_embeddings="
FILLER = "data=synthetic"


def planned(topology, *overrides, model="deepfm"):
    config = compose([f"model={model}", FILLER, "data.root=.", "precision=fp32", *overrides]).config
    cluster = parse_cluster(topology, HERE)
    return Planned.of(config, cluster), cluster


def test_bytes_of_a_rank_are_those_of_its_shards_by_hand():
    overrides = ["model.hidden_units=[8]", "optim.wide.name=adam", f"{USERS}1_000_000", "sharding.types=[row_wise]"]
    overrides += [f"+sharding.by_table.{name}=table_wise" for name in ("device", "wide_device", "hour", "wide_hour")]
    job, cluster = planned("8xH100", *overrides, "+optim.by_table={item: {name: sgd}}")
    estimate = job.estimate(cluster)
    rows = {row["table"]: row for row in estimate.tables}
    assert rows["user"]["bytes"] == {str(rank): 125_000 * (16 * 4 + 4 + 4) for rank in range(8)}
    assert rows["wide_user_id"]["bytes"] == {
        str(rank): 125_000 * (4 * 4 * 3 + 4) for rank in range(8)
    }  # and two moments
    assert rows["item"]["bytes"] == {str(rank): 2_500 * (64 + 4) for rank in range(8)}
    for rank, held in enumerate(estimate.memory):
        by_table = sum(row["bytes"].get(str(rank), 0) for row in estimate.tables)
        assert held["tables"] + held["optimizer_state"] == by_table
        assert set(held) == set(HELD)
    assert estimate.fits and rows["device"]["why"] == "set by sharding.by_table.device"


def test_the_plan_is_the_one_that_a_run_makes():
    job, cluster = planned("8xH100", "sharding.hbm_gb=50")
    made = planner.find_plan(
        job.task, list(job.tables.values()), job.config.sharding, cluster.hardware, batch_size=512,
        device=torch.device("cuda"), world_size=8, local_world_size=8, ids_per_row=job.lengths,
    )  # fmt: skip
    planned_rows = {row["table"]: (row["sharding"], row["bytes"]) for row in job.estimate(cluster).tables}
    rows = [table.summary() for table in made.plan.tables]
    assert planned_rows == {row["table"]: (row["sharding"], row["bytes"]) for row in rows}


def test_half_tables_are_read_in_half_and_exchanged_as_fp32():
    everywhere = [FILLER, "model=embedding_mlp", "data.root=.", "precision=fp32", "sharding.types=[row_wise]"]
    tables = compose(everywhere).config.data.schema.tables
    found, whole = (
        Planned.of(compose([*everywhere, *half]).config, cluster).estimate(cluster)
        for cluster in [parse_cluster("2xH100", HERE)]
        for half in ([f"data.schema.tables.{table}.dtype=fp16" for table in tables], [])
    )
    for part in ("exchange_forward", "exchange_backward"):
        assert found.step[part] == pytest.approx(whole.step[part]) and found.step[part] > 0
    assert found.step["lookup"] < 0.8 * whole.step["lookup"]
    assert sum(rank["tables"] for rank in found.memory) < 0.6 * sum(rank["tables"] for rank in whole.memory)


@pytest.mark.parametrize(
    ("dim", "ranks", "width"),
    [(128, 2, 64), (128, 512, 32), (256, 2, 128), (1024, 4, 256), (1024, 512, 128), (16, 2, 8), (16, 64, 4), (4, 2, 4)],
)
def test_columns_are_not_cut_into_crumbs(dim, ranks, width):
    assert planner.column_width(dim, ranks) == width


def test_a_rank_has_the_rows_that_the_loader_gives_it(tmp_path):
    config = tiny.job(tiny.write_log(tmp_path), "model=deepfm").config
    layout = build_model(config.model, config.data.schema, 0).layout
    manifest = Manifest.scan(config.data.train, config.data.root, [*config.data.schema.columns(layout), "label"])
    for ranks in (1, 2, 5, 12):
        who = Ranks(0, ranks, 0, ranks, torch.device("cpu"))
        loader, _ = build.build_train_loader(config.data, layout, config.batch_size, 0, who, manifest)
        assert Planned.of(config, Cluster(HERE, 1, ranks)).local_batch_size(ranks) == loader.local_batch_size


def test_the_dense_part_computes_what_its_layers_multiply():
    job, _ = planned("1xH100", "model.hidden_units=[32,16]", model="deepfm")
    inputs = (
        8 + 2
    ) * 16 + 2  # single ids and bags, sequences, each of 16 columns; numbers, folded into the first layer
    filled = -(-inputs // 16) * 16  # with columns of zeros
    weights = filled * 32 + 32 * 16 + 16
    # The numbers' vectors and their squares, in backward: PyTorch counts no product in place, as forward's is.
    machine = 2 * (2 * 16 + 2)
    # Of layers: forward, and twice that in backward.
    assert job.dense.cost(1000).operations == 1000 * (6 * weights + machine)


def test_the_dense_part_grows_in_straight_lines():
    config = compose(["model=din", FILLER, "data.root=.", "precision=fp32"]).config
    lengths = planner.ids_per_row(config.data.schema)
    part, schema = DensePart(config, lengths, PLAIN), _small(config.data.schema)
    model = load_model_class("din")(
        schema, **{key: value for key, value in config.model.items() if key != "name"}, device=torch.device("cpu")
    )
    direct = _measure(ClickTask(model), _batch(schema, model.layout, lengths, 300))
    assert part.cost(300).operations == pytest.approx(direct.operations, rel=1e-6)
    assert part.cost(300).activations == pytest.approx(direct.activations, rel=0.01)


def test_the_activations_of_a_network_are_its_layers_outputs():
    job, _ = planned("1xH100", "model.hidden_units=[256,256]", model="fnn")
    few, more = (job.dense.cost(rows).activations for rows in (1000, 2000))
    layers = 4 * (2 * 256)  # bytes a row that ReLU keeps
    assert layers < (more - few) / 1000 < 6 * layers


def test_bf16_keeps_less_and_old_devices_have_none():
    job, _ = planned("8xH100", "precision=auto")
    old, _ = planned("8xT4", "precision=auto")
    # A hidden layer's outputs take half; the first layer's inputs and the factorization machine's stay float32.
    assert job.dense.cost(4096).activations < 0.9 * old.dense.cost(4096).activations


def test_what_does_not_fit_is_told_with_the_cluster_that_would_do():
    job, cluster = planned("8xH100", f"{USERS}8_000_000_000", *NO_CLOCK)
    estimate = job.estimate(cluster)
    assert not estimate.fits and "user 507 GB" in estimate.short
    assert estimate.fullest > estimate.usable
    user = next(row for row in estimate.tables if row["table"] == "user")
    assert user["sharding"] == "row_wise" and "table_wise: 507 GiB on one rank" in user["why"]
    least = smallest_cluster(job, cluster)
    assert str(least) == "2x8xH100"
    lines = advice(job, estimate, least)
    assert lines[0].startswith(
        "data.schema.tables.user.dtype=fp16: 238 GiB less in all; it then fits (8xH100 would do)"
    )
    assert any("UVM" in line for line in lines)


@pytest.mark.parametrize("rows", [100_000, 3_000_000_000, 20_000_000_000])
def test_one_rank_less_than_the_smallest_cluster_does_not_do(rows):
    job, cluster = planned("8xH100", f"{USERS}{rows}")
    sizes = cluster_sizes(cluster)
    fits = [job.estimate(size, thorough=False).fits for size in sizes[:12]]
    least = smallest_cluster(job, cluster)
    if True in fits:
        assert least == sizes[fits.index(True)]
    else:
        assert sizes.index(least) >= 12
    assert job.estimate(least, thorough=False).fits


def test_activations_can_be_what_does_not_fit():
    job, cluster = planned("1xT4", "batch_size=67_108_864", "data.stream.shards=64", model="lr")
    estimate = job.estimate(cluster)
    assert not estimate.fits
    assert sum(estimate.memory[0].values()) > estimate.usable


def test_a_full_state_is_advised_to_be_a_row_wise_one():
    job, cluster = planned("8xH100", f"{USERS}3_000_000_000", "optim.tables.name=adam", "optim.wide.name=sgd")
    estimate = job.estimate(cluster)
    lines = advice(job, estimate, smallest_cluster(job, cluster))
    assert any(
        line.startswith("optim.tables.name=rowwise_adagrad: 346 GiB less in all; it then fits") for line in lines
    )


def test_a_table_that_was_kept_whole_is_advised_to_be_cut():
    job, cluster = planned("8xH100", f"{USERS}2_000_000_000", "sharding.types=[table_wise]", *NO_CLOCK)
    with pytest.raises(ValueError, match=r"'user' fits nowhere: table_wise puts 126.7 GiB of it on one rank.*row_wise"):
        smallest_cluster(job, cluster)
    overrides = [f"{USERS}1_000_000_000", "sharding.types=[table_wise]", "batch_size=4_194_304", *NO_CLOCK]
    job, cluster = planned("8xH100", *overrides)
    lines = advice(job, job.estimate(cluster), cluster)
    line = next(line for line in lines if "ms a step instead of" in line)
    assert "+sharding.by_table.item=row_wise" in line and "+sharding.by_table.category=row_wise" in line
    changes, _, claim = line.partition(": ")
    taken, _ = planned("8xH100", *overrides, *changes.split())
    assert f"{taken.estimate(cluster, thorough=False).step_ms:.3g} ms a step" in claim


def test_the_time_of_a_step_is_the_sum_of_its_parts_of_known_size():
    job, cluster = planned("8xH100", "batch_size=8_388_608", "data.stream.shards=64")
    estimate = job.estimate(cluster)
    found = job.find(cluster)
    lookups = [0.0] * 8
    for option in found.chosen:
        for shard in option.shards:
            lookups[shard.rank] += shard.perf.fwd_compute
    assert estimate.step["lookup"] == pytest.approx(max(lookups) / LOOKUP)
    dense = job.dense.cost(8_388_608 // 8).operations
    assert estimate.step["dense"] == pytest.approx(1e3 * dense / (0.4 * 989e12))
    assert estimate.step["host"] == 0 < estimate.step_ms - HOST_MS
    assert estimate.step_ms == pytest.approx(sum(estimate.step.values()))
    small, _ = planned("8xH100")
    assert small.estimate(cluster).step_ms == pytest.approx(HOST_MS)


def test_an_all_reduce_takes_the_slowest_link():
    one, two = parse_cluster("8xH100", HERE), parse_cluster("2x8xH100", HERE)
    assert all_reduce_ms(450e6, one) == pytest.approx(2 * 7 / 8)
    assert all_reduce_ms(450e6, two) == pytest.approx(2 * 15 / 16 * 9)
    assert all_reduce_ms(450e6, parse_cluster("H100", HERE)) == 0


def test_a_gpu_without_code_is_reported_first():
    for topology, expected in (("8xT4", True), ("8xH100", False)):
        job, cluster = planned(topology)
        lines = advice(job, job.estimate(cluster), cluster)
        assert (
            any(line.startswith("nothing can be trained here: T4 has compute capability 7.5") for line in lines[:1])
            == expected
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "topology is missing"),
        (["topology=8xH101"], "'H101' is not known; did you mean 'H100'"),
        (["topology=0xH100"], "0 ranks: give at least one"),
        (["topology=12xH100"], "12xH100 do not fill machines of 8"),
        (["topology=8xH100", "batch_size=1000"], "does not divide: use batch_size=1024"),
        (["topology=16x8xH100"], "128 ranks cannot share data.stream.shards=64"),
        (["topology=8xH100", f"{USERS}9_000_000_000", "+sharding.by_table.user=table_wise"], "'user' fits nowhere"),
        (["topology=8xH100", "--picture", "plan.txt"], "--picture"),
        (["topology=8xH100", "model=deepfn"], "did you mean"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=".") as caught:
        start([FILLER, *arguments], io.StringIO())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def run(*arguments):
    return warm.run(0, "trainer.plan", [FILLER, *arguments])


def test_the_command_prints_json_and_says_by_its_exit_code_whether_it_fits():
    done = run("model=din", "topology=2x8xH200", "--json", f"{USERS}20_000_000_000")
    data = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert data["fits"] and data["ranks"] == 16 and len(data["memory"]) == 16 and data["topology"] == "2x8xH200"
    assert sum(sum(rank[kind] for kind in ("tables", "optimizer_state")) for rank in data["memory"]) == sum(
        sum(row["bytes"].values()) for row in data["tables"]
    )
    done = run("model=din", "topology=8xL4", f"{USERS}20_000_000_000")
    assert (
        done.returncode == 1 and "8xL4: does not fit" in done.stdout and "smallest cluster that fits: " in done.stdout
    )
    done = run("topology=8xH101")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_picture_has_a_bar_a_rank_and_the_devices_memory(tmp_path):
    path = tmp_path / "plan.html"
    start([FILLER, "model=deepfm", "topology=8xH100", "--json", "--picture", str(path)], io.StringIO())
    text = path.read_text()
    assert text.count("<figure") == 1 and "8xH100: fits" in text
    for word in ("optimizer state", "activations", "plan may fill", "dashed"):
        assert word in text
