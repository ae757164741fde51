"""Bad input as a user meets it: ``trainer.train`` from command line to exit code, for the rows of the failure matrix
(shared/failure-modes.md) where the program itself matters. All rows: tests/data_loaders/test_bad_data.py.

Every refusal ends in one line on stderr that says what is wrong, where, and how to mend it; without a traceback, and
without a checkpoint.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny, warm
from tests.helpers.bad_data import told, write

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    """How ``trainer.train`` ended: its exit code, what it printed, and its run folder."""

    code: int
    stdout: str
    stderr: str
    run: Path

    def refused(self, code, *parts):
        """One clear line on stderr with these parts, no traceback."""
        assert self.code == code and "Traceback" not in self.stderr, self.stderr
        (line,) = (line for line in self.stderr.splitlines() if line.startswith("error: "))
        told(line, *parts)


def programs(folder, jobs):
    """Runs ``trainer.train`` once for each job, ``{name: {arguments, run, before, after_step}}``, one after the other, in
    children of one process that has done the imports. ``run``: the job whose run folder it goes on in. ``before``: files
    to rename before it starts, ``{from: to}``; ``after_step``: ``[step, {from: to}]``, likewise, once it has trained that
    step."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integration.test_bad_data", str(folder)]
    subprocess.run(
        command, input=json.dumps(jobs), text=True, timeout=warm.PATIENCE, env=environment, check=True, cwd=REPOSITORY
    )
    found = {}
    for name, job in jobs.items():
        code, stdout, stderr = ((folder / f"{name}.{what}").read_text() for what in ("code", "stdout", "stderr"))
        found[name] = Done(int(code), stdout, stderr, folder / job.get("run", name))
    return found


def run_jobs(folder, jobs):
    """What ``programs`` starts."""
    import trainer.training  # noqa: F401  here, so that no child has to

    for name, job in jobs.items():
        for old, new in job.get("before", {}).items():
            os.rename(old, new)
        child = os.fork()
        if child == 0:
            run_job(folder, name, job)  # never returns
        _, status = os.waitpid(child, 0)
        (folder / f"{name}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def run_job(folder, name, job):
    from trainer import training
    from trainer.runtime.progress import Progress

    for number, what in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.{what}", os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(int(warm.PATIENCE))  # a refusal takes seconds; and no child outlives the test
    step, renames = job.get("after_step", (None, {}))

    def advance(self, cursor, original=Progress.advance):
        original(self, cursor)
        if self.step == step:
            for old, new in renames.items():
                os.rename(old, new)

    Progress.advance = advance
    training.main([*job["arguments"], f"run.dir={folder / job.get('run', name)}"])


class Log:
    """The training files of a click log, to be damaged."""

    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.parquet"))

    def rewrite(self, numbers, change):
        for number in numbers:
            pq.write_table(change(pq.read_table(self.paths[number])), self.paths[number], row_group_size=250)

    def set(self, number, column, row, change):
        """One value of one file."""

        def changed(table):
            values = table[column].to_pylist()
            values[row] = change(values[row])
            return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))

        self.rewrite([number], changed)

    def cut(self, size):
        self.paths[1].write_bytes(self.paths[1].read_bytes()[:size])

    def make_folder(self):
        self.paths[1].unlink()
        self.paths[1].mkdir()


def misspelt(table):
    return table.rename_columns([name.replace("price", "prize") for name in table.column_names])


def as_text(table):
    return table.set_column(table.column_names.index("item_id"), "item_id", table["item_id"].cast("string"))


def doubled(table):
    return pa.Table.from_arrays([*table.columns, table["price"]], names=[*table.column_names, "price"])


