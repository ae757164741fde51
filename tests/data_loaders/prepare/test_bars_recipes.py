"""Recipes of the BARS sets on small files with the columns of theirs, compared with FuxiCTR's own rules in plain Python.

``tokens`` and ``bucket`` are what FuxiCTR's ``Tokenizer`` and ``convert_to_bucket`` say (1.0.2 and 2.0.1), not its code.
"""

import csv
import datetime
import math
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.made_tables import UNKNOWN, known, run

NUMBERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
SIZES = {"train": 90, "valid": 12, "test": 20}
AS_THEY_LIE = "order.shuffle=false"


def write(folder, header, make, splits=("train", "valid", "test"), seed=5):
    """``<split>.csv`` as pandas writes them, a missing value being an empty field; ``header``: a list of columns, or as in
    the file. Returns {split: [row]}."""
    columns = header.split(",") if isinstance(header, str) else header
    draw = random.Random(seed)
    rows = {split: [make(draw) for _ in range(SIZES[split])] for split in splits}
    for split, made in rows.items():
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(made)
    return rows


def tokens(columns, min_count):
    """The values that FuxiCTR gives a row: each column counted by itself, then all of them together."""
    found = set()
    for values in columns:
        found |= {value for value, count in Counter(v for v in values if v is not None).items() if count >= min_count}
    return found


def train_values(rows, column, kind=str):
    return [kind(row[column]) if row[column] != "" else None for row in rows["train"]]


def bucket(text):
    """0 and a missing count are no value: FuxiCTR fills with 0 and leaves 0 out of the vocabulary."""
    count = int(text or 0)
    return (math.floor(math.log(count) ** 2) if count > 2 else count) or None


def test_criteo_x1_keeps_the_numbers_and_every_value_of_train(tmp_path):
    def make(draw):
        numbers = {name: repr(draw.random()) for name in NUMBERS}
        return {
            "label": draw.randrange(2),
            **numbers,
            **{name: draw.randrange(2_000_000, 2_000_060) for name in CATEGORIES},
        }

    rows = write(tmp_path, ["label", *NUMBERS, *CATEGORIES], make)
    made = run("criteo_x1", tmp_path, tmp_path / "out")
    for split, found in made.all_raw().items():
        assert [row["label"] for row in found] == [row["label"] for row in rows[split]] and found
        for name in ("C1", "C26"):
            kept = tokens([train_values(rows, name, int)], 1)
            assert [row[name] for row in found] == known([row[name] for row in rows[split]], kept)
        for got, row in zip(found, rows[split]):
            assert all(abs(got[name] - float(row[name])) < 1e-6 for name in NUMBERS)
    assert UNKNOWN in [row["C1"] for row in made.raw("test")]


def test_criteo_x4_buckets_counts_as_fuxictr_and_shares_the_unknown_row_below_ten(tmp_path):
    counts = ["", "0", "1", "2", "3", "4", "5", "7", "-1", "-2", "900", "8000"]

    def make(draw):
        numbers = {name: draw.choice(counts) for name in NUMBERS}
        return {
            "Label": draw.randrange(2),
            **numbers,
            **{name: draw.choice(["", *"aaabbccdefghi"]) for name in CATEGORIES},
        }

    rows = write(tmp_path, ["Label", *NUMBERS, *CATEGORIES], make)
    made = run("criteo_x4", tmp_path, tmp_path / "out", AS_THEY_LIE)
    assert not [feature for feature in made.schema.features.values() if feature.kind == "dense"]
    rare = 0
    for split, found in made.all_raw().items():
        assert [row["Label"] for row in found] == [row["Label"] for row in rows[split]] and found
        for name in NUMBERS:
            kept = tokens([map(bucket, (row[name] for row in rows["train"]))], 10)
            assert kept <= {-2, -1, 1, 2, 3, 46, 80}  # 3 and 4 with 1, 5 with 2, as FuxiCTR has it
            assert [row[name] for row in found] == known([bucket(row[name]) for row in rows[split]], kept)
        for name in CATEGORIES:
            kept = tokens([train_values(rows, name)], 10)
            column = known([row[name] or None for row in rows[split]], kept)
            assert [row[name] for row in found] == column
            rare += column.count(UNKNOWN)
    assert rare


