"""Whether the keys that a JSON source declares are in its files at all.

A line may leave a key out: the value is missing then. A key that no line of a file has is another thing: it was renamed, or
declared under a wrong name, and all its values would be null.
"""

import json
from collections.abc import Sequence

from data_loaders.prepare import text_files
from data_loaders.prepare.text_files import TextFile
from data_loaders.schema import one_of

_SHOWN_LINES = 1000  # whose keys are named as neighbours


def check(name: str, file: TextFile, columns: Sequence[str]) -> None:
    """``columns``: those that are null in every row. Raises ``UserError`` for one that no line has as a key, with the nearest
    that are there."""
    missing, seen, objects = set(columns), {}, 0
    for line in text_files.lines(name, file):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a bad row, which was left out
        if not isinstance(found, dict):
            continue
        missing -= found.keys()
        objects += 1
        if not missing:
            return
        if objects <= _SHOWN_LINES:
            seen |= dict.fromkeys(found)
    for column in columns:
        if objects and column in missing:
            one_of(column, seen, f"sources.{name}.columns: '{file.name}' lacks a column (no line has it as a key)")
