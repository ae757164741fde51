"""Logs and the files of earlier runs."""

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.manifest import Manifest
from trainer.checkpoint import write_commit_files
from trainer.run.training_files import DATA
from trainer.runtime.progress import Progress

BATCH = 4


def scan(root, *paths):
    return Manifest.scan(list(paths or ["."]), str(root), ["x"])


def commit(run, inputs, **position):
    """A checkpoint's own record, as ``Checkpoints`` writes it, without tensors."""
    progress = Progress(**position)
    path = run / "checkpoints" / f"step-{progress.step}"
    path.mkdir(parents=True)
    facts = {"progress": progress.state_dict(), "identity": {"batch_size": BATCH}, "world_size": 2}
    write_commit_files(path, [], facts, {DATA: inputs.dumps()})
    return path


def write(root, name, first, rows=10):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": pa.array(range(first, first + rows), "int64")}), path, row_group_size=4)
