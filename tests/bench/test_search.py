from bench import search


def test_values_are_tried_in_all_combinations_and_lists_are_one_value():
    found = search.combinations(["a=1,2", "b=x", "c={d: 1, e: 2}", "f=[1,2]"])
    assert found == [(f"a={a}", "b=x", "c={d: 1, e: 2}", "f=[1,2]") for a in (1, 2)]


def test_the_best_mean_over_seeds_comes_first():
    known = {
        "lr=1 seed=1": {"auc": 0.6},
        "lr=1 seed=2": {"auc": 0.8},
        "lr=2 seed=1": {"auc": 0.75},
        "lr=2 seed=2": {"auc": 0.75},
    }
    lines = search.ranked(known, [["lr=1 seed=1", "lr=1 seed=2"], ["lr=2 seed=1", "lr=2 seed=2"]])
    assert lines[0].startswith("0.7500 ± 0.0000  lr=2") and lines[1].startswith("0.7000 ± 0.1000  lr=1")