# By name: what is done to the files, what the program must say, and its further arguments.
MISTAKES = {
    "d01 all": (
        lambda log: log.rewrite([0, 1, 2], misspelt),
        ["part-00000.parquet'", "lacks 1 column(s)", "'price' (near: prize", "schema.features"],
    ),
    "d02 a later file": (
        lambda log: log.rewrite([2], lambda table: table.drop_columns(["price"])),
        ["part-00002.parquet'", "lacks 1 column(s)", "'price'", "schema.features"],
    ),
    "d03 type": (
        lambda log: log.rewrite([1], as_text),
        ["part-00001.parquet", "'item_id' has types of different kinds", "string", "write it with one type"],
    ),
    "d07 label": (
        lambda log: log.set(1, "label", 507, lambda _: None),
        ["part-00001.parquet', row group 2, row 7: label 'label' is null", "0 or 1", "schema.on_bad_label"],
    ),
    "d12 empty": (lambda log: log.cut(0), ["part-00001.parquet' has 0 bytes", "write it again"]),
    "d13 cut": (lambda log: log.cut(-1000), ["part-00001.parquet' cannot be read as Parquet", "write it again"]),
    "d16 rows": (
        lambda log: log.rewrite([0, 1, 2], lambda table: table.slice(0, 0)),
        ["no rows in 'train'", "3 files", "check"],
    ),
    "d16 glob": (
        lambda log: None,
        ["matches no file", "nothing-*.parquet", "check"],
        "data.train=[train/nothing-*.parquet]",
    ),
    "d22 twice": (
        lambda log: log.rewrite([1], doubled),
        ["part-00001.parquet' has more than one column named 'price'", "rename"],
    ),
    "d26 lengths": (
        lambda log: log.set(2, "clicked_items", 253, lambda found: [*(found or []), 1]),
        ["part-00002.parquet', row group 1, row 3", "'clicked_items'", "'clicked_categories'", "lists of equal length"],
    ),
    "d31 folder": (
        lambda log: log.make_folder(),
        ["part-00001.parquet", "no *.parquet file"],
        "data.train=[train/part-00000.parquet,train/part-00001.parquet]",
    ),
}


ODD_DATA = """
name: odd
root: ???
train: [train]
valid: [valid]
stream: {shards: 4, shuffle_rows: 100}
schema:
  label: "größe (y/n)"
  embedding_dim: 8
  tables:
    "straßen namen": {num_embeddings: 500}
    "日本": {num_embeddings: 50, pooling: sum}
  features:
    "user id": {kind: sparse, table: "straßen namen", ids: hash}
    "geo.city": {kind: sparse, table: "straßen namen", ids: hash}
    "日本.id": {kind: sparse, column: "ω ω", table: "日本"}
    "käufe (alle)": {kind: sequence, column: "a.b", table: "日本", max_length: 3, target: "日本.id"}
    "preis €": {kind: dense}
  crosses:
    "user × city.": {columns: ["user id", "geo.city"], num_buckets: 300}
"""


def write_odd(folder):
    """The log that ``ODD_DATA`` describes, and its configuration; returns the arguments of a job."""
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "odd.yaml").write_text(ODD_DATA, "utf-8")
    for split, rows in (("train", 200), ("valid", 60)):
        columns = {
            "größe (y/n)": pa.array([i % 2 for i in range(rows)], "int8"),
            "user id": pa.array([f"nutzer {i % 20}" for i in range(rows)]),
            "geo": pa.array([{"city": f"stadt {i % 9}"} if i % 7 else None for i in range(rows)]),
            "ω ω": pa.array([i % 50 for i in range(rows)]),
            "a.b": pa.array([[j % 50 for j in range(i % 5)] for i in range(rows)]),
            "preis €": pa.array([float(i % 10) for i in range(rows)]),
        }
        write(folder / "ünï code" / split / "ein teil.parquet", pa.table(columns), row_group_size=50)
    root = folder / "ünï code"
    return ["--config-dir", str(folder / "conf"), "data=odd", f"data.root='{root}'", "batch_size=20", *tiny.FP32]


