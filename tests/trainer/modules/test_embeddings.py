import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Feature, Schema, Table
from tests.helpers.samples import keyed_jagged, small_schema
from trainer.modules.embeddings import (
    InitialValues,
    PooledGroups,
    WideLookup,
    bag_configs,
    build_embedding_bags,
    build_embeddings,
    embedding_configs,
    initial_values,
    initial_values_of_tables,
    is_wide_table,
    split_columns,
    wide_table,
)

CPU = torch.device("cpu")


def one_table_schema(table: str) -> Schema:
    return Schema(tables={table: Table(10)}, features={"f": Feature("sparse", table=table)})


def test_configs_follow_the_schema():
    schema = small_schema()
    deep, wide = ["item_id", "tags", "clicked_items"], ["item_id", "user_x_category"]
    configs = {config.name: config for config in bag_configs(schema, deep, wide)}
    assert list(configs) == ["item", "tag", "wide_item_id", "wide_user_x_category"]
    found = [(c.num_embeddings, c.embedding_dim, c.feature_names, c.pooling) for c in configs.values()]
    assert found == [
        (30, 8, ["item_id", "clicked_items"], PoolingType.MEAN),
        (12, 8, ["tags"], PoolingType.SUM),
        (30, 4, ["item_id"], PoolingType.SUM),
        (50, 4, ["user_x_category"], PoolingType.SUM),
    ]


def test_initial_values():
    schema = Schema(
        tables={"small": Table(4000, init_std=0.5), "plain": Table(4000)},
        features={name: Feature("sparse", table=name) for name in ("small", "plain")},
    )
    bags = build_embedding_bags(bag_configs(schema, ["small", "plain"], ["plain"]), CPU).embedding_bags
    assert bags["small"].weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert bags["plain"].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not bags["wide_plain"].weight.any()
    embeddings = build_embeddings(embedding_configs(schema, ["small"]), CPU)
    assert embeddings["dim_16"].embeddings["small"].weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert initial_values(schema, "small") == InitialValues(0.5)
    deviations = {"small": 0.5, "plain": 0.01, "wide_small": 0.0, "wide_plain": 0.0}
    assert initial_values_of_tables(schema) == {name: InitialValues(std) for name, std in deviations.items()}


def test_uniform_initial_values_and_the_type_of_rows():
    schema = Schema(
        tables={
            "dlrm": Table(4000, init="uniform"),
            "set": Table(4000, init="uniform", init_std=0.5, dtype="fp16"),
            "zero": Table(4000, init="uniform", init_std=0.0),
        },
        features={name: Feature("sparse", table=name) for name in ("dlrm", "set", "zero")},
    )
    bags = build_embedding_bags(bag_configs(schema, [*schema.features]), CPU).embedding_bags
    embeddings = build_embeddings(embedding_configs(schema, [*schema.features]), CPU)["dim_16"].embeddings
    for name, bound in {"dlrm": 4000**-0.5, "set": 0.5 * 3**0.5, "zero": 0.0}.items():
        for values in (bags[name].weight, embeddings[name].weight):
            assert values.dtype == (torch.float16 if name == "set" else torch.float32)
            assert values.abs().max().item() == pytest.approx(bound, rel=1e-3)  # of 64,000 draws
            assert values.float().std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table(10, init="xavier"), "tables.t.init: 'xavier'.*normal, uniform"),
        (Table(10, dtype="bf16"), "tables.t.dtype: 'bf16'.*fp32, fp16"),
        (Table(10, init_std=-1.0), "tables.t.init_std is -1.0"),
    ],
)
def test_what_a_table_cannot_be_is_refused(table: Table, message: str):
    with pytest.raises(ValueError, match=message):
        Schema(tables={"t": table})


def test_wide_tables_have_different_names_for_different_features():
    names = [wide_table(key) for key in ("a.b", "a_b", "a%2Eb", "a@b", "a b")]
    assert len(set(names)) == 5
    assert all(is_wide_table(name) and "." not in name and "@" not in name for name in names)
    assert not is_wide_table("user")


