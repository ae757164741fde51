"""The example log: reproducible, with lists, clicks and histories that mean something, and hotels that change."""

import duckdb
import numpy as np
import pytest

from data_loaders import example_log
from data_loaders.errors import UserError
from data_loaders.prepare.__main__ import main

CLICKS = "FROM '{}/*/*.parquet' WHERE action_type = 'clickout item'"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "raw"
    example_log.write(folder, sessions=400)
    return folder


def test_a_folder_a_day_the_same_each_time(log, tmp_path):
    example_log.write(tmp_path / "again", sessions=400)
    assert sorted(path.name for path in log.iterdir()) == ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04"]
    difference = f"FROM (FROM '{log}/*/*.parquet' EXCEPT ALL FROM '{tmp_path}/again/*/*.parquet') SELECT count(*)"
    assert duckdb.sql(difference).fetchone() == (0,)


def test_each_session_searches_and_clicks_on_a_hotel_of_its_list(log):
    counted = duckdb.sql(
        f"SELECT count(*), sum(CAST(list_contains(impressions, reference::BIGINT) AS INT)), count(DISTINCT session_id) "
        f"{CLICKS.format(log)}"
    )
    assert counted.fetchone() == (1600, 1600, 1600)


def test_what_was_looked_at_is_clicked_more_often(log):
    rows = duckdb.sql(f"FROM '{log}/*/*.parquet' ORDER BY session_id, step").fetchall()
    looked, clicks_on_looked = set(), []
    for _, session, _, _, action, reference, *_ in rows:
        if action.startswith("interaction"):
            looked.add((session, reference))
        elif action == "clickout item":
            clicks_on_looked.append((session, reference) in looked)
    assert np.mean(clicks_on_looked) > 0.25  # 2 of 25 were looked at


def test_some_hotels_are_new_each_day(log):
    days = [
        {hotel for (hotel,) in duckdb.sql(f"SELECT DISTINCT unnest(impressions) FROM '{day}/*.parquet'").fetchall()}
        for day in sorted(log.iterdir())
    ]
    assert all(len(later - earlier) > 0 for earlier, later in zip(days, days[1:]))


def test_it_is_written_into_an_empty_folder_alone(log, capsys):
    assert main([f"example={log}"]) == 2
    assert "name another one" in capsys.readouterr().err
    with pytest.raises(UserError):
        example_log.write(log)
