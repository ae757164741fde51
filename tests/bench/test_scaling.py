"""Cells of docs/scaling.md, computed by hand from the page's formulas."""

import json
from pathlib import Path

import pytest

from bench.scaling import exchanged, exchanged_of_table, job, log_of, markdown, row_bytes
from trainer.sharding.hardware import GPUS, of_ranks

NVLINK, NETWORK = 450e9, 50e9  # bytes a second, one way, of an H100
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "scaling.json"
PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_the_tables_have_the_bytes_they_are_named_by():
    tables = log_of(0.1, history=False)["schema"]["tables"]
    assert len(tables) == 40
    assert sum(4 * 128 * table["num_embeddings"] for table in tables.values()) == pytest.approx(0.1e12, rel=1e-3)
    assert row_bytes("deepfm") == 4 * (13 + 40 + 1) and row_bytes("din") == 4 * (13 + 40 + 51 + 1)


def test_a_machine_of_eight_exchanges_what_its_busiest_rank_owns():
    """5 of the 40 tables and 5 of their 40 tables of linear weights (4 columns) lie on each of 8 ranks: 65,536 rows of
    5 x 512 + 5 x 16 bytes over NVLink."""
    cluster = of_ranks(GPUS["H100"], 8)
    planned = job("deepfm", 0.1, cluster, 65_536)
    estimate = planned.estimate(cluster, thorough=False)
    size = 65_536 * (5 * 512 + 5 * 16)
    assert exchanged(planned, estimate) == {"inside": size, "between": 0}
    assert estimate.step["exchange_forward"] == pytest.approx(1e3 * size / NVLINK, rel=1e-6)
    assert estimate.step_ms == 5.0  # the launch of a step, which hides the rest
    # 96 % of the rows in 8 tables of 12 %, one a rank; fp32 weights and a float of row-wise AdaGrad a row.
    rows = 0.12 * 0.1e12 / 512
    assert estimate.memory[0]["tables"] + estimate.memory[0]["optimizer_state"] > rows * (512 + 4)


def test_between_machines_each_sharding_type_costs_what_the_page_says():
    """16 GPUs in two machines: c0 by rows over all, c1 by rows of one machine. A table's vectors are 65,536 x 512 bytes."""
    cluster = of_ranks(GPUS["H100"], 16)
    asked = ["+sharding.by_table.c0=row_wise", "+sharding.by_table.c1=table_row_wise"]
    planned = job("deepfm", 0.1, cluster, 65_536, *asked)
    estimate = planned.estimate(cluster, thorough=False)
    vectors = 65_536 * 512
    by_hand = {
        kind: exchanged_of_table(kind, True, 1, 1.0, 128, estimate)
        for kind in ("row_wise", "table_row_wise", "table_wise")
    }
    assert by_hand == {
        "row_wise": (0, vectors),
        "table_row_wise": (vectors, vectors / 8),
        "table_wise": (0, vectors),
    }
    assert exchanged_of_table("row_wise", False, 2, 51.0, 128, estimate) == (
        0,
        51 * vectors / 16,
    )  # DIN's list and candidate
    found = exchanged(planned, estimate)
    seconds = found["inside"] / NVLINK + found["between"] / NETWORK
    assert 1e3 * seconds == pytest.approx(estimate.step["exchange_forward"], rel=1e-6)


def test_the_page_shows_the_table_of_the_results():
    cells = list(json.loads(RESULTS.read_text())["cells"].values())
    assert markdown(cells) in PAGE
