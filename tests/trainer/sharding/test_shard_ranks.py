"""Plans, table values and the pipeline check on several ranks; and the tiny model that the tests of tables share."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch
from tests.helpers.ranks import run_distributed
from tests.helpers.tables import (
    CPU,
    DIMS,
    LAYOUTS,
    ROWS,
    TOP_WEIGHT,
    TinyModel,
    all_tables,
    build,
    everywhere,
    make_batch,
    plan_alone,
    reference_loss,
    unmasked,
)
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.modules.embeddings import InitialValues
from trainer.optim.combined import CombinedOptimizer
from trainer.sharding.initialize import initialize_tables
from trainer.sharding.pipeline import StepPipeline
from trainer.sharding.planner import GB
from trainer.sharding.shard import _settle_buckets
from trainer.sharding.torchrec_internals import SequenceSharder, ShardedBags

SGD = OptimConfig(tables=TableOptimizerConfig("sgd"), wide=TableOptimizerConfig("sgd"))
BAG_LAYOUTS = {  # an EmbeddingCollection has none of these, or not on a CPU; a mean no grid
    "table_row_wise": everywhere("table_row_wise"),
    "grid_shard": ShardingConfig(types=["table_row_wise"], by_table={"user": "grid_shard"}),
    "data_parallel": everywhere("data_parallel"),
}


def _losses_and_tables(rank: int, world_size: int, rows: Mapping[str, int], layouts: Mapping[str, ShardingConfig]):
    """Initial tables of each layout; each layout's loss must be that of plain lookups in them."""
    found = {}
    for name, layout in layouts.items():
        sequence = name not in BAG_LAYOUTS
        model, plan = build(world_size, layout, SGD, sequence=sequence, rows=rows)
        kinds = {table.name: table.sharding_type for table in plan}
        assert name in ("auto", "mixed") or kinds["user"] == name, kinds
        found[name] = all_tables(model, sequence)
        batch = make_batch(rank, world_size, 0, rows=rows)
        tables = {table: values.double() for table, values in found[name].items()}
        loss, _ = model(batch)
        expected = reference_loss(tables, TOP_WEIGHT.double(), batch, sequence)
        assert abs(loss.item() - expected.item()) < 1e-6, (name, loss, expected)
        loss.backward()
    return found


def _uniform_tables(world_size: int, layout: ShardingConfig) -> dict[str, Tensor]:
    sharded, plan = build(world_size, layout, SGD, sequence=True)
    initialize_tables(sharded, plan, 3, dict.fromkeys(DIMS, InitialValues(0.5, "uniform")))
    return all_tables(sharded, sequence=True)


def _error_of_a_plan_too_large(world_size: int) -> str:
    with pytest.raises(ValueError) as caught:
        build(world_size, ShardingConfig(ddr_gb=1e-6), OptimConfig())
    return str(caught.value)


class Untraceable(TinyModel):
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sparse = KeyedJaggedTensor.concat([batch.sparse])  # a new batch: its keys are unknown to the tracer
        return self.head(self.bags(sparse), None, batch)


def _pipeline_errors(rank: int, world_size: int) -> list[str]:
    messages = []
    for model in (TinyModel(sequence=True), Untraceable()):
        sharded, plan = build(world_size, ShardingConfig(), SGD, model=model)
        optimizer = CombinedOptimizer(sharded, plan, SGD, total_steps=3, mask=unmasked())
        pipeline = StepPipeline(sharded, optimizer, CPU)
        try:
            pipeline.progress(iter([make_batch(rank, world_size, step) for step in range(3)]))
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _settled_with_device_ids() -> DistributedDataParallel:
    """A wrapper as TorchRec makes it for a GPU; on a CPU DistributedDataParallel does not take ``device_ids`` itself."""
    wrapped = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    wrapped.device_ids = [0]  # with it, arguments are moved, and there must be one
    _settle_buckets(wrapped)
    return wrapped