def test_criteo_x4_shuffles_rows_without_losing_any(tmp_path):
    def make(draw):
        return {
            "Label": draw.randrange(2),
            **dict.fromkeys(NUMBERS, "1"),
            **dict.fromkeys(CATEGORIES, str(draw.randrange(9))),
        }

    rows = write(tmp_path, ["Label", *NUMBERS, *CATEGORIES], make)
    made = run(
        "criteo_x4", tmp_path, tmp_path / "out", *(f"schema.tables.C{i}.vocabulary.min_count=1" for i in range(1, 27))
    )
    pairs = {split: [(row["Label"], row["C7"]) for row in found] for split, found in made.all_raw().items()}
    for split, written in rows.items():
        expected = [(row["Label"], row["C7"]) for row in written]
        assert sorted(pairs[split]) == sorted(expected) and (split != "train" or pairs[split] != expected)


def test_avazu_x1_has_all_values(tmp_path):
    names = [f"feat_{i}" for i in range(1, 23)]
    rows = write(
        tmp_path,
        ["label", *names],
        lambda draw: {"label": draw.randrange(2), **{name: draw.randrange(1_544_000, 1_544_050) for name in names}},
    )
    made = run("avazu_x1", tmp_path, tmp_path / "out")
    assert list(made.schema.features) == names
    for split, found in made.all_raw().items():
        for name in ("feat_1", "feat_22"):
            kept = tokens([train_values(rows, name, int)], 1)
            assert [row[name] for row in found] == known([row[name] for row in rows[split]], kept)


AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def test_avazu_x4_makes_hour_weekday_and_weekend(tmp_path):
    columns = AVAZU.split(",")

    def make(draw):
        row = {name: f"{draw.randrange(40):08x}" for name in columns[5:14]}
        row |= {name: draw.choice([-1, 0, 1, 79]) for name in (*columns[3:5], *columns[14:])}
        hour = f"1410{draw.randrange(21, 31)}{draw.randrange(24):02}"
        return {"id": str(draw.randrange(10**19, 2 * 10**19)), "click": draw.randrange(2), "hour": hour, **row}

    rows = write(tmp_path, AVAZU, make)
    made = run("avazu_x4", tmp_path, tmp_path / "out", AS_THEY_LIE)
    assert list(made.schema.features) == ["hour", *columns[3:], "weekday", "weekend"]
    for written in rows.values():
        for row in written:
            day = datetime.datetime.strptime(row["hour"], "%y%m%d%H")
            row["weekday"] = int(day.strftime("%w"))
            row["weekend"] = int(row["weekday"] in (0, 6))
            row["hour"] = day.hour
    for split, found in made.all_raw().items():
        for name in ("hour", "weekday", "weekend", "site_id", "device_model", "C20"):
            kind = str if isinstance(rows["train"][0][name], str) else int
            kept = tokens([train_values(rows, name, kind)], 2)
            assert [row[name] for row in found] == known([row[name] for row in rows[split]], kept), name
    assert {row["weekday"] for row in made.raw("train")} >= {0, 6}


def listed(text):
    return text.split("^") if text else []


def test_amazon_electronics_x1_keeps_the_first_hundred_of_a_history(tmp_path):
    def make(draw):
        length = draw.choice([1, 3, 99, 100, 101, 180])
        items = [draw.randrange(300) for _ in range(length)]
        item = draw.randrange(300)
        return {
            "label": draw.randrange(2), "user_id": draw.randrange(30), "item_id": item, "cate_id": item % 9,
            "item_history": "^".join(map(str, items)), "cate_history": "^".join(str(i % 9) for i in items),
        }  # fmt: skip

    columns = ["label", "user_id", "item_id", "cate_id", "item_history", "cate_history"]
    rows = write(tmp_path, columns, make, ("train", "test"))
    made = run("amazon_electronics_x1", tmp_path, tmp_path / "out", AS_THEY_LIE)
    for split, found in made.all_raw().items():
        for item, history in (("item_id", "item_history"), ("cate_id", "cate_history")):
            events = [event for row in rows["train"] for event in listed(row[history])[:100]]
            kept = tokens([[str(row[item]) for row in rows["train"]], events], 1)
            assert set(made.vocabularies[item].values()) - {None, UNKNOWN} == kept
            for got, row in zip(found, rows[split]):
                assert [got[item]] == known([str(row[item])], kept)
                assert got[history] == known(listed(row[history])[:100], kept)
        assert [row["user_id"] for row in found] == [row["user_id"] for row in rows[split]]
    assert max(len(row["item_history"]) for row in made.raw("train")) == 100


