"""Recipes on small files in the exact format of the downloads, compared with what plain Python makes of the same rows."""

import datetime
import gzip
import json
import math
import random

import pytest

from data_loaders.prepare import compose
from tests.data_loaders.prepare.conftest import MISSING
from tests.helpers.made_tables import UNKNOWN, history, known, last_split, run, vocabulary

CRITEO = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def write(path, lines, encoding="utf-8"):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding=encoding, newline="") as file:
        file.writelines(line + "\n" for line in lines)


def needs(engine, request):
    """One Spark session serves all tests; skips where there can be none."""
    if engine == "spark":
        for reason, missing in MISSING.items():
            if missing():
                pytest.skip(f"engine=spark: {reason}")
        request.getfixturevalue("spark_session")


def criteo_rows(count, seed=0):
    """Rows of Criteo's files: counts from -2 on, hex categories, a third of everything missing."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        counts = [draw.choice(["", str(draw.choice([-2, -1, 0, 1, 2, 3, 40, 5000])), "7"]) for _ in range(13)]
        values = [draw.choice(["", f"{draw.randrange(5):08x}", "68fd1e64"]) for _ in range(26)]
        rows.append([str(draw.randrange(2)), *counts, *values])
    return rows


def expected_categories(rows, names, min_count, train):
    """Decoded columns of ``names``, naively."""
    found = {}
    for name in names:
        place = CRITEO.index(name)
        values = [row[place] or None for row in rows]
        kept = set(vocabulary([values[i] for i in train], min_count).values())
        found[name] = known(values, kept)
    return found


# Criteo


def test_criteo_reads_the_kaggle_file(tmp_path):
    rows = criteo_rows(60)
    write(tmp_path / "train.txt", ["\t".join(row) for row in rows])
    write(tmp_path / "test.txt", ["\t".join(row[1:]) for row in rows])  # without labels, not to be read
    made = run("criteo", tmp_path, tmp_path / "out", "split.hash.valid=0.0", "split.hash.test=0.0")
    found = made.raw("train")
    assert [row["label"] for row in found] == [int(row[0]) for row in rows]
    expected = expected_categories(rows, CRITEO[14:], 10, range(60))
    assert UNKNOWN in expected["C1"] and None in expected["C1"]
    for name, values in expected.items():
        assert [row[name] for row in found] == values, name
    for place, name in enumerate(CRITEO[1:14], 1):
        counts = [math.log1p(max(int(row[place] or 0), 0)) for row in rows]
        assert [row[name] for row in found] == pytest.approx(counts, rel=1e-6), name


def test_criteo_splits_every_row_once_into_shares(tmp_path):
    write(tmp_path / "train.txt", ["\t".join([*row[:-1], f"{i:08x}"]) for i, row in enumerate(criteo_rows(300))])
    made = run("criteo", tmp_path, tmp_path / "out", "schema.tables.C26.vocabulary.min_count=1")
    sizes = {split: len(made.rows(split)) for split in ("train", "valid", "test")}
    assert sum(sizes.values()) == 300
    assert 10 <= sizes["valid"] <= 50 and 10 <= sizes["test"] <= 50
    unknown = [row["C26"] for split in ("valid", "test") for row in made.raw(split)]
    assert set(unknown) == {UNKNOWN}, "the vocabulary is that of train, where these values are not"


def test_criteo_log2_makes_categories_of_the_counts(tmp_path):
    rows = criteo_rows(60)
    write(tmp_path / "train.txt.gz", ["\t".join(row) for row in rows])
    made = run("criteo_log2", tmp_path, tmp_path / "out", "split.hash.valid=0.0", "split.hash.test=0.0")
    assert not [feature for feature in made.schema.features.values() if feature.kind == "dense"]
    for place, name in enumerate(CRITEO[1:14], 1):
        values = []
        for row in rows:
            count = int(row[place]) if row[place] else None
            values.append(count if count is None or count <= 2 else 2 + math.floor(math.log(count) ** 2))
        kept = set(vocabulary(values, 10).values())
        assert [row[name] for row in made.raw("train")] == known(values, kept), name


def test_criteo_1tb_splits_the_last_day(tmp_path):
    days = {"day_0": 30, "day_2.gz": 30, "day_10": 31, "day_23.gz": 21}
    rows = {name: criteo_rows(count, seed) for seed, (name, count) in enumerate(days.items())}
    for name, lines in rows.items():
        write(tmp_path / name, ["\t".join(row) for row in lines])
    made = run(
        "criteo_1tb",
        tmp_path,
        tmp_path / "out",
        "keep=[day]",
        *(f"schema.tables.C{i}.vocabulary.min_count=1" for i in range(1, 27)),
    )
    found = made.all_raw()
    train = [row for name in ("day_0", "day_10", "day_2.gz") for row in rows[name]]  # files by name
    expected = {"train": train, "valid": rows["day_23.gz"][0::2], "test": rows["day_23.gz"][1::2]}
    for split, lines in expected.items():
        assert [row["label"] for row in found[split]] == [int(row[0]) for row in lines], split
    assert [row["day"] for row in found["train"]] == [0] * 30 + [10] * 31 + [2] * 30
    everything = [*train, *expected["valid"]]
    categories = expected_categories(everything, ["C1", "C26"], 1, range(len(train)))
    for name, values in categories.items():
        assert [row[name] for row in (*found["train"], *found["valid"])] == values


# Avazu

AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def avazu_rows():
    draw = random.Random(1)
    rows = []
    for day in range(21, 31):
        for hour in (0, 9, 23):
            number = str(draw.randrange(10**19, 2 * 10**19))  # does not fit into 64 bits with a sign
            strings = [f"{draw.randrange(4):08x}" for _ in range(9)]
            rows.append([number, str(draw.randrange(2)), f"1410{day:02}{hour:02}", "1005", str(draw.randrange(2)), *strings,
                         "1", "0", "15706", "320", "50", "1722", "0", "35", "-1", "79"])  # fmt: skip
    return rows


def avazu(engine):
    """The recipe; for Spark, which takes seconds for each vocabulary, with a few of its features."""
    declaration = compose.load("avazu", ["keep=[hour]"])
    if engine == "spark":
        schema = declaration.schema
        for name in set(schema.features) - {"hour_of_day", "weekday", "site_id", "C20"}:
            del schema.features[name], schema.tables[name]
        schema.crosses.clear()
    return declaration


@pytest.mark.parametrize(("file", "engine"), [("train.csv", "duckdb"), ("train.gz", "duckdb"), ("train.gz", "spark")])
def test_avazu_makes_hour_and_weekday_and_splits_by_day(tmp_path, request, file, engine):
    needs(engine, request)
    rows = avazu_rows()
    write(tmp_path / file, [AVAZU, *(",".join(row) for row in rows)])
    made = run(avazu(engine), tmp_path, tmp_path / "out", engine=engine)
    found = made.all_raw()
    expected = {"train": rows[:24], "valid": rows[24:27], "test": rows[27:]}
    for split, lines in expected.items():
        assert [row["click"] for row in found[split]] == [int(row[1]) for row in lines]
        assert [row["hour"] for row in found[split]] == [int(row[2]) for row in lines]
        assert [row["hour_of_day"] for row in found[split]] == [0, 9, 23] * (len(lines) // 3)
        # 21 October 2014 was a Tuesday.
        assert [row["weekday"] for row in found[split]] == [weekday(row[2]) for row in lines]
        kept = set(vocabulary([row[5] for row in rows[:24]], 2).values())
        assert [row["site_id"] for row in found[split]] == known([row[5] for row in lines], kept)
        assert {row["C20"] for row in found[split]} == {-1}


def weekday(hour):
    return datetime.datetime.strptime(hour, "%y%m%d%H").weekday()


# MovieLens

MOVIES = {
    1: ("Toy Story (1995)", "Animation|Children's|Comedy"),
    73: ("Misérables, Les (1995)", "Drama|Musical"),
    648: ("Mission: Impossible (1996)", "Action"),
    2019: ('Seven "Samurai" (1954)', "Action|Drama"),
    9: ("Nothing (2000)", "(no genres listed)"),
}


def ratings(half=False):
    """Several in one second, as people did."""
    draw = random.Random(2)
    rows = []
    for user in range(1, 7):
        time = 978_300_000
        for movie in draw.choices([1, 73, 648, 2019], k=22):
            time += draw.choice([0, 0, 60])
            rows.append(
                {
                    "user_id": user,
                    "movie_id": movie,
                    "rating": draw.randrange(2, 11) / 2 if half else draw.randrange(1, 6),
                    "time": time,
                }
            )
    draw.shuffle(rows)
    return rows


def check_movies(made, rows, genres):
    """Every row of every split: label, history, genres."""
    splits = last_split(rows, "user_id", "time", 0.1, 0.1)
    for row in rows:
        row["genre1"] = genres[row["movie_id"]][0]
    train = [row for row, split in zip(rows, splits) if split == "train"]
    movies = {row["movie_id"] for row in train}
    names = {name for row in train for name in (row["genre1"], *genres[row["movie_id"]])} - {None}
    for split in ("train", "valid", "test"):
        expected = [row for row, own in zip(rows, splits) if own == split]
        found = made.raw(split)
        assert len(found) == len(expected) > 0
        for got, row in zip(found, expected):
            before = (rows, "user_id", "time")
            assert got["user_id"] == row["user_id"] and got["label"] == (row["rating"] >= 4)
            assert [got["movie_id"]] == known([row["movie_id"]], movies)
            assert [got["genre1"]] == known([row["genre1"]], names)
            listed = [name for name in genres[row["movie_id"]] if name]
            assert got["genres"] == known(listed, names)
            watched = history(*before, "movie_id", row["user_id"], row["time"])
            assert got["hist_movie_id"] == known(watched, movies)
            assert got["hist_genre1"] == known(history(*before, "genre1", row["user_id"], row["time"]), names)


@pytest.mark.parametrize("engine", ["duckdb", "spark"])
def test_movielens_1m_reads_the_dat_files(tmp_path, request, engine):
    needs(engine, request)
    rows = ratings()
    write(tmp_path / "ratings.dat", [f"{r['user_id']}::{r['movie_id']}::{r['rating']}::{r['time']}" for r in rows])
    users = [f"{user}::{'FM'[user % 2]}::{[1, 18, 56][user % 3]}::{user}::98107-211{user}" for user in range(1, 7)]
    write(tmp_path / "users.dat", users)
    movies = {movie: MOVIES[movie] for movie in (1, 73, 648, 2019)}
    write(tmp_path / "movies.dat", [f"{m}::{title}::{genres}" for m, (title, genres) in movies.items()], "latin-1")
    made = run("movielens_1m", tmp_path, tmp_path / "out", "order.shuffle=false", engine=engine)
    check_movies(made, rows, {movie: genres.split("|") for movie, (_, genres) in movies.items()})
    for row in made.raw("train"):
        user = row["user_id"]
        assert (row["gender"], row["age"], row["occupation"], row["zip"]) == (
            "FM"[user % 2], [1, 18, 56][user % 3], user, f"98107-211{user}",
        )  # fmt: skip


def test_movielens_20m_reads_the_csv_files(tmp_path):
    rows = ratings(half=True)
    for row in rows[:20]:
        row["movie_id"] = 9
    lines = [f"{r['user_id']},{r['movie_id']},{r['rating']},{r['time']}" for r in rows]
    write(tmp_path / "ratings.csv", ["userId,movieId,rating,timestamp", *lines])
    doubled = {movie: title.replace('"', '""') for movie, (title, _) in MOVIES.items()}
    titles = [f'{movie},"{doubled[movie]}",{genres}' for movie, (_, genres) in MOVIES.items()]
    write(tmp_path / "movies.csv", ["movieId,title,genres", *titles])
    made = run("movielens_20m", tmp_path, tmp_path / "out", "order.shuffle=false")
    genres = {m: [None] if "no genres" in genres else genres.split("|") for m, (_, genres) in MOVIES.items()}
    check_movies(made, rows, genres)


# Amazon


def reviews(users, per_user, items=40, seed=3):
    """Distinct items of each user, days not in order, two on one day now and then."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        days = [draw.randrange(per_user) for _ in range(per_user)]
        for item, day in zip(draw.sample(range(items), per_user), days):
            rows.append({"user": f"A{user}", "item": f"B{item:04}", "time": 1_400_000_000 + 86_400 * day})
    draw.shuffle(rows)
    return rows