def _deterministic_bags(rank: int, world_size: int) -> list[bool]:
    """Whether each exchange of a row-wise collection keeps the order of ids; the loss must be that of plain lookups."""
    torch.use_deterministic_algorithms(True)
    try:
        model, _ = build(world_size, everywhere("row_wise"), SGD)
        batch = make_batch(rank, world_size, 0)
        loss, _ = model(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    tables = {name: values.double() for name, values in all_tables(model, False).items()}
    assert abs(loss.item() - reference_loss(tables, TOP_WEIGHT.double(), batch, False).item()) < 1e-6
    sharded = [module for module in model.modules() if isinstance(module, ShardedBags)]
    return [exchange._is_sequence for module in sharded for exchange in module._input_dists]


def _trained(rank: int, world_size: int, layout: ShardingConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tables after two steps of sequences and bags with ids of this type."""
    sharded, plan = build(world_size, layout, SGD, sequence=True)
    optimizer = CombinedOptimizer(sharded, plan, SGD, total_steps=2, mask=unmasked())
    pipeline = StepPipeline(sharded, optimizer, CPU)
    batches = iter([_with_ids(make_batch(rank, world_size, step), dtype) for step in range(2)])
    for _ in range(2):
        pipeline.progress(batches)
    return all_tables(sharded, sequence=True)


def _with_ids(batch: Batch, dtype: torch.dtype) -> Batch:
    def cast(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            ids.keys(),
            ids.values().to(dtype),
            lengths=ids.lengths(),
            stride=ids.stride(),
            length_per_key=ids.length_per_key(),
            offset_per_key=ids.offset_per_key(),
        )

    return replace(batch, sparse=cast(batch.sparse), sequence=cast(batch.sequence))


def _on_ranks(rank: int, world_size: int) -> dict[str, object]:
    """All that needs a process group, in one launch for each number of ranks."""
    long = dict(ROWS, user=20_001, wide_user=20_001)  # several chunks of initial values, and shards that end within one
    short = dict.fromkeys(ROWS, world_size)  # one row a rank
    two = {name: LAYOUTS[name] for name in ("table_wise", "row_wise")}
    found: dict[str, object] = {
        "tables": _losses_and_tables(rank, world_size, ROWS, LAYOUTS | BAG_LAYOUTS),
        "long": _losses_and_tables(rank, world_size, long, two),
        "short": _losses_and_tables(rank, world_size, short, two),
        "too_large": _error_of_a_plan_too_large(world_size),
        "uniform": {name: _uniform_tables(world_size, layout) for name, layout in LAYOUTS.items()},
        "trained": [
            [_trained(rank, world_size, layout, dtype) for dtype in (torch.int32, torch.int64)]
            for layout in LAYOUTS.values()
        ],
    }
    if world_size == 2:
        found["pipeline"] = _pipeline_errors(rank, world_size)
        found["ordered"] = _deterministic_bags(rank, world_size)
        settled = _settled_with_device_ids()
        kept = {**vars(settled.module), **{name: p.grad for name, p in settled.module.named_parameters()}}
        found["settled"] = settled._has_rebuilt_buckets, [kept.get(name) for name in ("forward", "weight", "bias")]
    return found


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict]]:
    return {world_size: run_distributed(_on_ranks, world_size) for world_size in (1, 2, 3)}


def test_initial_values_do_not_depend_on_layout_or_ranks(runs) -> None:
    base = runs[1][0]["tables"]["table_wise"]
    assert abs(float(base["item"].std()) - 0.5) < 0.1 and abs(float(base["item"].mean())) < 0.2
    assert not base["wide_user"].any()
    assert not torch.equal(base["user"][:7], base["clicked"][:7])
    for world_size, ranks in runs.items():
        for tables_of_rank in ranks:
            for layout, tables in tables_of_rank["tables"].items():
                for name, table in tables.items():
                    assert torch.equal(table, base[name]), (world_size, layout, name)


def test_uniform_initial_values_do_not_depend_on_layout_or_ranks(runs) -> None:
    base = runs[1][0]["uniform"]["table_wise"]
    bound = 0.5 * 3**0.5
    assert 0.95 * bound < float(base["item"].abs().max()) <= bound  # of 112 draws
    for ranks in runs.values():
        for layouts in (found["uniform"] for found in ranks):
            assert all(torch.equal(tables[name], base[name]) for tables in layouts.values() for name in DIMS)


def test_initial_values_of_a_table_of_several_chunks(runs) -> None:
    base = runs[1][0]["long"]["table_wise"]["user"]
    assert base.unique().numel() > 0.9 * base.numel()  # no chunk repeats another
    assert torch.equal(base[: ROWS["user"]], runs[1][0]["tables"]["table_wise"]["user"])
    for world_size in (2, 3):
        for layout, tables in runs[world_size][0]["long"].items():
            assert torch.equal(tables["user"], base), (world_size, layout)


def test_a_plan_that_does_not_fit_fails_on_every_rank_with_the_sizes(runs) -> None:
    messages = [rank["too_large"] for rank in runs[2]]
    assert messages[0] == messages[1]
    for word in ("do not fit", "item", "GB", "2 rank(s)", "sharding.ddr_gb"):
        assert word in messages[0]


def test_ids_of_32_bits_train_the_same_bit_by_bit(runs) -> None:
    for ranks in runs.values():
        for narrow, wide in (pair for found in ranks for pair in found["trained"]):
            assert all(torch.equal(narrow[name], wide[name]) for name in DIMS)
            assert not all(torch.equal(wide[name], ranks[0]["tables"]["table_wise"][name]) for name in DIMS)


def test_a_module_that_is_not_pipelined_is_named(runs) -> None:
    good, bad = runs[2][0]["pipeline"]
    assert good == ""
    assert "does not reach bags" in bad


def test_buckets_settle_before_the_first_step_on_a_gpu_too(runs) -> None:
    for found in runs[2]:
        assert found["settled"] == (True, [None, None, None])  # and nothing is left in the module or its gradients


def test_deterministic_keeps_the_order_of_ids_within_bags(runs) -> None:
    assert all(found["ordered"] == [True] for found in runs[2])


@pytest.mark.parametrize(
    ("device", "ranks", "types", "sought"),
    [
        ("cuda", 2, ["row_wise"], True),
        ("cuda", 2, ["data_parallel", "table_wise"], True),
        ("cuda", 2, ["data_parallel"], False),
        ("cuda", 1, ["table_wise"], False),
        ("cpu", 2, ["row_wise"], False),
    ],
)
def test_repeated_ids_are_sought_where_they_would_cross_gpus(monkeypatch, device, ranks, types, sought) -> None:
    monkeypatch.setattr(EmbeddingCollectionSharder, "shard", lambda self, *_: self._use_index_dedup)
    plan = {f"table{number}": SimpleNamespace(sharding_type=kind) for number, kind in enumerate(types)}
    environment = SimpleNamespace(world_size=ranks)
    assert SequenceSharder().shard(None, plan, environment, torch.device(device)) is sought


# Plans without a process group.


def test_auto_gives_every_rank_work_and_leaves_the_optimizer_in_backward() -> None:
    rows = dict(ROWS, user=1_000_000, wide_user=1_000_000)
    for world_size in (2, 3):
        plan = plan_alone(ShardingConfig(), OptimConfig(), world_size, rows=rows)
        assert {row["sharding"] for row in plan.values()} <= {"table_wise", "row_wise"}
        assert {rank for row in plan.values() for rank in row["ranks"]} == set(range(world_size))
    assert {row["sharding"] for row in plan_alone(ShardingConfig(), OptimConfig(), 1).values()} == {"table_wise"}


def test_equally_good_plans_are_not_chosen_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchRec keeps allowed types in a set of strings, whose order differs from process to process."""
    types = ["row_wise", "table_row_wise"]  # the same on one machine
    config = ShardingConfig(types=types, by_table={"clicked": "row_wise"})
    plans = []
    for order in (types, types[::-1]):

        def filtered(self, name: str, allowed: list[str], *rest, order: list[str] = order) -> list[str]:
            return [kind for kind in order if kind in self._constraints[name].sharding_types]

        monkeypatch.setattr(EmbeddingEnumerator, "_filter_sharding_types", filtered)
        plans.append({name: row["sharding"] for name, row in plan_alone(config, OptimConfig()).items()})
    assert plans[0] == plans[1]


def test_summary_counts_weights_and_optimizer_state() -> None:
    plan = plan_alone(everywhere("table_wise"), OptimConfig(by_table={"item": TableOptimizerConfig("adagrad")}))
    assert list(plan["user"]["bytes"].values()) == [4 * (11 * 8 + 11 + 11)]  # weights, sums, clock
    assert list(plan["item"]["bytes"].values()) == [4 * (2 * 7 * 16 + 7)]
    cut = plan_alone(everywhere("column_wise", wide="row_wise"), OptimConfig())
    assert sum(cut["item"]["bytes"].values()) == 4 * (
        7 * 16 + 2 * 7 + 2 * 7
    )  # a sum and a clock for each half of a row
    assert cut["wide_user"]["bytes"] == {"0": 4 * 6 * (2 * 4 + 1), "1": 4 * 5 * (2 * 4 + 1)}
    json.dumps(cut)
    counted = plan_alone(everywhere("row_wise"), OptimConfig(tables=TableOptimizerConfig("sgd", mini_batch_l2=0.1)))
    assert counted["user"]["bytes"] == {"0": 6 * (4 * 8 + 8 + 4), "1": 5 * (4 * 8 + 8 + 4)}


def test_the_planner_counts_weights_of_their_type_and_state_of_float32() -> None:
    """Between what a plan needs and a little less lies whether there is one."""
    rows, buffers = dict(ROWS, user=4_000_000), 0.01  # GB, for the other tables and batches
    adagrad, counts = TableOptimizerConfig("adagrad"), TableOptimizerConfig("sgd", mini_batch_l2=0.1)
    for data_type, optimizer, row in (
        (DataType.FP32, adagrad, 8 * (4 + 4)),
        (DataType.FP16, adagrad, 8 * (2 + 4)),
        (DataType.FP16, TableOptimizerConfig(), 8 * 2 + 4),
        (DataType.FP32, counts, 8 * 4 + 8),
    ):
        optim, needed = OptimConfig(tables=optimizer), rows["user"] * (row + 4) / GB  # with the clock
        plan_alone(ShardingConfig(ddr_gb=needed + buffers), optim, 1, rows=rows, data_type=data_type)
        with pytest.raises(ValueError, match=f"user {needed:.3g} GB"):
            plan_alone(ShardingConfig(ddr_gb=needed - buffers), optim, 1, rows=rows, data_type=data_type)


def test_a_plan_for_a_cluster_that_is_not_there() -> None:
    plan = plan_alone(ShardingConfig(hbm_gb=80), OptimConfig(tables=TableOptimizerConfig("adam")), 16, device="cuda")
    assert set(plan) == set(DIMS)
    with pytest.raises(ValueError, match="sharding.hbm_gb"):
        plan_alone(ShardingConfig(hbm_gb=1e-6), OptimConfig(), 2, device="cuda")


def test_deterministic_leaves_out_what_has_no_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    asked = ShardingConfig(by_table={"user": "table_row_wise", "item": "row_wise"}, hbm_gb=80)
    assert plan_alone(asked, OptimConfig(), device="cpu")["user"]["sharding"] == "table_row_wise"
    with pytest.raises(
        ValueError, match=r"by_table.user .* \(table_row_wise: deterministic=true: .*\); possible: .*row_wise"
    ):
        plan_alone(asked, OptimConfig(), device="cuda")


@pytest.mark.parametrize(
    ("config", "optim", "message"),
    [
        (ShardingConfig(by_table={"clicked": "data_parallel"}), OptimConfig(), "by_table.clicked.*sums the ids"),
        (
            ShardingConfig(by_table={"wide_usr": "row_wise"}),
            OptimConfig(),
            "sharding.by_table: 'wide_usr' .*'wide_user'",
        ),
        (ShardingConfig(by_table={"clicked": "grid_shard"}), OptimConfig(), "by_table.clicked.*pooled tables only"),
        (ShardingConfig(by_table={"item": "grid_shard"}), OptimConfig(), "by_table.item.*adds up the means"),
        (ShardingConfig(by_table={"wide_user": "column_wise"}), OptimConfig(), "multiples of 4.*possible: table_wise"),
        (ShardingConfig(types=["column_wise"]), OptimConfig(), "sharding.types.*'wide_item'"),
        (ShardingConfig(by_table={"clicked": "row_wise"}), OptimConfig(), "clicked.*8 ranks are too many for 13 rows"),
        (
            ShardingConfig(types=["data_parallel", "table_row_wise"], by_table={"clicked": "row_wise"}),
            OptimConfig(wide=TableOptimizerConfig("ftrl")),
            "'wide_item'.*FTRL",
        ),
        (ShardingConfig(), OptimConfig(tables=TableOptimizerConfig(eps=0.0)), "eps=0.0"),
        (ShardingConfig(), OptimConfig(by_table={"usr": TableOptimizerConfig()}), "by_table.usr: the model has no"),
        (
            ShardingConfig(),
            OptimConfig(wide=TableOptimizerConfig("ftrl"), by_table={"wide_item": TableOptimizerConfig()}),
            "by_table.wide_item.*all wide tables use FTRL",
        ),
    ],
)
def test_impossible_combinations_say_what_is_possible(config: ShardingConfig, optim: OptimConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_alone(config, optim, world_size=8 if "8 ranks" in message else 2)
