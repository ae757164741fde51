"""GAUC, slices and ranking metrics against scikit-learn and plain loops, and rows that are kept in files."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from trainer.metrics import shuffle_by_key
from trainer.metrics.grouped import GroupAUC, Groups, Slices
from trainer.metrics.ranking import Ranking
from trainer.metrics.shuffle_by_key import KeyedRows, pack, unpack


def sample(rows, groups, seed, digits=1, weights=(1.0,)):
    """Logits with many ties, labels, weights and keys over all of int64, for some groups many rows."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-(1 << 63), (1 << 63) - 1, groups)
    keys = values[np.minimum(rng.geometric(min(1, 4 / groups), rows) - 1, groups - 1)]
    logits = np.round(rng.standard_normal(rows) * 1.5 - 1, digits).astype(np.float32)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return logits, labels, rng.choice(weights, rows).astype(np.float32), keys


def collected(columns, memory_bytes=1 << 30, batch=333):
    rows = KeyedRows(memory_bytes)
    for start in range(0, len(columns[0]), batch):
        logits, labels, weights, keys = (torch.from_numpy(c[start : start + batch]) for c in columns)
        rows.update(logits, labels, weights, torch.stack((keys ^ 1, keys), 1))
    return rows


def values_of(metric, rows, column=1):
    for part, found in rows.parts(column):
        metric.add(part, Groups.of(found))
    return metric.values(rows.num_parts)


def by_key(columns):
    logits, labels, weights, keys = columns
    counted = weights > 0
    for key in np.unique(keys[counted]):
        mine = counted & (keys == key)
        yield key, logits[mine], labels[mine], weights[mine]


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.3, 1.0, 2.5)], ids=["plain", "weighted"])
def test_gauc_is_the_weighted_mean_of_scikit_learns_auc(weights):
    columns = sample(4000, 300, seed=1, weights=weights)
    total = counted = groups = rows = skipped = 0
    for _, logits, labels, weight in by_key(columns):
        if len(set(labels)) < 2:
            skipped += 1
            continue
        total += roc_auc_score(labels, logits, sample_weight=weight) * weight.sum(dtype=np.float64)
        counted, groups, rows = counted + weight.sum(dtype=np.float64), groups + 1, rows + len(labels)
    found = values_of(GroupAUC(), collected(columns))
    assert found.pop("gauc") == pytest.approx(total / counted, rel=1e-12)
    assert found == {"gauc_groups": groups, "gauc_rows": rows, "gauc_groups_of_one_class": skipped}
    assert min(groups, skipped) > 10


def test_one_group_has_the_auc_of_all_rows():
    logits, labels, weights, keys = sample(3000, 5, seed=2)
    found = values_of(GroupAUC(), collected((logits, labels, weights, np.zeros_like(keys))))
    assert found["gauc"] == pytest.approx(roc_auc_score(labels, logits), rel=1e-13)


def test_infinite_and_signed_zero_logits():
    logits = np.array([np.inf, -np.inf, 0.0, -0.0, 1e38, -1e38, np.nan], np.float32)
    labels, weights = np.array([1, 0, 1, 0, 0, 1, 1], np.float32), np.array([1] * 6 + [0], np.float32)
    found = values_of(GroupAUC(), collected((logits, labels, weights, np.zeros(7, np.int64))))
    order = np.array([3, -3, 0, 0, 2, -2])
    assert found["gauc"] == roc_auc_score(labels[:6], order)


def test_packing_keeps_all_there_is_and_the_order():
    rng = np.random.default_rng(3)
    logits = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500), [0, np.inf, -np.inf]])
    logits = logits.astype(np.float32)
    labels, weights = (rng.random((2, 503)) < 0.5).astype(np.float32)
    weights *= rng.random(503).astype(np.float32)
    packed = pack(*map(torch.from_numpy, (logits, labels, weights))).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(unpack(packed), (logits, labels, weights)))
    assert np.array_equal(logits[np.argsort(packed)], np.sort(logits))


@pytest.mark.parametrize("k", [1, 3, 10, 1000])
def test_ndcg_is_that_of_scikit_learn(k):
    columns = sample(3000, 200, seed=4)
    expected = [ndcg_score([y], [x], k=k) for _, x, y, _ in by_key(columns) if y.any() and len(y) > 1]
    single = [1.0 for _, _, y, _ in by_key(columns) if len(y) == 1 and y.any()]  # scikit-learn refuses one document
    found = values_of(Ranking([k]), collected(columns))
    assert found[f"ndcg@{k}"] == pytest.approx(np.mean(expected + single), rel=1e-12)
    assert found["requests"] == len(expected) + len(single)
    assert found["requests"] + found["requests_without_click"] == len(list(by_key(columns)))
    assert found["requests_without_click"] > 5


def expected_over_ties(logits, labels, ks):
    """Hit rates and reciprocal rank, averaged over every order of tied rows."""
    places = []
    for order in itertools.permutations(range(len(logits))):
        if all(logits[a] >= logits[b] for a, b in itertools.pairwise(order)):
            places.append(next(i for i, row in enumerate(order, 1) if labels[row]))
    return [np.mean([place <= k for place in places]) for k in ks], np.mean([1 / place for place in places])


