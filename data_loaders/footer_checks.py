"""What a Parquet footer must fulfil, tried in a process of its own, which the Parquet library may end (``footers``).

The process reads requests from stdin, in integers of eight bytes: how many footers, of each its length and the size of its
file, then the footers. It answers each footer with a line of JSON: ``row_groups``, the number of its ``schema``, as ``new``
the schema itself where the number is new, and whether it says that rows are ``shuffled``; or ``error``. It ends with its
stdin, or after a while without requests.
"""

import base64
import json
import os
import resource
import select
import struct
import time
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError

ROW_ORDER = b"clicktrainer.row_order"  # a key of the file's metadata
IDLE_SECONDS = 20.0
_CPU_SECONDS = 60  # for one footer
_MAGIC_BYTES = 4  # at the file's beginning
_PAGE_VALUES = (1 << 31) - 1  # a page counts its values in 32 bits
_PAGE_BYTES = 8  # of the smallest header of a page


class DamagedFooter(UserError):
    """Says what is wrong, in words that follow "the footer of …: "."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected, and worth no core file
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    schemas: dict[str, int] = {}
    while select.select([requests], [], [], IDLE_SECONDS)[0] and (count := requests.read(8)):
        sizes = [_integers(requests.read(16)) for _ in range(*_integers(count))]
        footers = [
            requests.read(length) for length, _ in sizes
        ]  # all first: else both sides could wait for the other to read
        for footer, (_, size) in zip(footers, sizes):
            _limit_time()
            answers.write(json.dumps(answer(footer, size, schemas)).encode() + b"\n")
            answers.flush()


def _limit_time() -> None:
    """Of one footer: a library that never ends with it counts as crashed (SIGXCPU)."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time()) + _CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _integers(values: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(values) // 8}q", values)


def answer(footer: bytes, size: int, schemas: dict[str, int]) -> dict[str, Any]:
    """``schemas``: those sent already, with their numbers; thousands of files share a few."""
    try:
        row_groups, schema, shuffled = facts(footer, size)
    except DamagedFooter as error:
        return {"error": f"its footer is damaged: {error}"}
    except Exception:  # noqa: BLE001 - whatever the library says of bytes that it does not understand
        return {"error": "its footer is damaged"}
    text = base64.b64encode(schema.serialize()).decode()
    new = {} if text in schemas else {"new": text}
    number = schemas.setdefault(text, len(schemas))
    return {"row_groups": row_groups, "schema": number, "shuffled": shuffled, **new}


def facts(footer: bytes, size: int) -> tuple[list[int], pa.Schema, bool]:
    """Rows of each row group, the Arrow schema without metadata, and whether rows are marked as shuffled, of a file of
    ``size`` bytes. Raises ``DamagedFooter`` for what contradicts itself or the file, and whatever the library raises."""
    metadata = pq.read_metadata(pa.BufferReader(footer))
    # As the reader will open it.
    schema = pq.ParquetFile(pa.BufferReader(footer), metadata=metadata).schema_arrow
    _check_nulls(schema, (metadata.metadata or {}).get(b"ARROW:schema"))
    leaves = [_leaf(metadata.schema.column(index)) for index in range(len(metadata.schema))]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if any(count < 0 for count in rows) or sum(rows) != metadata.num_rows:
        raise DamagedFooter(f"it counts {metadata.num_rows} rows, its row groups {sum(rows)}")
    ranges = []
    for number, group in enumerate(groups):
        if group.num_columns != len(leaves):
            raise DamagedFooter(f"row group {number} has {group.num_columns} columns, the schema {len(leaves)}")
        for index, leaf in enumerate(leaves):
            chunk = group.column(index)
            fault = _fault(chunk, leaf, rows[number])
            if fault:
                raise DamagedFooter(f"row group {number}, column {leaf[0]!r} {fault}")
            if rows[number]:
                begin = _begin(chunk)
                ranges.append((begin, begin + chunk.total_compressed_size, number, leaf[0]))
    _check_ranges(ranges, size - len(footer))
    shuffled = (metadata.metadata or {}).get(ROW_ORDER) == shuffled_mark(metadata.num_rows)
    return rows, schema.remove_metadata(), shuffled


def shuffled_mark(rows: int) -> bytes:
    """What a file of so many rows holds under ``ROW_ORDER`` where ``prepare`` has shuffled them. With their number, since
    tools that leave out rows copy metadata."""
    return f"shuffled, {rows} rows".encode()


def _leaf(column: pq.ColumnSchema) -> tuple[str, str, bool]:
    """Path, physical type, and whether a row may have several values."""
    return column.path, column.physical_type, column.max_repetition_level > 0


def _fault(chunk: pq.ColumnChunkMetaData, leaf: tuple[str, str, bool], rows: int) -> str | None:
    """What is wrong with a column's part of a row group, in words that follow its name."""
    path, kind, repeated = leaf
    values, length = chunk.num_values, chunk.total_compressed_size
    if chunk.path_in_schema != path or chunk.physical_type != kind:
        return f"is {chunk.physical_type} {chunk.path_in_schema!r} there, {kind} in the schema"
    if chunk.file_path:
        return "lies in another file"
    if values < rows or values > rows and not repeated:
        return f"has {values} values for {rows} rows"
    if length < 0 or chunk.total_uncompressed_size < 0 or values > length // _PAGE_BYTES * _PAGE_VALUES:
        return f"has {length} bytes for {values} values"
    return None


def _begin(chunk: pq.ColumnChunkMetaData) -> int:
    """The first page, a dictionary's where there is one; some writers give 0 for none."""
    dictionary, data = chunk.dictionary_page_offset, chunk.data_page_offset
    return dictionary if chunk.has_dictionary_page and dictionary and 0 < dictionary < data else data


def _check_ranges(ranges: list[tuple[int, int, int, str]], end_of_data: int) -> None:
    """They (first byte, end, row group, column) lie within the file and do not overlap: a wrong offset would read another
    column's values."""
    before = _MAGIC_BYTES
    for begin, end, number, path in sorted(ranges):
        if begin < before or end > end_of_data:
            raise DamagedFooter(
                f"row group {number}, column {path!r} takes bytes {begin} to {end}: they would lie in another's, or beyond "
                f"the data's {end_of_data}"
            )
        before = end


def _check_nulls(schema: pa.Schema, written: bytes | None) -> None:
    """Arrow's own schema, where a writer left one, says of the same columns the same: which may be null decides how their
    bytes are read."""
    for name, nullable in _nullable(written) if written else ():
        index = schema.get_field_index(name)
        if index >= 0 and schema.field(index).nullable != nullable:
            raise DamagedFooter(f"column {name!r} may be null by one of its two schemas only")


@lru_cache(maxsize=64)
def _nullable(written: bytes) -> tuple[tuple[str, bool], ...]:
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written)))
    return tuple((field.name, field.nullable) for field in schema)