def check_pairs(found, rows, user, item):
    """Each positive is followed by its negative, an item that the user never had; splits are of whole pairs."""
    splits = last_split(rows, "user", "time", 1, 1)
    touched = {(row["user"], row["item"]) for row in rows}
    items = {row["item"] for row in rows}
    for split in ("train", "valid", "test"):
        expected = [row for row, own in zip(rows, splits) if own == split]
        positives, negatives = found[split][0::2], found[split][1::2]
        assert len(positives) == len(negatives) == len(expected)
        assert {row["label"] for row in positives} == {1} and {row["label"] for row in negatives} == {0}
        assert [row[user] for row in positives] == [row[user] for row in negatives] == [row["user"] for row in expected]
        for got, row in zip(positives, expected):
            assert got[item] in (row["item"], UNKNOWN)
        for got in negatives:
            assert got[item] == UNKNOWN or (got[item] in items and (got[user], got[item]) not in touched)
    return splits


def write_2014(tmp_path, rows):
    lines = [
        json.dumps({"reviewerID": r["user"], "asin": r["item"], "reviewerName": 'J. "Q" Doe', "helpful": [0, 1],
                    "reviewText": "fine,\tok\n", "overall": 5.0, "summary": "…", "unixReviewTime": r["time"],
                    "reviewTime": "09 13, 2009"})
        for r in rows
    ]  # fmt: skip
    write(tmp_path / "reviews_Toys_5.json.gz", lines)


