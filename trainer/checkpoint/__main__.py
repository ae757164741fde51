"""Looks into checkpoints: `clicktrainer checkpoint inspect|verify|diff PATH …`.

inspect: what is in one; verify: whether all under PATH are whole; diff: how two differ. PATH is a step-N folder, or a run's
folder or its checkpoints folder: then the newest there is meant. It may lie in an object store: 's3://bucket/…'. Needs
neither GPU nor other ranks, executes nothing.

Exit codes: 0; 1 where a checkpoint is damaged or two differ; 2 for a mistake of the user's.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_loaders.messages import note, one_line
from trainer.checkpoint.format import verify
from trainer.checkpoint.inspection import checkpoint_at, checkpoints_under, compare, describe
from trainer.checkpoint.paths import AnyPath
from trainer.checkpoint.place import parse
from trainer.config import arguments
from trainer.runtime.checked_json import printable

WIDTH = 160  # of tables that go to a file
MOST = 40  # lines of a list of tensors
LONGEST_LINE = 2000  # characters of an error
LONGEST_CELL = 300
TABLE_COLUMNS = ("table", "rows", "dim", "dtype", "optimizer states", "parts", "sharding", "MB")
RIGHT = {"rows", "dim", "MB", "tensors", "values", "parts", "rows that differ", "largest difference"}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    try:
        paths = _paths(options)
    except (OSError, ValueError) as error:
        _complain(error)
        return 2
    try:
        return {"inspect": _inspect, "verify": _verify, "diff": _diff}[options.action](options, paths)
    except (OSError, ValueError) as error:
        _complain(error)
        return 1


def _complain(error: Exception) -> None:
    note(f"error: {one_line(printable(one_line(error)), LONGEST_LINE)}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.checkpoint()
    options = parser.parse_intermixed_args(argv)
    if len(options.paths) != (2 if options.action == "diff" else 1):
        parser.error(f"{options.action} takes {'two paths' if options.action == 'diff' else 'one path'}")
    return options


def _paths(options: argparse.Namespace) -> list[AnyPath]:
    paths = [parse(path) for path in options.paths]
    if options.action == "verify":
        return checkpoints_under(paths[0])
    return [checkpoint_at(path) for path in paths]


def _inspect(options: argparse.Namespace, paths: Sequence[AnyPath]) -> int:
    found = describe(paths[0])
    if options.json:
        print(json.dumps(found))
        return 0
    console = _console()
    console.print(_table("Checkpoint", ("", ""), [("path", found["path"]), *_headlines(found["facts"])]))
    console.print(_table("Tables", TABLE_COLUMNS, _rows(found)))
    kinds = ((kind, f"{it['tensors']:,}", f"{it['values']:,}", _mb(it["bytes"])) for kind, it in found["kinds"].items())
    console.print(_table("Other tensors", ("kind", "tensors", "values", "MB"), kinds))
    console.print(_table("Files", ("file", "MB"), ((name, _mb(size)) for name, size in found["files"].items())))
    return 0


def _headlines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line a fact; those of the job's configuration (``identity``) and the plan only with --json."""
    progress = facts["progress"] if isinstance(facts.get("progress"), dict) else {}
    lines = {
        "step": progress.get("step"),
        "epoch": progress.get("epoch"),
        "rows trained": progress.get("rows"),
        "data position": f"batch {progress.get('epoch_step')} of epoch {progress.get('epoch')}",
        "world size": facts.get("world_size"),
    }
    shown = {"progress", "world_size", "identity", "plan"}
    lines |= {name: value for name, value in facts.items() if name not in shown}
    return [(name.replace("_", " "), _line(value)) for name, value in lines.items()]


def _rows(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for row in sorted(found["tables"], key=lambda row: -row["bytes"]):
        states = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in row["states"].items())
        optimizer = f"{row['optimizer']}: {states or 'none'}" if "optimizer" in row else states
        size = [f"{row[key]:,}" if key in row else "–" for key in ("rows", "dim")]
        yield (
            *(row["table"], *size, row.get("dtype", "–"), optimizer, str(row["parts"])),
            *(str(row.get("sharding", "–")), _mb(row["bytes"])),
        )


def _verify(options: argparse.Namespace, paths: Sequence[AnyPath]) -> int:
    problems = 0
    for path in paths:
        problem = verify(path)
        problems += problem is not None
        print(printable(f"{path}: {problem or 'whole'}"), flush=True)
    return 1 if problems else 0


def _diff(options: argparse.Namespace, paths: Sequence[AnyPath]) -> int:
    first, second = paths
    found = compare(first, second)
    console = _console()
    titles = str(first), str(second)
    facts = [(key, _line(old), _line(new)) for key, (old, new) in found["facts"].items()]
    facts += [(name, "", "another text") for name in found["texts"]]
    only = [(name, "only here", "") for name in found["only_first"]]
    only += [(name, "", "only here") for name in found["only_second"]]
    values = ((name, f"{it['rows']:,} of {it['all']:,}", f"{it['largest']:g}") for name, it in found["values"].items())
    forms = [*only, *((name, *form) for name, form in found["forms"].items())]
    for title, columns, rows in (
        ("Facts that differ", ("fact", *titles), facts),
        ("Tensors of another form", ("tensor", *titles), forms),
        ("Tensors of other values", ("tensor", "rows that differ", "largest difference"), [*values]),
    ):
        if rows:
            console.print(_table(title, columns, rows))
    same = not (facts or forms or found["values"])
    console.print(Text(f"{len(found['equal'])} tensors are equal" + (", and all facts" if same else "")))
    return 0 if same else 1


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Cells are text alone: what stands in a checkpoint cannot colour or move about the terminal."""
    table = Table(title=Text(printable(title)), title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(Text(printable(column)), justify="right" if column in RIGHT else "left", overflow="fold")
    lines = list(rows)
    for line in lines[:MOST]:
        table.add_row(*(Text(printable(_cut(cell))) for cell in line))
    if len(lines) > MOST:
        table.add_row(f"… and {len(lines) - MOST} more")
    return table


def _line(value: Any) -> str:
    """Of a fact: nested ones as ``key value, key value``."""
    if isinstance(value, dict):
        shown = ", ".join(f"{key} {_line(item)}" for key, item in itertools.islice(value.items(), MOST))
        return shown + (", …" if len(value) > MOST else "") or "–"
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value)
    return _cut(f"{value:,}" if isinstance(value, int) else str(value), 200)


def _cut(text: str, longest: int = LONGEST_CELL) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"


if __name__ == "__main__":
    sys.exit(main())
