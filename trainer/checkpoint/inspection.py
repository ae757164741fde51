"""What is in a checkpoint, and how two of them differ: plain data, of which ``python -m trainer.checkpoint`` makes tables."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from data_loaders.errors import UserError
from trainer.checkpoint.digest import DIGEST
from trainer.checkpoint.folder import committed
from trainer.checkpoint.format import Reader
from trainer.checkpoint.manifest import FACTS, INDEX, MANIFEST, read_facts, read_manifest
from trainer.checkpoint.paths import AnyPath, StorePath
from trainer.checkpoint.place import of_run, place_of
from trainer.checkpoint.tensor_file import SLAB_BYTES


def checkpoint_at(path: AnyPath) -> AnyPath:
    """A ``step-N`` folder as it is; the newest one of a run's folder or of its ``checkpoints``. Raises ``UserError``."""
    found = [path] if place_of(path).is_checkpoint(path) else committed(of_run(path)) or committed(path)
    if not found:
        raise UserError(f"{path} {_lack(path)}: give a step-N folder, the folder of a run, or its checkpoints folder")
    return found[0]


def checkpoints_under(path: AnyPath) -> list[AnyPath]:
    """Every checkpoint at or below a folder, in the order of the folders, the newest of each first. Raises
    ``UserError`` where there is none."""
    place = place_of(path)
    if place.is_checkpoint(path):
        return [path]
    found = [checkpoint for folder in place.folders_below(path) for checkpoint in committed(folder)]
    found = found or committed(of_run(path))
    if not found:
        raise UserError(f"{path} {_lack(path)}: give a folder with step-N folders in or below it")
    return found


def describe(path: AnyPath) -> dict[str, Any]:
    """Facts, tables, sums of all other tensors by kind, and files of a checkpoint; no tensor is read. Raises
    ``UserError`` for a damaged one."""
    facts, reader = read_facts(path), Reader(path)
    manifest = read_manifest(path)
    kinds = sorted({name.partition("/")[0] for name in reader.names} - {"tables"})
    return {
        "path": str(path),
        "facts": facts,
        "tables": _tables(reader, facts),
        "kinds": {kind: _sums(reader, kind) for kind in kinds},
        "files": {
            MANIFEST: len(place_of(path).read(path / MANIFEST)),
            **{name: it["bytes"] for name, it in manifest.items()},
        },
    }


def compare(first: AnyPath, second: AnyPath) -> dict[str, Any]:
    """How two checkpoints differ; empty lists where they do not. Tensors are read a slab of rows at a time. Raises
    ``UserError`` for a damaged one."""
    readers = Reader(first), Reader(second)
    names = [set(reader.names) for reader in readers]
    common = sorted(names[0] & names[1])
    forms = {name: tuple(_form(reader, name) for reader in readers) for name in common}
    values = {name: _difference(readers, name) for name in common if forms[name][0] == forms[name][1]}
    return {
        "facts": _differing(_flat(read_facts(first)), _flat(read_facts(second))),
        "texts": sorted(_differing(_texts(first), _texts(second))),
        "only_first": sorted(names[0] - names[1]),
        "only_second": sorted(names[1] - names[0]),
        "forms": {name: form for name, form in forms.items() if form[0] != form[1]},
        "values": {name: found for name, found in values.items() if found["rows"]},
        "equal": [name for name, found in values.items() if not found["rows"]],
    }


def _tables(reader: Reader, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    plan = facts.get("plan")
    rows = plan if isinstance(plan, list) else []
    planned = {row["table"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("table"), str)}
    found: dict[str, dict[str, Any]] = {}
    for name in reader.names:
        kind, _, rest = name.partition("/")
        table, _, state = rest.rpartition("/")
        if kind != "tables":
            continue
        row = found.setdefault(table, {"table": table, "states": {}, "bytes": 0})
        row["bytes"] += _bytes(reader, name)
        row["parts"] = max(row.get("parts", 0), len(reader.entries[name].parts))
        if state == "weight" and len(reader.shape(name)) == 2:
            row |= dict(zip(("rows", "dim"), reader.shape(name)), dtype=_dtype(reader, name))
        elif state != "weight":
            row["states"][state] = list(reader.shape(name))
        row |= {key: planned[table][key] for key in ("optimizer", "sharding") if key in planned.get(table, {})}
    return list(found.values())


def _sums(reader: Reader, kind: str) -> dict[str, int]:
    names = [name for name in reader.names if name.partition("/")[0] == kind]
    return {
        "tensors": len(names),
        "values": sum(math.prod(reader.shape(name)) for name in names),
        "bytes": sum(_bytes(reader, name) for name in names),
    }


def _difference(readers: tuple[Reader, Reader], name: str) -> dict[str, Any]:
    """``rows`` that differ of ``all``, and the largest absolute difference of a value."""
    rows, largest, count = 0, 0.0, 0
    for left, right in zip(*(_row_slabs(reader, name) for reader in readers)):
        differs = left != right
        count += len(left)
        if differs.any():
            rows += int(differs.flatten(1).any(dim=1).sum())
            largest = max(largest, (left.double() - right.double()).abs().max().item())
    return {"rows": rows, "all": count, "largest": largest}


def _row_slabs(reader: Reader, name: str) -> Iterator[Tensor]:
    """The rows of a tensor, [rows, …]; a single value is a row of one."""
    shape = reader.shape(name)
    if not shape:
        yield reader.read(name).reshape(1, 1)
        return
    row_bytes = max(1, math.prod(shape[1:]) * reader.dtype(name).itemsize)
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        yield reader.read(name, (start, *(0 for _ in shape[1:])), (rows, *shape[1:])).reshape(rows, -1)


def _form(reader: Reader, name: str) -> str:
    widths = reader.widths(name)
    cut = "" if widths is None else f" widths {list(widths)}"
    return f"{list(reader.shape(name))} {_dtype(reader, name)}{cut}"


def _bytes(reader: Reader, name: str) -> int:
    return math.prod(reader.shape(name)) * reader.dtype(name).itemsize


def _dtype(reader: Reader, name: str) -> str:
    return str(reader.dtype(name)).removeprefix("torch.")


def _texts(path: AnyPath) -> dict[str, str]:
    """Digests of what is neither tensors nor told elsewhere."""
    manifest = read_manifest(path)
    return {
        name: it[DIGEST]
        for name, it in manifest.items()
        if name not in (FACTS, INDEX) and not name.endswith(".safetensors")
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted({*first, *second})
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def _lack(path: AnyPath) -> str:
    if isinstance(path, StorePath):
        return "holds no checkpoint"
    if not path.exists():
        return "does not exist"
    return "holds no checkpoint" if path.is_dir() else "is no folder"