def test_hit_rate_and_mrr_are_means_over_the_orders_of_ties():
    rng = np.random.default_rng(5)
    keys = np.repeat(rng.integers(-(1 << 62), 1 << 62, 60), rng.integers(1, 7, 60))
    logits = rng.integers(0, 3, len(keys)).astype(np.float32)
    labels = (rng.random(len(keys)) < 0.4).astype(np.float32)
    columns = (logits, labels, np.ones_like(labels), keys)
    ks = [1, 2, 5]
    expected = [expected_over_ties(x, y, ks) for _, x, y, _ in by_key(columns) if y.any()]
    found = values_of(Ranking(ks), collected(columns))
    assert [found[f"hit_rate@{k}"] for k in ks] == pytest.approx(np.mean([hits for hits, _ in expected], axis=0))
    assert found["mrr"] == pytest.approx(np.mean([reciprocal for _, reciprocal in expected]), rel=1e-12)


def test_ties_of_many_rows():
    """One click among n tied rows: rank uniform in 1 … n."""
    n = 30_000
    labels = np.zeros(n, np.float32)
    labels[17] = 1
    found = values_of(
        Ranking([10]), collected((np.zeros(n, np.float32), labels, np.ones(n, np.float32), np.zeros(n, int)))
    )
    assert found["mrr"] == pytest.approx(sum(1 / i for i in range(1, n + 1)) / n, rel=1e-9)
    assert found["hit_rate@10"] == pytest.approx(10 / n, rel=1e-9)


def test_slices_are_scikit_learns_figures_and_the_rest_is_counted():
    columns = sample(6000, 40, seed=6, weights=(0.5, 1.0, 3.0))
    groups = sorted(by_key(columns), key=lambda group: (-len(group[1]), group[0]))
    lines = values_of(Slices(lambda keys: {key: f"value {key}" for key in keys}, most=7), collected(columns))["slices"]
    assert [line["value"] for line in lines[:-1]] == [f"value {key}" for key, *_ in groups[:7]]
    for line, (_, x, y, w) in zip(lines[:-1], groups):
        probability = 1 / (1 + np.exp(-x.astype(np.float64)))
        assert line["rows"] == len(x)
        assert line["auc"] == pytest.approx(roc_auc_score(y, x, sample_weight=w), rel=1e-12)
        assert line["logloss"] == pytest.approx(log_loss(y, probability, sample_weight=w), rel=1e-9)
        assert line["calibration"] == pytest.approx((w * probability).sum() / (w * y).sum(), rel=1e-9)
        assert line["label_mean"] == pytest.approx(np.average(y, weights=w), rel=1e-6)
    x, y, w = (np.concatenate(parts) for parts in zip(*(group[1:] for group in groups[7:])))
    rest = lines[-1]
    assert (rest["other_values"], rest["rows"], rest["auc"]) == (len(groups) - 7, len(x), None)
    assert rest["logloss"] == pytest.approx(log_loss(y, 1 / (1 + np.exp(-x.astype(np.float64))), sample_weight=w))
    few = values_of(Slices(lambda keys: dict.fromkeys(keys)), collected(columns))["slices"]
    assert len(few) == len(groups) and not any("other_values" in line for line in few)


@pytest.mark.parametrize("memory_bytes", [0, 40_000])
def test_rows_in_files_give_the_same_bits(memory_bytes, monkeypatch):
    monkeypatch.setattr(shuffle_by_key, "BLOCK_ROWS", 500)
    monkeypatch.setattr(shuffle_by_key, "PART_ROWS", 64)
    columns = sample(5000, 400, seed=7, weights=(0.1, 0.7, 1.0))

    def everything(rows):
        metrics = (GroupAUC(), Ranking([1, 5]), Slices(lambda keys: dict(zip(keys, map(str, keys)))))
        return [values_of(metric, rows) for metric in metrics]

    spilled, whole = collected(columns, memory_bytes), collected(columns)
    assert everything(spilled) == everything(whole)
    assert spilled.spilled_bytes >= 5000 * 24 - memory_bytes // 2 - 500 * 24 and not whole.spilled_bytes
    assert everything(spilled) == everything(whole), "a second time, too"
    order = np.random.default_rng(8).permutation(5000)
    shuffled = collected(tuple(column[order] for column in columns))
    assert everything(shuffled) == everything(whole), "and whatever the order of rows"


def test_no_rows():
    nothing = collected(sample(10, 2, seed=9, weights=(0.0,)))
    assert values_of(GroupAUC(), nothing)["gauc"] is None
    found = values_of(Ranking([5]), nothing)
    assert found == {"ndcg@5": None, "hit_rate@5": None, "mrr": None, "requests": 0, "requests_without_click": 0}
    assert values_of(Slices(lambda keys: {}), nothing) == {"slices": []}


def test_a_full_disk_names_the_remedy(monkeypatch):
    def full():
        raise OSError("No space left on device")

    monkeypatch.setattr(shuffle_by_key.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left.*TMPDIR.*evaluation.memory_mb"):
        values_of(GroupAUC(), collected(sample(10, 2, seed=10), memory_bytes=0))


def test_a_million_groups_in_little_memory():
    """300,000 groups here, in a few seconds and without a loop over them; a part has a bounded number of rows."""
    rows = 600_000
    keys = np.random.default_rng(11).integers(-(1 << 63), (1 << 63) - 1, rows // 2).repeat(2)
    labels = np.tile([0.0, 1.0], rows // 2).astype(np.float32)
    logits = np.tile([0.0, 1.0, 1.0, 0.0], rows // 4).astype(np.float32)
    kept = collected((logits, labels, np.ones(rows, np.float32), keys), batch=50_000)
    assert max(len(found) for _, found in kept.parts(1)) < 1.1 * shuffle_by_key.PART_ROWS
    found = values_of(GroupAUC(), kept)
    assert found["gauc"] == 0.5 and found["gauc_groups"] == rows // 2
    assert not math.isnan(found["gauc"])
