"""The row log: which rows each step trained, written by the run itself, so that anyone can check the accounting.

``ledger/<first step>-<last step>-rank-<rank>.parquet`` in the run folder, one row for each row trained:

    step     int64       global optimizer step, counted from 1
    epoch    int32
    file     dictionary  path relative to data.root
    row      int64       number of the row within its file
    dropped  bool        left out by a policy of the schema: it kept its place in the batch, with weight 0

``pyarrow.parquet.read_table(run / "ledger")`` reads all of it. Only trained batches are recorded, and all of them before a
checkpoint commits; what lies beyond the checkpoint that a run resumes from is removed, as those steps come again.
So at each commit the row log is that checkpoint's own history, whatever the number of ranks was on the way.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_loaders.batch import Cursor
from data_loaders.manifest import Manifest
from data_loaders.state_files import publish

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("dropped", pa.bool_()),
    ]
)
NAME = re.compile(r"(\d{12})-(\d{12})-(rank-\d{5})\.parquet")
FLUSH_ROWS = 1 << 20  # of one rank, about 10 MB


class RowLog:
    """Records the batches that one rank has trained. Batches without ``cursor.origin`` are not recorded: a loader that
    records none costs nothing here, and makes no folder."""

    def __init__(self, folder: Path, manifest: Manifest, rank: int, flush_rows: int = FLUSH_ROWS) -> None:
        self.folder, self._manifest, self._rank, self._flush_rows = folder, manifest, rank, flush_rows
        self._ends = np.cumsum([file.num_rows for file in manifest.files])  # of the files, in rows of the manifest
        self._pending: list[tuple[int, Cursor]] = []
        self._pending_rows = 0

    def record(self, cursor: Cursor, step: int) -> None:
        """Adds the batch that ``step`` has trained. Raises ``OSError`` when a full buffer cannot be written."""
        if cursor.origin is None:
            return
        assert len(cursor.origin) == cursor.local_rows
        self._pending.append((step, cursor))
        self._pending_rows += cursor.local_rows
        if self._pending_rows >= self._flush_rows:
            self.flush()

    def flush(self) -> None:
        """Writes what is recorded: on disk, whole, when this returns. Raises ``OSError``, and then keeps it."""
        if self._pending_rows:
            self.folder.mkdir(exist_ok=True)
            name = f"{self._pending[0][0]:012d}-{self._pending[-1][0]:012d}-rank-{self._rank:05d}.parquet"
            _write(self._table(), self.folder / name)
        self._pending, self._pending_rows = [], 0

    def _table(self) -> pa.Table:
        counts = [cursor.local_rows for _, cursor in self._pending]
        origin = np.concatenate([cursor.origin for _, cursor in self._pending])
        files = np.searchsorted(self._ends, origin, side="right")  # "right" passes over files without rows
        starts = np.concatenate([[0], self._ends[:-1]])
        used, codes = np.unique(files, return_inverse=True)
        names = pa.array([self._manifest.relative(self._manifest.files[file]) for file in used], pa.string())
        dropped = [np.zeros(c.local_rows, bool) if c.dropped is None else c.dropped for _, c in self._pending]
        columns = [
            pa.array(np.repeat([step for step, _ in self._pending], counts), pa.int64()),
            pa.array(np.repeat([cursor.epoch for _, cursor in self._pending], counts), pa.int32()),
            pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names),
            pa.array(origin - starts[files], pa.int64()),
            pa.array(np.concatenate(dropped)),
        ]
        return pa.table(columns, schema=SCHEMA)


def cut(folder: Path, step: int) -> int:
    """Removes what the row log in ``folder`` holds beyond ``step``, and what a crash left unfinished; returns the last
    step that it holds then (0: none). Files of other names are left alone. Only one rank may call it."""
    last_kept = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        part = path.name.startswith(".") and path.name.endswith(".part")
        found = NAME.fullmatch(path.name[1:-5] if part else path.name)
        if found is None:
            continue
        first, last = int(found[1]), int(found[2])
        if not part and first <= step < last:
            table = pq.read_table(path)
            name = f"{first:012d}-{step:012d}-{found[3]}.parquet"
            _write(table.filter(pc.less_equal(table["step"], step)), folder / name)
        if part or last > step:
            path.unlink()
        if not part and first <= step:
            last_kept = max(last_kept, min(last, step))
    return last_kept


def _write(table: pa.Table, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part)
    publish(part, path)