def test_amazon_2014_pairs_reviews_with_negatives(tmp_path):
    rows = reviews(12, 8)
    write_2014(tmp_path, [*rows, {**rows[0], "time": rows[0]["time"] + 10**7}])  # twice: the first in the file counts
    write(tmp_path / "meta_Toys.json.gz", ["{'asin': 'B0001', 'categories': [['Toys']]}"])  # Python, not JSON
    made = run("amazon_2014", tmp_path, tmp_path / "out", "order.shuffle=false")
    found = made.all_raw()
    check_pairs(found, rows, "reviewerID", "asin")
    items = set(made.vocabularies["item"].values())
    for row in (*found["train"], *found["valid"], *found["test"]):
        before = history(rows, "user", "time", "item", row["reviewerID"], row["unixReviewTime"])
        assert row["hist_asin"] == known(before, items)
    assert max(len(row["hist_asin"]) for row in found["test"]) > 3


def test_amazon_2014_categories_cuts_the_leaf_category_out_of_python_lines(tmp_path):
    rows = reviews(12, 8)
    write_2014(tmp_path, rows)
    paths = [
        [["Toys", "Puzzles"]],
        [["Toys", "Kids' Games"]],
        [["Toys", "Men's"], ["Sports", "Ball"]],
        [["Toys"], ["Clothing", "Women's \\ Watches"]],
        None,
    ]
    leaves, lines = {}, []
    for number in range(39):  # the fortieth has no line
        item = {"asin": f"B{number:04}", "title": 'It\'s "x"', "related": {"also_bought": ["B1", "B2"]}, "price": 3.5}
        path = paths[number % 5]
        lines.append(repr(item | ({"categories": path} if path else {}) | {"imUrl": "http://x/[[y]].jpg"}))
        leaves[item["asin"]] = path[-1][-1].replace("\\", "\\\\") if path else None
    write(tmp_path / "meta_Toys.json.gz", lines)
    made = run("amazon_2014_categories", tmp_path, tmp_path / "out", "order.shuffle=false")
    found = made.all_raw()
    check_pairs(found, rows, "reviewerID", "asin")
    for row in rows:
        row["category"] = leaves.get(row["item"])
    names = set(made.vocabularies["category"].values())
    assert names == {"Puzzles", "Kids' Games", "Ball", "Women's \\\\ Watches", None, UNKNOWN}
    for row in (*found["train"], *found["valid"], *found["test"]):
        before = history(rows, "user", "time", "category", row["reviewerID"], row["unixReviewTime"])
        assert row["hist_category"] == known(before, names)
        assert row["asin"] == UNKNOWN or row["category"] == leaves.get(row["asin"])


