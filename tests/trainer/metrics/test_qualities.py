"""Coverage, exposure, diversity and novelty against plain loops over lists, and by hand."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from data_loaders.errors import UserError
from tests.helpers.qualities import Facts, computed, loops, rows
from trainer.config.evaluation import EvaluationConfig, QualitiesConfig
from trainer.metrics.qualities import gini


def test_all_qualities_equal_plain_loops():
    columns = rows(3_000, requests=250, items=60)
    found, expected = computed(columns, [1, 3, 10]), loops(columns, [1, 3, 10])
    assert set(expected) <= set(found)
    for name, value in expected.items():  # a list's share 1 / length is one of 2^32 units
        assert found[name] == pytest.approx(value, rel=10 * 2.0**-32), name
    assert 0.1 < found["gini@1"] < 1 and 0 < found["unseen@3"] < 1 and 0 < found["diversity@3"] < 1


def test_three_lists_by_hand():
    """Lists [1, 2], [1, 3], [4]: item 5 is offered third; trained on 1 three times and on 2 once."""
    columns = np.array([(1, 1, 0, 3), (1, 2, 0, 2), (1, 5, 1, 1), (2, 1, 0, 9), (2, 3, 1, 8), (3, 4, 0, 0)]).T
    found = computed(columns, [2], Facts({1: 3, 2: 1}, {1: [1, 0], 2: [1, 1], 3: [0, 2], 4: [0, 0], 5: [1, 0]}))
    assert found["items_offered"] == 5 and found["coverage@2"] == 4 / 5
    assert found["gini@2"] == (-4 * 0 - 2 * 1 + 0 * 1 + 2 * 1 + 4 * 2) / (5 * 5)
    assert found["diversity@2"] == 1 / 2, "list [4] has no pair"
    assert found["diversity_cosine@2"] == pytest.approx(((1 - math.sqrt(0.5)) + 1) / 2, rel=1e-15)
    known, bits = 4 + 5, math.log2  # rows and items
    expected = (bits(known / 4) + bits(known / 2)) / 2, (bits(known / 4) + bits(known / 1)) / 2, bits(known / 1)
    assert found["novelty@2"] == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert found["unseen@2"] == pytest.approx((0 + 1 / 2 + 1) / 3, rel=1e-9)


def test_gini_is_that_of_all_pairs():
    shown = Counter(np.random.default_rng(3).integers(0, 9, 200).tolist())
    values = list(shown.elements())
    pairs = sum(abs(a - b) for a, b in itertools.product(values, repeat=2))
    assert gini(shown) == pytest.approx(pairs / (2 * len(values) * sum(values)), rel=1e-12)
    assert gini({4: 7}) == 0 and gini({0: 3}) is None and gini({}) is None


def test_equal_scores_prefer_no_item():
    """A thousand requests of the same ten items, all scored alike: the first of each is as good as drawn."""
    request, item = np.divmod(np.arange(10_000), 10)
    columns = np.stack([request, item, item, np.zeros_like(item)])
    found = computed(columns, [1])
    assert found["coverage@1"] == 1
    draws = np.random.default_rng(0).multinomial(1000, np.full(10, 0.1), 2000)
    assert found["gini@1"] < np.quantile([gini(Counter(each.tolist())) for each in draws], 0.999)
    backwards = columns[:, ::-1]
    assert computed(backwards, [1]) == found


def test_what_no_row_defines_is_none():
    found = computed(np.empty((4, 0), np.int64), [5])
    assert found["items_offered"] == 0
    assert {found[f"{name}@5"] for name in ("coverage", "gini", "diversity", "diversity_cosine", "novelty")} == {None}
    alone = computed(np.array([[1], [1], [1], [1]]), [5])
    assert alone["coverage@5"] == 1 and alone["diversity@5"] is None and alone["gini@5"] == 0


def test_vectors_are_compared_as_scikit_learn_does():
    from sklearn.metrics.pairwise import cosine_distances

    columns = rows(400, requests=20, items=15)
    facts = Facts.random(15)
    found = computed(columns, [4], facts)["diversity_cosine@4"]
    expected = []
    for request in np.unique(columns[0]):
        own = columns[:, columns[0] == request]
        best = own[1][np.argsort(-own[3], kind="stable")][:4]
        if len(best) > 1:
            distances = cosine_distances(np.array([facts.rows[item] for item in best]))
            expected.append(distances[np.triu_indices(len(best), 1)].mean())
    assert found == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QualitiesConfig(novelty=True), "evaluation.qualities.novelty needs evaluation.qualities.item"),
        (lambda: QualitiesConfig(category="c"), "evaluation.qualities.category needs"),
        (lambda: EvaluationConfig(qualities=QualitiesConfig(item="i")), "needs evaluation.request"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_rows_of_weight_zero_are_not_there():
    columns = rows(500, requests=40, items=20)
    padded = np.concatenate([columns, [[99_999], [77], [1], [10_000]]], axis=1)
    weights = torch.ones(501)
    weights[-1] = 0
    assert computed(padded, [3], weights=weights) == computed(columns, [3])