@pytest.mark.parametrize("table", ["a.b", "items", "type", "training", "wide_user"])
def test_table_names_that_modules_cannot_have(table):
    with pytest.raises(ValueError, match=f"schema.tables.{table}: .*rename the table"):
        bag_configs(one_table_schema(table), ["f"])
    with pytest.raises(ValueError, match="rename the table"):
        embedding_configs(one_table_schema(table), ["f"])


@pytest.mark.parametrize("table", ["item", "user data", "größe", "weight"])
def test_table_names_that_work(table):
    build_embedding_bags(bag_configs(one_table_schema(table), ["f"]), CPU)
    build_embeddings(embedding_configs(one_table_schema(table), ["f"]), CPU)


def test_pooled_lookup_in_the_models_order():
    schema = small_schema()
    deep, wide = ["tags", "user.id", "item_id", "clicked_items"], ["user_x_category", "user.id"]
    configs = bag_configs(schema, deep, wide)
    bags = build_embedding_bags(configs, CPU)
    with torch.no_grad():
        for bag in bags.embedding_bags.values():
            bag.weight.normal_()
    rows = [{"tags": [1, 2], "user.id": [3], "item_id": [4], "clicked_items": [5, 7], "user_x_category": [9]}, {}]
    found_deep, found_wide = PooledGroups(configs, deep, wide)(bags(keyed_jagged([*deep, "user_x_category"], rows)))
    tables = {name: bag.weight for name, bag in bags.embedding_bags.items()}
    expected = [
        tables["tag"][1] + tables["tag"][2],
        tables["user"][3],
        tables["item"][4],
        (tables["item"][5] + tables["item"][7]) / 2,
    ]
    torch.testing.assert_close(found_deep[0], torch.cat(expected))
    weights = torch.cat((tables["wide_user_x_category"][9], tables["wide_user%2Eid"][3]))
    torch.testing.assert_close(found_wide[0], weights)
    assert not found_deep[1].any() and not found_wide[1].any()


@pytest.mark.parametrize("order", ["abcdef", "fedcba", "badcfe", "afbecd"])
def test_columns_are_found_by_name_in_any_order(order):
    widths = dict(zip("abcdef", (1, 2, 3, 4, 2, 1), strict=True))
    columns = {name: torch.randn(3, width, requires_grad=True) for name, width in widths.items()}
    values = torch.cat([columns[name] for name in order], dim=1)
    pooled = KeyedTensor(keys=list(order), length_per_key=[widths[name] for name in order], values=values)
    groups = [["a", "b", "c"], ["f", "d"], []]
    found = split_columns(pooled, groups)
    for group, tensor in zip(groups, found, strict=True):
        expected = torch.cat([columns[k] for k in group], dim=1) if group else torch.zeros(3, 0)
        assert torch.equal(tensor, expected)
    (found[0].sum() + 2 * found[1].sum()).backward()
    for name, scale in {"a": 1.0, "b": 1.0, "c": 1.0, "f": 2.0, "d": 2.0, "e": 0.0}.items():
        assert torch.equal(columns[name].grad, torch.full_like(columns[name], scale))


def test_unsharded_columns_are_views():
    pooled = KeyedTensor(keys=["a", "b", "w"], length_per_key=[8, 8, 4], values=torch.randn(3, 20))
    deep, wide = split_columns(pooled, [["a", "b"], ["w"]])
    start = pooled.values().untyped_storage().data_ptr()
    assert deep.untyped_storage().data_ptr() == start and wide.untyped_storage().data_ptr() == start
    assert deep.unflatten(1, (2, 8)).shape == (3, 2, 8)


@pytest.mark.parametrize("slot", [0, 3])
def test_wide_lookup_reads_slot_0_and_trains_the_chosen_one(slot):
    module = WideLookup()
    assert module.gradient_slot == 0
    module.collect_gradient(slot)
    rows = torch.arange(24.0).reshape(2, 12).requires_grad_()
    weights = module(rows)
    assert weights.tolist() == [[0.0, 4.0, 8.0], [12.0, 16.0, 20.0]]
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    expected = torch.zeros(2, 3, 4)
    expected[:, :, slot] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(rows.grad, expected.reshape(2, 12))


def test_wide_lookup_of_nothing():
    assert WideLookup()(torch.zeros(3, 0)).shape == (3, 0)
