"""Exact accounting, through the program: wherever a run stops, by itself or by SIGKILL, and on however many ranks it goes on,
it trains the rows of an uninterrupted run, step by step; on the same ranks, bit by bit the same model.

3000 rows in batches of 240 are 13 steps an epoch, the last one of 120 rows.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers import tiny
from trainer.checkpoint import Reader

EPOCH, LAST = 13, 26
COMMON = (
    "epochs=2",
    "log_every_steps=1",
    "debug.ledger=true",
    "data.valid=[]",
    "data.test=[]",
    "data.probability=null",
)
# State of every kind: row-wise and pointwise AdaGrad in backward, Adam's moments, dropout's random numbers.
STATEFUL = ("model=deepfm", "model.hidden_units=[16]", "model.dropout=0.2")
# Without AdaGrad's first step, the sign of a gradient, which magnifies what rounding makes of a gradient near 0.
LINEAR = (
    "model=deepfm",
    "deterministic=true",
    "model.hidden_units=[16]",
    "optim.wide={name: sgd, lr: 0.5}",
    "optim.tables={name: sgd, lr: 0.5}",
    "optim.dense={name: sgd, lr: 0.05}",
)
OTHER_THREADS = ("data.stream.threads=3", "data.stream.prefetch_batches=1")
# A chain of launches into one run folder: (ranks, step it ends after, further overrides).
CHAINS = {
    "1 rank": (STATEFUL, [(1, LAST)]),
    "2 ranks": (STATEFUL, [(2, LAST)]),
    "2, in mid-epoch, at its edge": (STATEFUL, [(2, 7), (2, EPOCH, *OTHER_THREADS), (2, LAST)]),
    "1, before and after the partial batch": (STATEFUL, [(1, 12, *OTHER_THREADS), (1, 14), (1, LAST)]),
    "linear, 1 rank": (LINEAR, [(1, LAST)]),
    "1 to 2 to 1": (LINEAR, [(1, 5), (2, EPOCH), (1, LAST, *OTHER_THREADS)]),
    "4 to 2 to 3": (LINEAR, [(4, 12), (2, 14, *OTHER_THREADS), (3, LAST)]),
}


def run_chain(log, run, overrides, launches):
    for ranks, stop, *more in launches:
        done = tiny.train(ranks, log, run, *COMMON, *overrides, *([] if stop == LAST else [f"steps={stop}"]), *more)
        assert done.returncode == 0, (launches, stop, done.stderr)
        assert newest(run).name == f"step-{stop}"
    return run


@pytest.fixture(scope="module")
def chains(click_log, tmp_path_factory):
    """The run folder of each chain. Two run at a time."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(run_chain, click_log, folder / str(number), *chain)
            for number, (name, chain) in enumerate(CHAINS.items())
        }
        killed = pool.submit(run_killed, click_log, folder / "killed")
        runs = {name: future.result() for name, future in started.items()}
    return {**runs, "killed": killed.result()}


def run_killed(log, run):
    """Killed after step 10, with checkpoints after steps 4 and 8, and then to the end."""
    # Waits for its checkpoints, so that it is known which one is there when it dies.
    overrides = (*COMMON, *STATEFUL, "checkpoint.every_steps=4", "checkpoint.asynchronous=false")
    done = tiny.torchrun(2, "tests.helpers.killed", 10, *tiny.arguments(log, f"run.dir={run}", *overrides))
    assert done.returncode == -9, done.stderr
    assert newest(run).name == "step-8"
    assert max(pq.read_table(run / "ledger")["step"].to_pylist()) > 8
    done = tiny.train(2, log, run, *overrides)
    assert done.returncode == 0, done.stderr
    assert "step 8" in done.stderr
    return run


def newest(run):
    return max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def ledger(run):
    """How often each (step, epoch, file, row) was trained."""
    table = pq.read_table(run / "ledger")
    assert not any(table["dropped"].to_pylist())
    return Counter(zip(*(table[name].to_pylist() for name in ("step", "epoch", "file", "row"))))


def losses(run):
    """The loss of each step; where a step was trained again after a crash, that of the last time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["logloss"] for line in lines if line["split"] == "train"}
    assert sorted(found) == list(range(1, LAST + 1))
    return [found[step] for step in sorted(found)]


def tensors(run):
    """Tables, dense layers and the state of all optimizers, as the last checkpoint has them."""
    reader = Reader(newest(run))
    return {name: reader.read(name) for name in reader.names}


def test_the_reference_trains_every_row_once_an_epoch(chains, click_log):
    entries = ledger(chains["1 rank"])
    assert set(entries.values()) == {1}
    files = {f"train/{path.name}": pq.read_metadata(path).num_rows for path in (click_log / "train").glob("*.parquet")}
    rows = {(name, row) for name, count in files.items() for row in range(count)}
    assert len(rows) == tiny.ROWS["train"]
    for epoch in (0, 1):
        found = [(file, row) for _, when, file, row in entries if when == epoch]
        assert len(found) == len(rows) and set(found) == rows
    sizes = Counter((step, epoch) for step, epoch, _, _ in entries)
    expected = {(step, (step - 1) // EPOCH): 120 if step % EPOCH == 0 else 240 for step in range(1, LAST + 1)}
    assert sizes == expected
    first = {epoch: {e[2:] for e in entries if e[0] == epoch * EPOCH + 1} for epoch in (0, 1)}
    assert first[0] != first[1]  # an order of its own


@pytest.mark.parametrize("name", [name for name in [*CHAINS, "killed"] if name != "1 rank"])
def test_the_ledger_is_that_of_an_uninterrupted_run(chains, name):
    assert ledger(chains[name]) == ledger(chains["1 rank"])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("2, in mid-epoch, at its edge", "2 ranks"),
        ("killed", "2 ranks"),
        ("1, before and after the partial batch", "1 rank"),
    ],
)
def test_on_the_same_ranks_losses_and_all_state_are_the_same_bit_by_bit(chains, name, reference):
    assert losses(chains[name]) == losses(chains[reference])
    found, expected = tensors(chains[name]), tensors(chains[reference])
    assert found.keys() == expected.keys()
    assert {key.split("/")[0] for key in found} == {"tables", "clock", "dense", "optimizer", "metrics"}
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["1 to 2 to 1", "4 to 2 to 3"])
def test_on_other_ranks_losses_and_tables_differ_by_rounding_only(chains, name):
    found, expected = losses(chains[name]), losses(chains["linear, 1 rank"])
    assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-7  # seen: 4e-9
    # Seen: 1.5e-8.
    tables, reference = tensors(chains[name]), tensors(chains["linear, 1 rank"])
    for key, value in reference.items():
        if key.startswith("metrics/"):
            continue  # a row near the edge of a bin may fall into the next one
        torch.testing.assert_close(tables[key], value, rtol=0, atol=1e-6, msg=key)
