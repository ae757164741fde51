"""The library: what a notebook needs without a command line. ``from trainer import compose, train, Run, Scorer``.

::

    config = compose(["model=din", "data=ml1m", "data.root=/data/ml1m"])
    run = train(config)
    run.metrics["test"]["auc"], run.history
    run.predict(frame)

No call ends the process, or leaves in it a signal handler, a thread or a process group of ours; what it sets of PyTorch is set
back. A mistake raises ``UserError`` with the line that the command would print.

Shapes: N rows, V rows of a table, D its width.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.schema import one_of
from trainer import training
from trainer.checkpoint import Reader
from trainer.config import arguments
from trainer.config.compose import Composed, from_yaml
from trainer.config.compose import compose as compose_words
from trainer.embeddings import table_of
from trainer.evaluate import metrics_of
from trainer.export.write import TABLE, WEIGHT
from trainer.predict import predictions
from trainer.report.drawing import check_page, draw
from trainer.report.run_record import PLACE, RunRecord
from trainer.run.load import find_checkpoint, open_run
from trainer.runtime import run_folder
from trainer.runtime.hosted import hosted
from trainer.serve.scorer import Scorer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "Scorer", "compose", "train"]
ROWS_FILE = "rows.parquet"
RANK = Path(__file__).absolute().parents[1] / "launch" / "rank.py"  # what starts our modules, wherever it is started
MISTAKE, ERROR = 2, "error: "  # how the command line ends and begins the line of a mistake
Rows: TypeAlias = "pd.DataFrame | pa.Table | str | os.PathLike[str]"


def compose(overrides: Sequence[str] = (), *, config_dir: Sequence[str | os.PathLike[str]] = ()) -> Composed:
    """The checked configuration of a job.

    ``overrides``: ``key=value`` as on the command line, such as ``"model=din"``, ``"optim.dense.lr=3e-4"``; ``config_dir``:
    folders with configuration files of your own. Returns ``config.config``, the values as objects, and ``config.text``, the same
    as YAML. To change a value, compose again. Raises ``UserError`` for an unknown key, a wrong type, or a name that is not there.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides is the text {overrides!r}: give a list of texts key=value")
    for word in overrides:
        if not isinstance(word, str) or word.startswith("-"):
            raise UserError(f"{word!r} is not an override: give texts key=value (folders by config_dir=[…])")
    folders = [config_dir] if isinstance(config_dir, (str, os.PathLike)) else config_dir
    return compose_words([*(word for folder in folders for word in ("--config-dir", str(folder))), *overrides])


def train(config: Composed, *, nproc_per_node: int = 1) -> "Run":
    """Trains a job of ``compose``, evaluates it, and returns its run. Where ``run.dir`` names a folder with checkpoints, it
    resumes there.

    One rank trains in this process; more (``nproc_per_node``: one a GPU, or on a CPU as many as cores to compute on) are started
    as the command line starts them, and are ended with it. An interrupt (Ctrl-C, the notebook's stop button) ends training
    after the step, saves it, and raises ``KeyboardInterrupt``; a second one does not wait. Raises ``UserError``.
    """
    if not isinstance(config, Composed):
        raise UserError(f"config is a {type(config).__name__}: give what compose([…]) returns")
    if config.config.warm_start.dry_run:
        raise UserError("warm_start.dry_run trains nothing: clicktrainer train reports what a warm start takes over")
    if nproc_per_node != 1:
        return Run(_launched(config, nproc_per_node))
    with hosted(config.config.device):
        folder = training.run(config, hosted=True)
    return Run(_ended(folder))