def test_amazon_2023_reads_reviews_and_items(tmp_path):
    rows = reviews(12, 8)
    for row in rows:
        row["time"] = row["time"] * 1000 + 728
    rare = [{"user": "AFEW", "item": f"B{i:04}", "time": 1_400_000_000_000 + i} for i in range(4)]  # of too few reviews
    lines = [
        json.dumps({"rating": 5.0, "title": "t", "text": "x", "images": [], "asin": "C" + r["item"], "parent_asin": r["item"],
                    "user_id": r["user"], "timestamp": r["time"], "helpful_vote": 0, "verified_purchase": True})
        for r in (*rows, *rare)
    ]  # fmt: skip
    write(tmp_path / "All_Beauty.jsonl.gz", lines)
    prices = [19.5, None, "—", "from 3.99", 7]
    meta, items = [], {}
    for number in range(39):  # the fortieth has no entry
        item = {"parent_asin": f"B{number:04}", "main_category": None if number == 2 else "All Beauty", "title": "t",
                "price": prices[number % 5], "store": f"store {number % 3}", "details": {"Brand": "x"},
                "categories": [[], ["Beauty", f"Hair {number % 4}"], ["Beauty"]][number % 3]}  # fmt: skip
        items[item["parent_asin"]] = item
        meta.append(json.dumps(item))
    write(tmp_path / "meta_All_Beauty.jsonl.gz", meta)
    made = run("amazon_2023", tmp_path, tmp_path / "out", "order.shuffle=false")
    found = made.all_raw()
    check_pairs(found, rows, "user_id", "parent_asin")
    for row in rows:
        row["category"] = (items.get(row["item"], {}).get("categories") or [None])[-1]
    leaves = set(made.vocabularies["category"].values())
    known_items = set(made.vocabularies["item"].values())
    for row in (*found["train"], *found["valid"], *found["test"]):
        key = (rows, "user", "time")
        assert row["hist_asin"] == known(history(*key, "item", row["user_id"], row["timestamp"]), known_items)
        assert row["hist_category"] == known(history(*key, "category", row["user_id"], row["timestamp"]), leaves)
        if row["parent_asin"] == UNKNOWN:
            continue
        item = items.get(row["parent_asin"], {})
        assert [row["category"]] == known([(item.get("categories") or [None])[-1]], leaves)
        assert row["main_category"] == item.get("main_category")
        assert row["store"] in (item.get("store"), UNKNOWN)
        price = item.get("price")
        assert row["price"] == pytest.approx(math.log1p(price) if isinstance(price, (int, float)) else 0.0)


