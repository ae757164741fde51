"""That the bench's logs are what they say, and that its measures of a command see it."""

import json
import os
import sys

import pytest

pytest.importorskip("duckdb")

import duckdb

from bench import prepare, prepare_logs, prepare_peers


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    prepare_logs.write_criteo(path, 5000)
    return path


def rows_of(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_a_larger_log_begins_with_the_smaller_one(criteo, tmp_path):
    prepare_logs.write_criteo(tmp_path / "larger.txt", 6000)
    assert rows_of(tmp_path / "larger.txt")[:5000] == rows_of(criteo)


def test_criteo_rows_are_a_label_thirteen_numbers_and_hexadecimal_strings(criteo):
    rows = rows_of(criteo)
    assert len(rows) == 5000 and {len(row) for row in rows} == {40}
    assert {row[0] for row in rows} == {"0", "1"}
    assert all(field == "" or int(field) >= -1 for row in rows for field in row[1:14])
    assert all(field == "" or (len(field) == 8 and int(field, 16) >= 0) for row in rows for field in row[14:])


def test_criteo_columns_miss_their_shares_and_click_as_often_as_said(criteo):
    columns = dict(zip(prepare_logs.CRITEO_COLUMNS, zip(*rows_of(criteo))))
    assert columns["label"].count("1") / 5000 == pytest.approx(0.256, abs=0.02)
    assert columns["I12"].count("") / 5000 == pytest.approx(0.77, abs=0.02)
    assert columns["C22"].count("") / 5000 == pytest.approx(0.76, abs=0.02)
    assert columns["I2"].count("") == columns["C1"].count("") == 0
    assert len(set(columns["C9"])) == 2 and len(set(columns["C3"])) > 2000


def test_events_are_uneven_and_tied(tmp_path):
    prepare_logs.write_events(tmp_path / "events.csv", 20_000, users=1000, items=500)
    users, items, categories, most, first, last = duckdb.sql(
        "SELECT count(DISTINCT user), count(DISTINCT item), count(DISTINCT category), max(n), min(time), max(time) "
        f"FROM (SELECT *, count(*) OVER (PARTITION BY user) AS n FROM '{tmp_path}/events.csv')"
    ).fetchone()
    assert users > 900 and items > 450 and categories <= items
    assert most == pytest.approx(2000, rel=0.1)  # 1000 ** -(1 / 3) of 20,000
    assert first >= prepare_logs.START and last < prepare_logs.START + 30 * 24 * 3600 and first % 60 == 20
    facts = prepare.events_facts(prepare.Log(tmp_path / "events.csv", 20_000))
    assert facts["events of the most active user"] == most
    assert facts["share of events of a time that the user has had"] > 0


def test_naive_histories_leave_out_the_same_time_and_the_future():
    events = [[30, 7], [10, 5], [20, 6], [10, 4], [20, 8]]
    assert list(prepare.naive_histories(events)) == [[5, 4, 6, 8], [], [5, 4], [], [5, 4]]


def test_naive_histories_keep_the_most_recent():
    events = [[time, time] for time in range(60)]
    assert list(prepare.naive_histories(events))[59] == list(range(9, 59))


def test_a_scan_reads_all_rows(criteo, tmp_path):
    side = prepare.peer("scan-criteo", sys.executable, criteo, 5000)
    run = side.run(tmp_path / "scan")
    assert run.rows == side.answer["rows"] == 5000
    assert 0 < run.work_seconds < run.seconds


def test_rows_that_do_not_come_out_are_caught(criteo, tmp_path):
    side = prepare.peer("scan-criteo", sys.executable, criteo, 5001)
    with pytest.raises(RuntimeError, match="5,000 rows came out of 5,001"):
        side.run(tmp_path / "scan")


def test_pandas_numbers_values_by_frequency(criteo, tmp_path):
    pandas = pytest.importorskip("pandas")
    found = prepare_peers.with_pandas(criteo, tmp_path)
    raw = pandas.Series([row[14] for row in rows_of(criteo)])
    counts = raw.value_counts()
    assert found["values"]["C1"] == (counts >= 10).sum()
    ids = pandas.read_parquet(tmp_path / "train.parquet")
    frequent, rare = counts.index[0], counts.index[-1]
    assert set(ids["C1"][raw == frequent]) == {2} and set(ids["C1"][raw == rare]) == {1}
    assert set(ids["C22"][pandas.Series([row[35] for row in rows_of(criteo)]) == ""]) == {0}


def test_memory_and_disk_of_a_command_and_its_children_are_seen(tmp_path):
    child = "import time; block = bytearray(150_000_000); time.sleep(1.5)"
    code = (
        f"import subprocess, sys; open('{tmp_path}/file', 'wb').write(bytes(30_000_000)); "
        f"block = bytearray(100_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    found = prepare.Watched([sys.executable, "-c", code], tmp_path).run(tmp_path / "log")
    assert 250 < found["peak_anonymous_mb"] <= found["peak_mb"] < 400
    assert 150 < found["largest_process_mb"] < 250
    assert found["peak_disk_mb"] == pytest.approx(30, rel=0.1)
    assert found["seconds"] > 1.5


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3: no such recipe"):
        prepare.Watched([sys.executable, "-c", "print('no such recipe'); exit(3)"], tmp_path).run(tmp_path / "log")


def test_bytes_of_spark_tasks_are_added_up(tmp_path):
    def task(shuffled):
        metrics = {
            "Input Metrics": {"Bytes Read": 5},
            "Shuffle Write Metrics": {"Shuffle Bytes Written": shuffled},
            "Output Metrics": {"Bytes Written": 0},
            "Disk Bytes Spilled": 1,
        }
        return {"Event": "SparkListenerTaskEnd", "Task Metrics": metrics}

    events = [{"Event": "SparkListenerLogStart"}, task(10), task(20)]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, events)))
    assert prepare.task_totals(tmp_path / "log") == {"read": 10, "shuffled": 30, "spilled to disk": 2, "written": 0}


def test_the_terabyte_is_what_was_measured_times_its_rows():
    measured = {
        "rates": {"scan": {"rows_per_second": 1_000_000}, "ours": {"rows_per_second": 500_000}},
        "rows": {"ours": {"written, MB": 2000, "peak disk, MB": 1000}},
        "facts": {
            "rows": 10_000_000,
            "text_bytes": 2_440_000_000,
            "output_mb": 300,
            "vocabulary_mb": 100,
            "values": {"C1": 4_000_000},
        },
    }
    found = prepare.one_machine(measured)
    assert found["text, TB"] == 1.07
    assert found["hours of a bare scan, 2 cores"] == 1.2 and found["hours of ours, 2 cores"] == 2.4
    assert found["most on disk at a time, TB"] == 0.44 and found["rows of the output, TB"] == 0.09


def test_size_of_a_folder_counts_files_below_it(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(os.urandom(100_000))
    assert prepare.size_of(tmp_path) == pytest.approx(100_000, rel=0.1)


def test_what_we_prepare_is_measured_and_answers_for_its_rows(tmp_path):
    pytest.importorskip("ibis")
    log = prepare.events_log(tmp_path, 3000)
    options = prepare.argparse.Namespace(memory_limit="1GB")
    side = prepare.ours(log, options, f"recipe={prepare.EVENTS_RECIPE}")
    run = side.run(tmp_path / "ours")
    assert run.rows == side.answer["rows"] == 3000 and run.peak_mb > 100
    assert side.answer["values"]["item"] > 100
    assert prepare.check_histories(tmp_path / "ours" / "output").endswith(" users")
