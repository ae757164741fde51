"""Turns, medians, ratios, and results files that say where they come from."""

import json

import pytest

from bench import harness


def test_sides_take_turns_after_a_pass_that_does_not_count():
    order = []
    sides = {name: lambda number, name=name: order.append((name, number)) or number for name in "ab"}
    assert harness.take_turns(sides, 2) == {"a": [1, 2], "b": [1, 2]}
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_result_has_its_command_machine_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.sys, "argv", ["bench", "--folder", "/here/x", "data.root=/here", "a=b c"])
    path = tmp_path / "results" / "some.json"
    harness.record(path, {"value": 1}, "one", "numpy")
    harness.record(path, {"value": 2}, "two")
    found = json.loads(path.read_text())
    assert [found[name]["value"] for name in ("one", "two")] == [1, 2]
    assert found["one"]["command"].endswith("--folder DIR data.root=DIR 'a=b c'")
    assert found["one"]["machine"]["numpy"] and found["one"]["machine"]["cores"] and len(found["two"]["load"]) == 3


def test_an_entry_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        assert harness.once(tmp_path / "some.json", "runs", "seed=1", lambda: made.append(1) or {"auc": 0.7}) == {
            "auc": 0.7
        }
    assert made == [1]


def test_missing_data_are_asked_for_in_one_line():
    with pytest.raises(SystemExit) as ended:
        harness.data_root(None, "ml1m.parquet")
    assert ended.value.code == "error: --data-root is missing: give the folder that holds ml1m.parquet"


def test_ratios_are_taken_turn_by_turn():
    fast = harness.Rates.of([harness.Pass(100, 1, 0.5), harness.Pass(100, 4, 0.5), harness.Pass(100, 2, 0.5)])
    slow = harness.Rates.of([harness.Pass(100, 2, 1), harness.Pass(100, 4, 1), harness.Pass(100, 8, 1)])
    ratio = fast.over(slow, target=3)
    assert fast.rows_per_second == 50
    assert ratio.turns == pytest.approx([2, 1, 4], rel=0.1)
    assert ratio.value == pytest.approx(2, rel=0.1) and ratio.in_cpu_time == pytest.approx(2)


def test_data_that_were_not_finished_are_made_again(tmp_path):
    def fail(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        harness.made(tmp_path / "data", fail)
    folder = harness.made(tmp_path / "data", lambda path: path.mkdir())
    assert list(folder.iterdir()) == []
