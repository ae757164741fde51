"""Generated click logs: reproducible, calibrated, solvable by the models they are for and by no linear one."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from data_loaders import synthetic
from data_loaders.schema import Cross, Feature, Schema, Table

ROWS = {"train": 5000, "test": 1200}


def clicks(table: str, target: str) -> Feature:
    return Feature("sequence", table=table, max_length=9, target=target, history="clicks")


def shop(**changes) -> Schema:
    """A schema with every kind of feature."""
    parts = {
        "label": "click",
        "tables": {
            "user": Table(2000),
            "item": Table(600),
            "category": Table(90),
            "city": Table(40),
            "hour": Table(24),
            "tag": Table(50),
        },
        "features": {
            "user_id": Feature("sparse", table="user", ids="hash"),
            "city": Feature("sparse", table="city", missing_id=0),
            "hour": Feature("sparse", table="hour"),
            "item_id": Feature("sparse", table="item"),
            "category_id": Feature("sparse", table="category"),
            "tags": Feature("sparse", table="tag", max_length=4),
            "price": Feature("dense", log1p=True, fill=0.0),
            "age": Feature("dense"),
            "clicked_categories": clicks("category", "category_id"),
            "clicked_items": clicks("item", "item_id"),
        },
        "crosses": {"city_x_hour": Cross(["city", "hour"], 1000)},
    }
    return Schema(**{**parts, **changes})


@pytest.fixture(scope="module")
def drawn():
    """(plan, law, rows, labels, probabilities) of 60 000 rows that the law was not fitted to."""
    plan = synthetic.plan_of(shop(), "p")
    law = synthetic.Law(plan, seed=5, click_rate=0.2)
    rng = np.random.default_rng(0)
    rows = synthetic.draw_rows(plan, rng, 60_000)
    batch = law.record_batch(rows, rng)
    return plan, law, rows, batch["click"].to_numpy(), batch["p"].to_numpy().astype(np.float64)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def read(folder, split="train") -> pa.Table:
    return pa.concat_tables(pq.read_table(f) for f in sorted((folder / split).iterdir()))


def write(folder, schema, *, seed=3, rows=ROWS, **options):
    synthetic.write(schema, folder, rows=rows, seed=seed, **{"rows_per_file": 2000, "row_group_size": 700, **options})
    return folder


# Files.


def test_bytes_depend_on_the_seed_and_not_on_the_workers(tmp_path):
    one = contents(write(tmp_path / "one", shop(), workers=1))
    three = contents(write(tmp_path / "three", shop(), workers=3))
    other = contents(write(tmp_path / "other", shop(), seed=4))
    assert one == three
    assert sorted(one) == [
        "_SUCCESS.json", "test/part-00000.parquet",
        "train/part-00000.parquet", "train/part-00001.parquet", "train/part-00002.parquet",
    ]  # fmt: skip
    assert all(one[name] != other[name] for name in one)
    parts = [v for k, v in one.items() if k.startswith("train")]
    assert len(set(parts)) == 3, "files must not repeat each other"


def test_a_changed_byte_is_found(tmp_path):
    """Pages have checksums, which the reader of training verifies (tests/data_loaders/test_bad_data.py)."""
    write(tmp_path / "log", shop())
    path = tmp_path / "log/train/part-00000.parquet"
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read_row_group(0, [column.path_in_schema])


def test_files_have_the_columns_types_and_row_groups_of_the_schema(tmp_path):
    write(tmp_path / "log", shop(weight="w"), probability="truth")
    metadata = pq.read_metadata(tmp_path / "log/train/part-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [700, 700, 600]
    table = read(tmp_path / "log")
    assert len(table) == 5000
    kinds = {f.name: (str(f.type), f.nullable) for f in table.schema}
    ids = "list<element: int32 not null>"
    assert kinds == {
        "click": ("int8", False), "w": ("float", False), "price": ("float", True), "age": ("float", False),
        "user_id": ("int64", False), "city": ("int32", False), "hour": ("int32", False), "item_id": ("int32", False),
        "category_id": ("int32", False), "tags": (ids, False), "clicked_categories": (ids, False),
        "clicked_items": (ids, False), "truth": ("float", False),
    }  # fmt: skip
    assert 0.01 < table["price"].null_count / 5000 < 0.05
    assert table["w"].to_numpy().min() >= 0.5 and table["w"].to_numpy().max() <= 1.5


def test_ids_keep_to_their_tables_and_histories_to_their_events(tmp_path):
    table = read(write(tmp_path / "log", shop()))
    city = table["city"].to_numpy()
    assert city.min() == 1 and city.max() == 39 and len(np.unique(city)) == 39, "row 0 is the missing id"
    assert np.unique(table["hour"].to_numpy()).tolist() == list(range(24))
    user = table["user_id"].to_numpy()
    assert user.min() >= 0 and user.max() > 1 << 60 and len(np.unique(user)) <= 500
    items, categories = table["clicked_items"].combine_chunks(), table["clicked_categories"].combine_chunks()
    lengths = items.value_lengths().to_numpy()
    assert (lengths == categories.value_lengths().to_numpy()).all()
    assert lengths.max() == 9 and 0.08 < (lengths == 0).mean() < 0.12
    pairs = set(zip(items.flatten().to_pylist(), categories.flatten().to_pylist()))
    pairs |= set(zip(table["item_id"].to_pylist(), table["category_id"].to_pylist()))
    assert len(pairs) == len({item for item, _ in pairs}) <= 600, "an item has one category, in history and target"
    assert {item for item, _ in pairs} <= set(range(600)) and {c for _, c in pairs} <= set(range(90))


def test_matches_asks_for_what_changes_the_data(tmp_path):
    write(tmp_path / "log", shop())

    def matches(schema=None, **changes):
        return synthetic.matches(schema or shop(), tmp_path / "log", **{"rows": ROWS, "seed": 3, **changes})

    assert matches()
    assert matches(shop(embedding_dim=64)), "models may differ over the same data"
    assert not matches(seed=4)
    assert not matches(rows={"train": 5000})
    assert not matches(click_rate=0.3)
    assert not matches(probability="truth")
    assert not matches(shop(label="bought"))
    assert not matches(shop(crosses={"user_x_hour": Cross(["user_id", "hour"], 1000)})), "crosses say what interacts"
    (tmp_path / "log/train/part-00002.parquet").unlink()
    assert not matches()
    assert not synthetic.matches(shop(), tmp_path / "nowhere", rows=ROWS, seed=3)


def test_an_interrupted_write_leaves_nothing_behind_and_the_old_log_in_place(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "sync_below", interrupt)
        write(tmp_path / "log", shop())
    assert list(tmp_path.iterdir()) == []
    before = contents(write(tmp_path / "log", shop()))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "sync_below", interrupt)
        write(tmp_path / "log", shop(), seed=4)
    assert contents(tmp_path / "log") == before and [p.name for p in tmp_path.iterdir()] == ["log"]
    write(tmp_path / "log", shop(), seed=4)
    assert synthetic.matches(shop(), tmp_path / "log", rows=ROWS, seed=4)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "mine.csv").write_text("1,2")
    (tmp_path / "_SUCCESS.json").write_text(json.dumps({"job": "somebody's"}))
    with pytest.raises(ValueError, match="not synthetic data"):
        write(tmp_path, shop())
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "mine.csv", shop())
    assert (tmp_path / "mine.csv").read_text() == "1,2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "rows is empty"),
        ({"rows": {"train": 0}}, "train has 0 rows"),
        ({"rows": {"../train": 5}}, "no folder name"),
        ({"seed": -1}, "seed is -1"),
        ({"click_rate": 1.0}, "click_rate is 1.0"),
        ({"rows_per_file": 0}, "rows_per_file is 0"),
        ({"probability": "click"}, "column 'click'"),
        ({"probability": "age"}, "column 'age'"),
        ({"schema": shop(label=None)}, "schema.label is empty"),
    ],
)
def test_unusable_arguments_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "log", **{"schema": shop(), **changes})
    assert list(tmp_path.iterdir()) == []


# The truth.


def test_probabilities_are_calibrated(drawn):
    _, _, _, labels, p = drawn
    assert abs(p.mean() - 0.2) < 0.005
    assert abs(labels.mean() - p.mean()) < 4 * math.sqrt((p * (1 - p)).mean() / len(p))
    for chosen in np.array_split(np.argsort(p), 10):
        deviation = math.sqrt((p[chosen] * (1 - p[chosen])).sum()) / len(chosen)
        assert abs(labels[chosen].mean() - p[chosen].mean()) < 4 * deviation
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    spread = math.sqrt((p * (1 - p) * (np.log(p) - np.log1p(-p)) ** 2).sum()) / len(p)
    assert abs(log_loss(labels, p) - entropy.mean()) < 4 * spread


def test_a_linear_model_stays_far_below_the_best(drawn):
    """Logistic regression over one-hot ids, bags and dense values, cross-checked on the other half of the rows."""
    plan, _, rows, labels, p = drawn
    blocks = []
    ids = {column: (ranks, np.arange(rows.size + 1)) for column, ranks in rows.single.items()} | rows.lists
    for column, space in {**plan.single, "tags": plan.bags["tags"][0], **plan.events}.items():
        ranks, offsets = ids[column]
        blocks.append(scipy.sparse.csr_matrix((np.ones(len(ranks)), ranks, offsets), shape=(rows.size, space.size)))
    blocks.append(scipy.sparse.csr_matrix(np.nan_to_num(np.stack(list(rows.dense.values()), axis=1))))
    x, half = scipy.sparse.hstack(blocks).tocsr(), rows.size // 2
    linear = LogisticRegression(C=0.3, max_iter=100).fit(x[:half], labels[:half])
    found = roc_auc_score(labels[half:], linear.decision_function(x[half:]))
    best = roc_auc_score(labels[half:], p[half:])
    assert 0.8 < best < 0.85
    assert 0.6 < found < best - 0.08


def test_matching_events_raise_the_click_rate_given_all_else(drawn):
    plan, law, rows, labels, _ = drawn
    (history,) = plan.histories
    assert history.columns[history.lead] == "clicked_items", "the lead is the column with most ids"
    counts = synthetic.match_counts(plan, history, rows)
    ranks, offsets = rows.lists["clicked_items"]
    for row in range(200):
        events = ranks[offsets[row] : offsets[row + 1]] % 64
        assert counts[row] == (events == rows.single["item_id"][row] % 64).sum()
    mean, weight = law.weights["match"]
    rest = law.logits(rows) - weight * (np.log1p(counts) - mean)
    for chosen in np.array_split(np.argsort(rest), 5):  # rows alike in everything but the match
        count = counts[chosen]
        rates = [labels[chosen][(count >= low) & (count < high)].mean() for low, high in ((0, 1), (1, 3), (3, 10))]
        assert rates[0] * 1.3 < rates[1] and rates[1] * 1.1 < rates[2]


def test_interactions_have_no_linear_part(drawn):
    plan, law, rows, _, _ = drawn
    assert plan.pairs[0] == ("city", "hour"), "crosses come first"
    assert not any({"item_id", "category_id"} == set(pair) for pair in plan.pairs), "these depend on each other"
    interaction = law.terms(rows)["interaction"]
    spread = interaction.std()
    for column in {column for pair in plan.pairs for column in pair}:
        frequent = rows.single[column] == 0
        noise = interaction[frequent].std() / math.sqrt(frequent.sum())
        # The latent vectors are centred over a pilot sample, hence the small allowance.
        assert abs(interaction[frequent].mean()) < 4 * noise + 0.02 * spread


def test_hidden_effects_are_the_same_in_every_split(tmp_path):
    """The law is fixed by (seed, schema): recovered from ids in train, it holds in test."""
    schema = Schema(tables={"shop": Table(6)}, features={"shop_id": Feature("sparse", table="shop")})
    write(tmp_path / "log", schema)
    train, test = (read(tmp_path / "log", split) for split in ("train", "test"))
    known = dict(zip(train["shop_id"].to_pylist(), train["click_probability"].to_pylist()))
    assert len(known) == len(set(known.values())) == 6
    for table in (train, test):
        assert [known[i] for i in table["shop_id"].to_pylist()] == table["click_probability"].to_pylist()


def test_ranks_follow_the_cut_off_pareto_law():
    ranks = synthetic._zipf(np.random.default_rng(1), 1000, 400_000)
    edges = np.arange(1, 1002) ** -0.1
    expected = (edges[:-1] - edges[1:]) / (1 - edges[-1])
    for upper in (1, 2, 10, 100, 999):
        share, probability = (ranks < upper).mean(), expected[:upper].sum()
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / len(ranks))
    assert ranks.min() == 0 and ranks.max() == 999


def test_raw_ids_are_a_bijection():
    for size, reserved in ((1, ()), (2, (0,)), (24, (3, 7)), (1000, ()), ((1 << 20) + 1, (5,))):
        ids = synthetic.RawIds(synthetic.IdSpace("t", size, False, reserved), np.random.default_rng(2))(np.arange(size))
        assert ids.dtype == np.int32
        assert sorted(ids.tolist()) == [i for i in range(size + len(reserved)) if i not in reserved]
    hashed = synthetic.RawIds(synthetic.IdSpace("t", 5000, True, ()), np.random.default_rng(2))(np.arange(5000))
    assert hashed.dtype == np.int64 and hashed.min() >= 0 and len(np.unique(hashed)) == 5000


# Any schema.


def random_schema(rng: np.random.Generator) -> Schema:
    tables = {f"t{i}": Table(int(rng.choice([2, 3, 10, 70, 1000, 30_000]))) for i in range(rng.integers(1, 5))}
    features: dict[str, Feature] = {}
    for i in range(rng.integers(0, 4)):
        features[f"d{i}"] = Feature("dense", fill=rng.choice([None, 0.5]), log1p=bool(rng.integers(2)))
    for i in range(rng.integers(1, 6)):
        table, ids = str(rng.choice(list(tables))), str(rng.choice(["identity", "hash"]))
        features[f"s{i}"] = Feature("sparse", table=table, ids=ids, max_length=rng.choice([None, None, 3]))
    for i in range(rng.integers(0, 4)):
        target = str(rng.choice([n for n, f in features.items() if f.kind == "sparse"]))
        aimed = bool(rng.integers(2))
        table = features[target].table if aimed else str(rng.choice(list(tables)))
        history = str(rng.choice(["", "h0", "h1"])) or None
        length = int(rng.integers(1, 8))
        features[f"q{i}"] = Feature("sequence", table=table, max_length=length, history=history)
        features[f"q{i}"].target = target if aimed else None
    return Schema(tables=tables, features=features)


@pytest.mark.parametrize("seed", range(25))
def test_any_schema_has_a_log(seed, monkeypatch):
    monkeypatch.setattr(synthetic, "PILOT_ROWS", 4000)
    check_log(random_schema(np.random.default_rng(seed)))


@pytest.mark.parametrize(
    "schema",
    [
        Schema(features={"x": Feature("dense")}),
        Schema(features={"x": Feature("dense", fill=0.0, log1p=True), "y": Feature("dense")}),
        Schema(tables={"t": Table(2)}, features={"s": Feature("sparse", table="t", missing_id=1)}),
        Schema(tables={"t": Table(2)}, features={"q": Feature("sequence", table="t", max_length=1)}),
        Schema(  # one column, read in three ways
            tables={"t": Table(30), "u": Table(20)},
            features={
                "a": Feature("sparse", table="t", column="c"),
                "b": Feature("sparse", table="u", column="c", missing_id=4),
                "c": Feature("dense"),
            },
        ),
        Schema(  # the same events attended to and pooled
            tables={"t": Table(300), "u": Table(200)},
            features={
                "item": Feature("sparse", table="t"),
                "seen": Feature("sequence", table="t", max_length=5, target="item"),
                "pooled": Feature("sequence", table="u", max_length=3, column="seen", history="other"),
                "when": Feature("sequence", table="u", max_length=5, history="other"),
            },
        ),
    ],
)
def test_odd_schemas_have_a_log(schema):
    check_log(schema)


def check_log(schema: Schema):
    """Every column is there, once; ids, lengths and nulls are within what every reader of the column allows."""
    law = synthetic.Law(synthetic.plan_of(schema, "p"), seed=1, click_rate=0.3)
    rng = np.random.default_rng(1)
    batch = law.record_batch(synthetic.draw_rows(law.plan, rng, 3000), rng)
    batch.validate(full=True)
    assert sorted(batch.schema.names) == sorted({schema.label, "p", *(schema.column(n) for n in schema.features)})
    p = batch["p"].to_numpy()
    assert np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 and abs(p.mean() - 0.3) < 0.05
    for name, feature in schema.features.items():
        column = batch[schema.column(name)]
        if feature.kind == "dense":
            assert feature.fill is not None or column.null_count == 0
            continue
        assert column.null_count == 0
        if pa.types.is_list(column.type):
            if feature.kind == "sequence":
                assert column.value_lengths().to_numpy().max() <= feature.max_length
            column = column.flatten()
        ids = column.to_numpy()
        if feature.ids == "identity":
            assert ids.min() >= 0 and ids.max() < schema.num_embeddings(name)
            assert feature.missing_id not in ids
    for names in schema.histories.values():
        lengths = [batch[schema.column(n)].value_lengths().to_pylist() for n in names]
        assert all(other == lengths[0] for other in lengths)


def test_a_column_cannot_be_a_list_and_a_number():
    single = Feature("sparse", table="t", column="c")
    sequence = Feature("sequence", table="t", column="c", max_length=3)
    schema = Schema(tables={"t": Table(9)}, features={"a": single, "b": sequence})
    with pytest.raises(ValueError, match="'c' is read as a list and as a single value by a, b"):
        synthetic.plan_of(schema, "p")
