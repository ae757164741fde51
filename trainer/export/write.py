"""The files of an export from a checkpoint: tables a slab of rows at a time, so that memory is that of one slab."""

import math
from pathlib import Path

import torch
from torch import Tensor

from data_loaders.errors import UserError
from trainer.checkpoint import Reader
from trainer.checkpoint.tensor_file import SLAB_BYTES, map_new, write_tensors
from trainer.modules.embeddings import is_wide_table
from trainer.serve.artifact import DENSE, TableEntry
from trainer.serve.tables import KEY, stored

TABLE, WEIGHT, DENSE_KIND, AVERAGE = "tables/", "/weight", "dense/", "average/"
MODEL = "model."  # of the task's state_dict: the model's own part


def write_dense(folder: Path, reader: Reader) -> None:
    """Parameters and buffers of the dense layers by the model's own names; averages of parameters stand in their place."""
    write_tensors(folder / DENSE, dense_tensors(reader))


def dense_tensors(reader: Reader) -> dict[str, Tensor]:
    found = {}
    for name in reader.names:
        parameter = name.removeprefix(DENSE_KIND)
        if name.startswith(DENSE_KIND) and parameter.startswith(MODEL):
            average = f"{AVERAGE}{parameter}"
            found[parameter.removeprefix(MODEL)] = reader.read(average if average in reader.names else name)
    return found


def table_names(reader: Reader) -> list[str]:
    return [
        name.removeprefix(TABLE).removesuffix(WEIGHT)
        for name in reader.names
        if name.startswith(TABLE) and name.endswith(WEIGHT)
    ]


def write_tables(folder: Path, reader: Reader, form: str) -> list[TableEntry]:
    """Every table in ``form``. Raises ``UserError`` for a value that it cannot hold."""
    entries = []
    for number, name in enumerate(table_names(reader)):
        rows, dim = reader.shape(f"{TABLE}{name}{WEIGHT}")
        entry = TableEntry(name, f"table-{number}.safetensors", rows, dim, form)
        write_table(folder / entry.file, reader, entry)
        entries.append(entry)
    return entries


def write_table(path: Path, reader: Reader, entry: TableEntry) -> None:
    name, wide = f"{TABLE}{entry.name}{WEIGHT}", is_wide_table(entry.name)
    like = stored(torch.zeros(1, entry.dim), entry.form, wide=wide)
    target = map_new(path, KEY, (entry.rows, like.shape[1]), like.dtype)
    step = max(1, SLAB_BYTES // (4 * entry.dim))
    for start in range(0, entry.rows, step):
        count = min(step, entry.rows - start)
        slab = stored(reader.read(name, (start, 0), (count, entry.dim)), entry.form, wide=wide)
        if slab.is_floating_point() and not math.isfinite(slab.sum(dtype=torch.float64).item()):
            raise UserError(f"table '{entry.name}' has values that {entry.form} cannot hold: export.tables=fp32")
        target[start : start + count] = slab
