"""Raw values as 64-bit group ids: equal where the values are, whatever their type and layout, and with each batch its own."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.arrow import flat
from data_loaders.group_ids import check_group_types, group_ids_of, texts_of_group_ids
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table

SCHEMA = Schema(tables={"t": Table(5000)}, features={"id": Feature("sparse", table="t")})
LAYOUT = SCHEMA.layout()
NAMES = ["ä", "", "a name that is longer than eight bytes", None]


def ids(array):
    return group_ids_of(flat(pa.chunked_array([array]))).tolist()


def test_equal_values_of_any_type_have_equal_group_ids():
    numbers = [3, -1, None, 0, 3]
    same = [pa.array(numbers, kind) for kind in ("int8", "int64", "float32", "float64", pa.decimal128(9, 2))]
    same += [pa.array(numbers).dictionary_encode(), pa.array([7, *numbers])[1:]]
    (first, *others) = map(ids, same)
    assert all(other == first for other in others)
    assert first[0] == first[4] and len(set(first)) == 4
    assert ids(pa.array([True, False, None])) == ids(pa.array([1, 0, None]))
    text = ["x", None, "", "x", "a longer text"]
    kinds = ("string", "large_string", "binary", pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
    found = [ids(pa.array(text).cast(kind)) for kind in kinds]
    assert all(other == found[0] for other in found) and len(set(found[0])) == 4
    assert found[0][1] == first[2] == ids(pa.nulls(1))[0], "null is the same value in every column"


def test_times_and_fractions():
    day = datetime.datetime(2024, 1, 2)
    found = ids(pa.array([day, None], "timestamp[ms]"))
    assert found == ids(pa.array([day, None], "timestamp[ns]")) == ids(pa.array([day.date(), None], "date32"))
    values = [0.5, -0.5, 0.0, -0.0, float("nan"), float("inf"), 1e300, 2.0**63, None]
    assert ids(pa.array(values))[2] == ids(pa.array(values))[3]
    assert len(set(ids(pa.array(values)))) == len(values) - 1
    other_nan = np.array([0x7FF8000000000001], np.int64).view(np.float64)
    assert ids(pa.array(other_nan)) == ids(pa.array([float("nan")], from_pandas=False))


def test_lists_are_refused():
    with pytest.raises(ValueError, match=r"grouped by column 'tags' of type list.*single values"):
        check_group_types(["tags"], {"tags": pa.list_(pa.string())})
    check_group_types(["a", "b"], {"a": pa.decimal128(4, 1), "b": pa.null()})


def write(folder, rows=900):
    """Two files whose columns have types of different width; neither 'name' nor 'count' is a feature."""
    numbers = np.arange(rows)
    for number, (part, kinds) in enumerate(
        zip(np.array_split(numbers, [600]), [("string", "int32"), (pa.large_string(), "float64")])
    ):
        columns = {
            "label": pa.array(part % 2, "int8"),
            "id": pa.array(part, "int32"),
            "name": pa.array([NAMES[i % 4] for i in part], kinds[0]),
            "count": pa.array([None if i % 7 == 0 else int(i % 5) for i in part], kinds[1]),
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=110)
    return Manifest.scan(["."], str(folder), ["label", "id"])


def loader(manifest, rank=0, world_size=1, **changes):
    given = {"batch_size": 48, "shards": 6, "shuffle": True, "shuffle_rows": 100, "threads": 2, "prefetch_batches": 2}
    given |= {"seed": 5, "group_by": ("name", "count"), "rank": rank, "world_size": world_size}
    return Loader(manifest, SCHEMA, LAYOUT, **{**given, **changes})


ORDERED = {"shuffle": False, "contiguous": True}


@pytest.mark.parametrize("changes", [{}, {"shuffle": False}, ORDERED], ids=["shuffled", "by time", "contiguous"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_row_brings_its_group_ids(tmp_path, changes, world_size):
    manifest = write(tmp_path)
    name_ids, count_ids = ids(pa.array(NAMES)), ids(pa.array([0, 1, 2, 3, 4, None]))
    shards = {"shards": world_size} if "contiguous" in changes else {}
    seen = []
    for rank in range(world_size):
        for batch in loader(manifest, rank, world_size, **changes, **shards).epoch(0):
            real = batch.cursor.local_rows
            features = batch.sparse["id"].values().tolist()
            expected = [[name_ids[i % 4], count_ids[5 if i % 7 == 0 else i % 5]] for i in features]
            assert batch.group_ids.shape == (len(batch.labels), 2)
            assert batch.group_ids[:real].tolist() == expected and not batch.group_ids[real:].any()
            seen += features
    assert sorted(seen) == list(range(900))


def test_a_batch_has_no_group_ids_unless_asked(tmp_path):
    manifest = write(tmp_path)
    one = loader(manifest, group_by=(), **ORDERED, shards=1)
    assert next(one.epoch(0)).group_ids is None
    assert one._row_groups._columns == ["label", "id"], "and does not read the columns"


def test_group_ids_go_back_to_text(tmp_path):
    manifest = write(tmp_path)
    one = loader(manifest)
    wanted = ids(pa.array(NAMES))
    assert one.group_texts("name", wanted[1:]) == dict(zip(wanted[1:], NAMES[1:]))
    assert one.group_texts("name", wanted) == dict(zip(wanted, NAMES))
    assert texts_of_group_ids(manifest, "count", ids(pa.array([4, None]))) == dict(
        zip(ids(pa.array([4, None])), ("4", None))
    )
    assert texts_of_group_ids(manifest, "name", []) == {}


def test_a_column_that_is_not_there_is_named(tmp_path):
    manifest = write(tmp_path)
    with pytest.raises(ValueError, match=r"evaluation.group_by, request, slices or qualities.*'nam' \(near: name"):
        loader(manifest, group_by=("nam",))


def test_decimals_are_numbers():
    assert ids(pa.array([decimal.Decimal("2.00")])) == ids(pa.array([2]))
