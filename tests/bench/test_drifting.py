"""The synthetic days of bench.incremental: their truth is what they say, and moves as they say."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench import drifting


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    paths, best = drifting.make_days(tmp_path_factory.mktemp("days"), 3)
    return [pq.read_table(path / "shown.parquet").to_pandas() for path in paths], best


def test_labels_follow_the_probabilities(days):
    for day in days[0]:
        error = (day.label - day.probability).mean() / np.sqrt(
            (day.probability * (1 - day.probability)).mean() / len(day)
        )
        assert abs(error) < 4
        deciles = day.groupby((day.probability * 10).astype(int))[["label", "probability"]].mean()
        np.testing.assert_allclose(deciles.label, deciles.probability, atol=0.02)


def test_the_best_auc_is_that_of_the_probabilities(days):
    first = days[0][0]
    ranks = first.probability.rank()
    positives = first.label.sum()
    expected = (ranks[first.label == 1].sum() - positives * (positives + 1) / 2) / (
        positives * (len(first) - positives)
    )
    assert days[1][0] == pytest.approx(expected, abs=1e-6)


def test_some_items_are_new_each_day_and_the_others_have_moved(days):
    first, second, third = days[0]
    for before, after in ((first, second), (second, third)):
        renewed = len(set(after["item"]) - set(before["item"])) / drifting.ITEMS
        assert renewed == pytest.approx(drifting.RENEWED, abs=0.04)
    one, two = (day.groupby(["user", "item"]).probability.first() for day in (first, second))
    both = one.index.intersection(two.index)
    logits = [np.log(side[both] / (1 - side[both])) for side in (one, two)]
    assert 0.75 < np.corrcoef(*logits)[0, 1] < 0.97  # about RHO