# Taobao


def test_taobao_behavior_reads_the_log(tmp_path):
    draw = random.Random(4)
    start, day = 1_511_539_200, 86_400
    rows = []
    kinds = ["pv", "pv", "pv", "buy", "cart", "fav"]
    for _ in range(300):
        item, kind = draw.randrange(60), draw.choice(kinds)
        row = {"user": draw.randrange(8), "item": item, "category": item % 7, "kind": kind}
        rows.append({**row, "time": start + draw.randrange(9 * day)})
    rows.append({"user": 1, "item": 5, "category": 5, "kind": "pv", "time": -2_134_949_234})
    rows.append({"user": 1, "item": 5, "category": 5, "kind": "pv", "time": start + 9 * day})
    write(
        tmp_path / "UserBehavior.csv",
        [f"{r['user']},{r['item']},{r['category']},{r['kind']},{r['time']}" for r in rows],
    )
    made = run("taobao_behavior", tmp_path, tmp_path / "out")
    found = made.all_raw()
    clicks = [r for r in rows if r["kind"] == "pv" and start <= r["time"] < start + 9 * day]
    touched = {(row["user"], row["item"]) for row in rows}
    bounds = {"train": (0, 7), "valid": (7, 8), "test": (8, 9)}
    items = set(made.vocabularies["item"].values())
    for split, (first, end) in bounds.items():
        expected = [r for r in clicks if first <= (r["time"] - start) // day < end]
        positives, negatives = found[split][0::2], found[split][1::2]
        assert [(r["user_id"], r["timestamp"]) for r in positives] == [(r["user"], r["time"]) for r in expected]
        assert [r["item_id"] for r in positives] == known([r["item"] for r in expected], items)
        assert len(negatives) == len(expected)
        for row in negatives:
            assert row["label"] == 0 and (row["user_id"], row["item_id"]) not in touched
            assert row["item_id"] == UNKNOWN or row["category_id"] == row["item_id"] % 7
        for row in found[split]:
            assert row["hour_of_day"] == (row["timestamp"] - start) // 3600 % 24
            before = history(clicks, "user", "time", "item", row["user_id"], row["timestamp"])
            assert row["hist_items"] == known(before, items)
            assert [None if item == UNKNOWN else item % 7 for item in row["hist_items"]] == [
                None if item == UNKNOWN else category
                for item, category in zip(row["hist_items"], row["hist_categories"])
            ]


def test_taobao_ad_joins_ads_profiles_and_actions(tmp_path):
    draw = random.Random(5)
    start, day = 1_494_000_000, 86_400
    shown = [
        {
            "user": draw.randrange(1, 9),
            "time": start + draw.randrange(8 * day),
            "ad": draw.randrange(1, 6),
            "clk": draw.randrange(2),
        }
        for _ in range(200)
    ]
    shown[:0] = [{"user": 1, "time": start + place * day, "ad": 1, "clk": 0} for place in range(6)]
    write(tmp_path / "raw_sample.csv", ["user,time_stamp,adgroup_id,pid,nonclk,clk", *(
        f"{r['user']},{r['time']},{r['ad']},430548_1007,{1 - r['clk']},{r['clk']}" for r in shown)])  # fmt: skip
    brands = {1: "95471", 2: "NULL", 3: "7", 4: "95471", 5: "7"}
    write(tmp_path / "ad_feature.csv", ["adgroup_id,cate_id,campaign_id,customer,brand,price", *(
        f"{ad},{ad % 2},{ad},{ad},{brand},{ad * 10}.5" for ad, brand in brands.items())])  # fmt: skip
    head = "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
    profiles = [
        f"{user},0,5,{1 + user % 2},{user},,3,0,{'' if user == 2 else user % 3}" for user in range(1, 8)
    ]  # 8: none
    write(tmp_path / "user_profile.csv", [head + "new_user_class_level ", *profiles])
    actions = [
        {
            "user": draw.randrange(1, 9),
            "time": start + draw.randrange(-day, 8 * day),
            "cate": draw.randrange(2),
            "brand": draw.choice([7, 95471]),
        }
        for _ in range(150)
    ]
    kinds = ["pv", "cart", "fav", "buy"]
    write(tmp_path / "behavior_log.csv", ["user,time_stamp,btag,cate,brand", *(
        f"{r['user']},{r['time']},{draw.choice(kinds)},{r['cate']},{r['brand']}" for r in actions)])  # fmt: skip
    features = (
        "user",
        "adgroup_id",
        "cate_id",
        "campaign_id",
        "customer",
        "brand",
        "cms_segid",
        "age_level",
        "new_user_class_level",
    )
    made = run(
        "taobao_ad", tmp_path, tmp_path / "out", *(f"schema.tables.{name}.vocabulary.min_count=1" for name in features)
    )
    found = made.all_raw()
    bounds = {"train": (0, 6), "valid": (6, 7), "test": (7, 8)}
    for split, (first, end) in bounds.items():
        expected = [row for row in shown if first <= (row["time"] - start) // day < end]
        assert [(r["user"], r["time_stamp"], r["clk"]) for r in found[split]] == [
            (r["user"], r["time"], r["clk"]) for r in expected
        ]
        for got, row in zip(found[split], expected):
            assert (got["adgroup_id"], got["cate_id"], got["campaign_id"]) == (row["ad"], row["ad"] % 2, row["ad"])
            assert got["brand"] == (None if row["ad"] == 2 else int(brands[row["ad"]]))
            assert got["price"] == pytest.approx(math.log1p(row["ad"] * 10 + 0.5))
            profile = row["user"] != 8
            assert got["age_level"] == (row["user"] if profile else None) and got["pvalue_level"] is None
            assert got["new_user_class_level"] == (row["user"] % 3 if profile and row["user"] != 2 else None)
            for name, column in (("hist_cate", "cate"), ("hist_brand", "brand")):
                assert got[name] == history(actions, "user", "time", column, row["user"], row["time"]), name