class Run:
    """A run folder, of a run that has ended or not: what it measured, and its model to score with. It is read anew by each
    call. ``path``: the folder.

    ``checkpoint`` names one, such as ``"step-100"`` or ``"best"``; by default it is what the run itself ends with.
    ``overrides`` change the recorded configuration, as ``clicktrainer evaluate`` does. ``rows`` are a DataFrame or an Arrow table
    with the columns of the schema, or Parquet files: a path, folder, glob or address. They have the columns' types of the
    training data: ids are hashed by them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ``UserError`` for what is no run folder."""
        self.path = Path(path)
        self._record.config_text  # noqa: B018 - read, to be sure of it

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Run":
        """The run in a folder. Raises ``UserError`` for what is none."""
        return cls(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self._record.name}, {self._record.status.get('state', 'not begun')}"

    @property
    def _record(self) -> RunRecord:
        return RunRecord(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The recorded configuration, as nested dicts."""
        return self._record.config

    @property
    def metrics(self) -> dict[str, Any]:
        """By split (``train``, ``valid``, ``test``) the final metrics, or the newest of a run under way: ``auc``, ``logloss``,
        … (docs/metrics.md)."""
        return self._record.metrics

    @property
    def history(self) -> "pd.DataFrame":
        """A row for each line that was logged: ``split``, ``step``, ``rows_trained``, ``epoch``, and metrics, NaN where a line
        does not have one; split by split, steps ascending."""
        parts = []
        for split, lines in self._record.histories.items():
            columns = {name: lines.column(name) for name in (*PLACE, *lines.names)}
            steps = columns["step"].astype(np.int64)
            parts.append(pa.table({"split": [split] * len(steps), **columns, "step": steps}))
        return (pa.concat_tables(parts) if parts else pa.table({"split": pa.array([], pa.string())})).to_pandas()

    def evaluate(
        self,
        rows: "Rows | None" = None,
        *,
        split: str = "test",
        checkpoint: str | None = None,
        overrides: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Metrics of ``rows``, which have a label, or else of ``data.<split>`` of the run (``valid``, ``test``, ``train``).
        Raises ``UserError``."""
        one_of(split, arguments.SPLITS, "split")
        with self._opened(checkpoint, overrides) as trained:
            data = trained.config.data
            if rows is None:
                return metrics_of(trained, data, split)
            schema, groups = data.schema, trained.config.evaluation.columns
            labels = [name for name in (schema.label, schema.weight, *groups) if name]
            with _on_disk(rows, [*schema.columns(trained.layout), *labels]) as path:
                return metrics_of(trained, replace(data, root=".", **{split: [path]}), split)

    def predict(
        self, rows: Rows, *, checkpoint: str | None = None, overrides: Sequence[str] = ()
    ) -> NDArray[np.float32]:
        """Click probabilities float32 [N] in the order of ``rows``, which need no label; NaN where a policy of the schema leaves
        a row out. Raises ``UserError``."""
        with self._opened(checkpoint, overrides) as trained:
            columns = trained.config.data.schema.columns(trained.layout)
            with _on_disk(rows, columns) as path:
                parts = [*predictions(trained, Manifest.scan([path], ".", columns))]
        filled = [part.to_numpy(zero_copy_only=False) for part in parts]
        return np.concatenate([np.empty(0, np.float32), *filled], dtype=np.float32)

    def embeddings(self, table: str, *, checkpoint: str | None = None) -> NDArray[np.float32]:
        """The rows of a table of the schema, or of the one that a feature of this name reads, float32 [V, D]. An id of a feature
        with ``ids: identity`` is the number of its row. Raises ``UserError`` for a table that the model does not have."""
        with hosted():
            composed = from_yaml(self.path / run_folder.CONFIG)
            restored = composed.config.checkpoint.restore_best
            reader = Reader(find_checkpoint(self.path, checkpoint, prefer_best=restored))
            name = table_of(table, reader, composed.config.data.schema, "table")
            return reader.read(f"{TABLE}{name}{WEIGHT}").float().numpy()

    def report(self, output: str | os.PathLike[str] | None = None) -> Path:
        """Draws the report, by default ``report.html`` of the run folder; returns the page's path. Raises ``UserError``."""
        with hosted():
            page = Path(output) if output is not None else self.path / run_folder.REPORT
            if output is not None:
                check_page("output", page)
            draw(self.path, page)
        return page

    @contextlib.contextmanager
    def _opened(self, checkpoint: str | None, overrides: Sequence[str]) -> Iterator[Any]:
        config = from_yaml(self.path / run_folder.CONFIG, overrides).config
        with hosted(config.device), open_run(self.path, checkpoint, overrides) as trained:
            yield trained


@contextlib.contextmanager
def _on_disk(rows: Rows, columns: Collection[str]) -> Iterator[str]:
    """The rows as Parquet: what is in memory, in a file for as long as it is needed; of that only ``columns``."""
    if isinstance(rows, (str, os.PathLike)):
        yield os.fspath(rows)
        return
    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        path = os.path.join(folder, ROWS_FILE)
        pq.write_table(_table(rows, columns), path)
        yield path


def _table(rows: Any, columns: Collection[str]) -> pa.Table:
    """Raises ``UserError`` for what is no table, or has a column that Arrow cannot hold."""
    if isinstance(rows, pa.Table):
        return rows.select([name for name in rows.column_names if name in columns])
    if not hasattr(rows, "columns"):
        raise UserError(
            f"rows is a {type(rows).__name__}: give a DataFrame, an Arrow table, or the path of Parquet files"
        )
    try:
        return pa.Table.from_pandas(rows[[name for name in rows.columns if name in columns]], preserve_index=False)
    except pa.ArrowException as error:
        raise UserError(f"rows: a column holds values of several types ({error}): give it one type") from None


def _launched(config: Composed, nproc_per_node: int) -> Path:
    """The run folder of a job that the command line has trained."""
    folder = run_folder.choose(config.config.run, ("", 0))
    words = [*config.words, f"run.dir={arguments.quoted(folder)}"]
    command = [sys.executable, str(RANK), "trainer", "train", "--nproc-per-node", str(nproc_per_node), *words]
    # A session of its own: an interrupt reaches it once, from here.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            lines = _echoed(process)
        except BaseException:
            process.send_signal(signal.SIGINT)
            _echoed(process)
            raise
    if process.returncode:
        mistake = next((line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)), "")
        kind = UserError if process.returncode == MISTAKE and mistake else RuntimeError
        raise kind(mistake or f"training ended with exit code {process.returncode}: its messages are above")
    return _ended(folder)


def _echoed(process: "subprocess.Popen[str]") -> list[str]:
    """Shows what a process prints until it ends."""
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    process.wait()
    return lines


def _ended(folder: Path) -> Path:
    if run_folder.read_status(folder).get("state") == "preempted":
        raise KeyboardInterrupt(
            f"training was interrupted, and saved in {folder}: the same job with run.dir={folder} resumes"
        )
    return folder