@pytest.fixture(scope="module")
def ended(click_log, tmp_path_factory):
    """All programs of this file: one of each startup refusal, and those that train."""
    folder = tmp_path_factory.mktemp("programs")
    jobs = {}
    for name, (damage, _, *more) in MISTAKES.items():
        root = folder / "data" / name.replace(" ", "-")
        shutil.copytree(click_log, root)
        damage(Log(root / "train"))
        jobs[name] = {"arguments": tiny.arguments(root, *more)}
    small = write_files(folder / "small", 60)
    victim, away = str(folder / "small" / "train" / "part-00055.parquet"), str(folder / "away")
    other = str(folder / "other.parquet")
    pq.write_table(pq.read_table(victim).slice(0, 40), other)
    swap, back = {victim: away, other: victim}, {victim: other, away: victim}
    jobs["whole"] = {"arguments": small}
    jobs["d19"] = {"arguments": small, "after_step": [5, {victim: away}]}
    jobs["d19_restored"] = {"arguments": small, "run": "d19", "before": {away: victim}}
    jobs["d20"] = {"arguments": small, "after_step": [5, swap]}
    jobs["d20_resumed"] = {"arguments": small, "run": "d20"}
    jobs["d20_restored"] = {"arguments": small, "run": "d20", "before": back}
    odd = [*write_odd(folder / "odd"), "epochs=2", "model=din"]
    jobs["d24_part"] = {"arguments": [*odd, "steps=7"]}
    jobs["d24_rest"] = {"arguments": odd, "run": "d24_part"}
    jobs["d24_whole"] = {"arguments": odd}
    jobs["d24_deepfm"] = {"arguments": [*odd, "model=deepfm"]}
    return programs(folder, jobs)


def write_files(root, files):
    """A log of many small files, so that most are read long after the first steps; returns the arguments of a job that
    saves now and then."""
    tiny.write_log(root)
    table = pq.read_table(root / "train")
    shutil.rmtree(root / "train")
    for number in range(files):
        write(root / "train" / f"part-{number:05}.parquet", table.slice(50 * number, 50), row_group_size=25)
    stream = ["data.stream.shuffle=false", "data.stream.shuffle_rows=240", "data.stream.prefetch_batches=1"]
    return tiny.arguments(root, *stream, "checkpoint.every_steps=4")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_one_line_and_leaves_no_checkpoint(ended, name):
    ended[name].refused(2, *MISTAKES[name][1])
    assert not list(ended[name].run.glob("checkpoints/*"))


def metrics(done):
    return json.loads((done.run / "metrics.json").read_text())


def assert_same_result(found, expected):
    for split in ("valid", "test"):
        for name in ("auc", "logloss", "calibration", "rows"):
            assert found.get(split, {}).get(name) == expected.get(split, {}).get(name)


def test_d19_a_run_whose_file_goes_away_can_be_retried_and_loses_nothing(ended):
    failed, restored = ended["d19"], ended["d19_restored"]
    failed.refused(1, "part-00055.parquet'", "again")  # with 1 the launcher may try again
    assert restored.code == 0, restored.stderr
    assert "Resumed from" in restored.stderr
    assert_same_result(metrics(restored), metrics(ended["whole"]))


def test_d20_a_run_whose_file_is_replaced_ends_and_goes_on_only_with_the_old_one(ended):
    failed, resumed, restored = ended["d20"], ended["d20_resumed"], ended["d20_restored"]
    for done in (failed, resumed):
        done.refused(2, "part-00055.parquet'", "changed", "restore")
    assert restored.code == 0, restored.stderr
    assert_same_result(metrics(restored), metrics(ended["whole"]))


def test_d24_odd_names_train_save_resume_and_are_reported(ended):
    part, rest, whole, deepfm = (ended[f"d24_{what}"] for what in ("part", "rest", "whole", "deepfm"))
    for done in (part, rest, whole, deepfm):
        assert done.code == 0, done.stderr
    assert "Resumed from" in rest.stderr and "step 7" in rest.stderr
    assert_same_result(metrics(rest), metrics(whole))
    for done in (whole, deepfm):
        found = metrics(done)
        assert found["train"]["step"] == 20 and found["train"]["data"]["geo.city.null"] == 2 * len(range(0, 200, 7))
        tables = {row["table"] for row in json.loads((done.run / "plan.json").read_text())}
        assert {"straßen namen", "日本"} <= tables


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), json.load(sys.stdin))
