"""The columns of a csv file, from its first line."""

import csv
import gzip

from data_loaders.prepare.declaration import Source


def columns(name: str, file: str, source: Source, optional: frozenset[str] = frozenset()) -> list[str]:
    """The names of a file's columns, in its order: from its header, or as declared where it has none. A file without a
    header may lack the ``optional`` columns, all or none. Raises ``ValueError`` for an empty file and for one with another
    number of columns than declared."""
    line = _first_line(file, source)
    if not line:
        raise ValueError(f"sources.{name}: '{file}' is empty (its first line is)")
    fields = _split(line, source)
    if source.header:
        return fields
    declared = list(source.columns)
    without = [column for column in declared if column not in optional]
    for names in (declared, without):
        if len(fields) == len(names):
            return names
    raise ValueError(
        f"sources.{name}: '{file}' has {len(fields)} column(s) in its first line, and {len(declared)} are declared: check "
        f"sources.{name}.columns and .separator ({source.separator!r})"
    )


def _first_line(file: str, source: Source) -> str:
    opener = gzip.open if file.endswith(".gz") else open
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    with opener(file, "rt", encoding=encoding, newline="") as lines:
        return lines.readline().rstrip("\r\n")


def _split(line: str, source: Source) -> list[str]:
    if len(source.separator) > 1 or not source.quote:
        return line.split(source.separator)
    return next(csv.reader([line], delimiter=source.separator, quotechar=source.quote))