TAOBAO_AD = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,pid,btag"
)


def test_taobao_ad_x1_aligns_its_three_histories_at_their_ends(tmp_path):
    names = {"cate_his": "cate_id", "brand_his": "brand", "btag_his": "btag"}

    def make(draw):
        length = draw.choice([0, 1, 2, 50])
        row = {name: str(draw.randrange(4)) for name in TAOBAO_AD.split(",")}
        row |= {
            "clk": draw.randrange(2),
            "price": repr(draw.random() * 1e6),
            "btag": "1",
            "userid": str(draw.randrange(12)),
        }
        for name in names:  # each list without its zeros
            values = [str(draw.randrange(5)) for _ in range(length)]
            row[name] = "^".join(value for value in values if value != "0")
        return row

    rows = write(tmp_path, TAOBAO_AD, make, ("train", "test"))
    made = run("taobao_ad_x1", tmp_path, tmp_path / "out", AS_THEY_LIE)
    shorter = 0
    for split, found in made.all_raw().items():
        assert [row["group_id"] for row in found] == [int(row["userid"]) for row in rows[split]]
        users = tokens([train_values(rows, "userid")], 10)
        assert [row["userid"] for row in found] == known([row["userid"] for row in rows[split]], users)
        for history, feature in names.items():
            together = [*train_values(rows, feature), *(e for row in rows["train"] for e in listed(row[history]))]
            kept = tokens([together], 10)  # counted together, where FuxiCTR has each column by itself
            for got, row in zip(found, rows[split]):
                events = listed(row[history])
                missing = max(len(listed(row[name])) for name in names) - len(events)
                assert got[history] == [None] * missing + known(events, kept)
                assert abs(got["price"] / float(row["price"]) - 1) < 1e-6
                shorter += missing > 0
    assert shorter and [] in [row["cate_his"] for row in made.raw("train")]
    assert users < {str(user) for user in range(12)}


def test_kuaivideo_x1_has_two_histories_of_its_items(tmp_path):
    def make(draw):
        lists = ["^".join(str(draw.randrange(60)) for _ in range(draw.choice([0, 2, 9, 100]))) for _ in range(2)]
        return {
            "timestamp": draw.randrange(10**6), "user_id": draw.randrange(9), "item_id": draw.randrange(400),
            "is_click": draw.randrange(2), "is_like": 0, "is_follow": 0, "pos_items": lists[0], "neg_items": lists[1],
        }  # fmt: skip

    columns = ["timestamp", "user_id", "item_id", "is_click", "is_like", "is_follow", "pos_items", "neg_items"]
    rows = write(tmp_path, columns, make, ("train", "test"))
    made = run("kuaivideo_x1", tmp_path, tmp_path / "out", AS_THEY_LIE)
    histories = [[e for row in rows["train"] for e in listed(row[name])] for name in ("pos_items", "neg_items")]
    items = train_values(rows, "item_id")
    kept = tokens([[*items, *histories[0], *histories[1]]], 10)
    assert kept >= tokens([items, *histories], 10), "no fewer rows than FuxiCTR"
    for split, found in made.all_raw().items():
        for got, row in zip(found, rows[split]):
            assert (got["is_click"], got["group_id"]) == (row["is_click"], row["user_id"])
            assert [got["item_id"]] == known([str(row["item_id"])], kept)
            for name in ("pos_items", "neg_items"):
                assert got[name] == known(listed(row[name]), kept)


def test_kuaivideo_gets_the_vectors_of_its_items(tmp_path):
    rows = write(
        tmp_path,
        ["user_id", "item_id", "is_click", "pos_items", "neg_items"],
        lambda draw: {
            "user_id": draw.randrange(3),
            "item_id": draw.randrange(5),
            "is_click": draw.randrange(2),
            "pos_items": "^".join(str(draw.randrange(5)) for _ in range(draw.randrange(4))),
            "neg_items": "",
        },
        splits=("train", "test"),
    )
    images = {item: [float(item + place) for place in range(64)] for item in range(4)}  # item 4 has none
    table = pa.table({"item_id": [str(item) for item in images], "image": list(images.values())})
    pq.write_table(table, tmp_path / "item_visual_emb_dim64.parquet")
    made = run("kuaivideo_x1_vectors", tmp_path, tmp_path.parent / "made", AS_THEY_LIE)
    for split, given in rows.items():
        assert [row["image"] for row in made.rows(split)] == [images.get(row["item_id"]) for row in given]
