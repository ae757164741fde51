"""The order of events: raw files -> examples -> what is learnt from train -> encoded rows -> one folder, whole or not at all.

``prepare`` makes a new data set; ``transform`` makes rows to score with what an earlier ``prepare`` saved. Both go through
the same expressions, so the same raw row gives the same features, bit for bit.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from data_loaders.errors import UserError
from data_loaders.prepare import compose, encode, history, number_hash, outputs, split, statistics, steps, vocabulary
from data_loaders.prepare.columns import visible
from data_loaders.prepare.declaration import FIRST_ID, SPLITS, Declaration, Source
from data_loaders.prepare.engine import FILE, FILE_SHIFT, KEY, PART, PLACE, ROW, SPLIT, Engine, Shuffle
from data_loaders.prepare.engines import make_engine
from data_loaders.prepare.prepared import Prepared
from data_loaders.prepare.progress import Progress
from data_loaders.prepare.references import check_columns, label_columns, mentioned, raw_columns
from data_loaders.state_files import write_text
from data_loaders.storage import Stat, Storage, is_uri

_MOST_ROWS = 4_000_000  # of a chunk
# Integers of four bytes that an element of a list takes while its id is found, its row and place included.
_LIST_ELEMENT = 12
_BLOCK = 65_536  # rows of a source that chunks of the output are cut by


@dataclass
class Options:
    """``input``: the folder (or URI) of the raw files. ``output``: the folder to make. ``extend``: the folder of an
    earlier day, whose ids and statistics stay; ``evict``: but for values that so many days in a row have not had.
    ``engine_options``: settings of the engine's own."""

    input: str
    output: Path
    engine: str = "duckdb"
    memory_limit: str = "4GB"
    threads: int = 2
    extend: Path | None = None
    evict: int | None = None
    overwrite: bool = False
    engine_options: dict[str, str] = field(default_factory=dict)


def prepare(declaration: Declaration, options: Options, progress: Progress) -> dict[str, Any]:
    """Makes ``options.output``; returns its report. Raises ``UserError`` for what the user can mend, ``OSError`` and the
    engine's errors for the rest; either way nothing that was there before has changed."""
    _check_apart(options, {"input": options.input, "extend": options.extend})
    previous = Prepared.open(options.extend) if options.extend else None
    if previous:
        previous.check_extends(declaration)
    with outputs.Folder(options.output, options.overwrite) as folder:
        files = _files(declaration, options.input)
        folder.resume(_fingerprint(declaration, options, previous, files))
        with _opened(options, folder, files, previous) as engine:
            report = _Preparation(declaration, engine, folder, previous, progress, options.evict).run(options.input)
        folder.commit()
    return report


def transform(prepared: Prepared, options: Options, progress: Progress, keep: tuple[str, ...] = ()) -> int:
    """Raw rows to score, made into ``options.output`` with saved vocabularies and statistics; a label is not needed. Steps
    that only make labels are left out, and no row is split off. Rows keep the raw order. ``keep``: further columns of the
    examples to copy. Returns the number of rows; raises as ``prepare``."""
    _check_apart(options, {"input": options.input, "prepared": prepared.folder})
    declaration = prepared.declaration
    with outputs.Folder(options.output, options.overwrite) as folder:
        files = _files(declaration, options.input)
        folder.resume(_fingerprint(declaration, options, prepared, files))
        with _opened(options, folder, files, prepared) as engine:
            rows = _score(prepared, engine, folder, options.input, progress, keep)
            report = {"rows": rows, "sources": _inputs(engine)}
            write_text(folder.made / outputs.REPORT, json.dumps(report) + "\n")
        folder.commit()
    return rows


@contextmanager
def _opened(options: Options, folder: outputs.Folder, files: list[Stat], previous: Prepared | None) -> Iterator[Engine]:
    """An engine that reads ``files`` and what ``previous`` saved, and whose errors become ours."""
    engine = make_engine(
        options.engine,
        folder.tables,
        memory_limit=options.memory_limit,
        threads=options.threads,
        options=options.engine_options,
    )
    try:
        engine.confine([file.name for file in files] + ([str(previous.folder / "vocabulary")] if previous else []))
        yield engine
    except Exception as error:
        explained = engine.explain(error)
        if explained is None:
            raise
        raise explained from error
    finally:
        engine.close()


def _score(
    prepared: Prepared, engine: Engine, folder: outputs.Folder, root: str, progress: Progress, keep: tuple[str, ...]
) -> int:
    declaration = prepared.declaration
    optional = label_columns(declaration)
    tables = _tables(declaration, engine, root, progress, optional, keep)
    examples = steps.apply_steps(
        engine, tables[declaration.examples.start], declaration.examples.parsed("examples"), tables, scoring=True
    )
    vocabularies = {table: engine.read_parquet(path) for table, path in prepared.vocabularies().items()}
    encoder = _Encoder(declaration, engine, prepared.statistics, vocabularies, tables)
    schema = declaration.schema
    kept = (*keep, *(column for column in declaration.keep if column not in keep and column in examples.columns))
    examples = engine.store(examples.drop(*({schema.label} & set(examples.columns) - set(kept))), "examples")
    with progress.step("rows to score"):
        histories = encoder.histories(examples)
        output = _arrow_schema(encoder.whole(examples, histories, kept), declaration, kept)
        parts = _chunks(engine, examples, encoder.width(examples, len(output)))
        chunks = (encoder.apart(part, histories, kept) for part in parts)
        return engine.write(chunks, folder.made, output, list(KEY))


class _Preparation:
    """One run of ``prepare``."""

    def __init__(
        self,
        declaration: Declaration,
        engine: Engine,
        folder: outputs.Folder,
        previous: Prepared | None,
        progress: Progress,
        evict: int | None,
    ) -> None:
        self.declaration, self.schema = declaration, declaration.schema
        self.engine, self.folder, self.previous, self.progress = engine, folder, previous, progress
        self.evict = evict

    def run(self, root: str) -> dict[str, Any]:
        tables = _tables(self.declaration, self.engine, root, self.progress)
        with self.progress.step("examples"):
            examples = self._examples(tables)
            rows, positives = self._count(examples)
        train = examples.filter(examples[SPLIT] == "train")
        with self.progress.step("statistics"):
            fitted = self.previous.statistics if self.previous else statistics.fit(self.engine, train, self.schema)
        vocabularies, reports = self._vocabularies(train, fitted)
        encoder = _Encoder(self.declaration, self.engine, fitted, vocabularies, tables)
        with self.progress.step("histories") if encoder.has_histories else nullcontext():
            histories = encoder.histories(examples)
        with self.progress.step("rows"):
            self._write(examples, encoder, histories, sum(rows.values()))
        report = {"rows": rows, "positives": positives, "sources": _inputs(self.engine), "vocabularies": reports}
        report["seconds"] = self.progress.seconds
        self._write_facts(fitted, report, [name for name in SPLITS if rows.get(name)])
        return report

    def _examples(self, tables: dict[str, ibis.Table]) -> ibis.Table:
        """The rows of all splits, with the columns that something needs."""
        view = self.declaration.examples
        parsed = view.parsed("examples")
        examples = steps.apply_steps(self.engine, tables[view.start], parsed, tables)
        check_columns(self.declaration, examples)
        examples = split.assign(examples, self.declaration.split)
        if self.declaration.negative_sampling_rate < 1:
            self._check_label(examples)
            examples = split.sample_negatives(examples, self.schema.label, self.declaration.negative_sampling_rate)
        halves = [column for column in (FILE, PLACE) if column in examples.columns]
        examples = examples.select(*raw_columns(self.declaration, examples.columns), ROW, PART, SPLIT, *halves)
        in_rows = all(step.name in ("where", "select", "drop") for step in parsed)
        # Columns of a row alone are quicker computed again than copied.
        if in_rows and not self.declaration.split.last:
            return examples
        return self.engine.store(examples, "examples")

    def _check_label(self, examples: ibis.Table) -> None:
        label = self.schema.label
        if label not in examples.columns:
            raise UserError(
                f"schema.label is '{label}', which the examples do not have: make it with a step, such as "
                f"{{select: {{{label}: 'rating >= 4'}}}} (they have: {', '.join(visible(examples)[:20])})"
            )

    def _count(self, examples: ibis.Table) -> tuple[dict[str, int], dict[str, int | None]]:
        """Rows and positive rows by split. Raises ``UserError`` for none to train on, and for missing labels."""
        label = self.schema.label
        self._check_label(examples)
        counts = examples.group_by(SPLIT).aggregate(
            rows=examples.count(),
            missing=examples[label].isnull().sum(),
            positives=(examples[label].cast("float64") == 1).sum(),
        )
        found = {row[SPLIT]: row for row in self.engine.fetch(counts).to_pylist()}
        rows = {name: found[name]["rows"] for name in SPLITS if name in found}
        unknown = sorted(set(found) - set(SPLITS))
        if unknown:
            raise UserError(f"split.column holds {unknown[0]!r}: it must hold train, valid or test")
        missing = sum(row["missing"] or 0 for row in found.values())
        if missing and self.schema.on_bad_label == "error":
            raise UserError(
                f"label '{label}' is missing in {missing:,} row(s): leave them out with a step, "
                f"{{where: '{label} IS NOT NULL'}}, or keep them for the trainer to drop: schema.on_bad_label=drop"
            )
        if not rows.get("train"):
            raise UserError(
                f"no row is left to train on (rows by split: {rows or 'none'}): check examples.steps, split and the input"
            )
        return rows, {name: found[name]["positives"] for name in rows}

    def _vocabularies(
        self, train: ibis.Table, fitted: statistics.Statistics
    ) -> tuple[dict[str, ibis.Table], dict[str, Any]]:
        made, reports = {}, {}
        for table in self.schema.tables:
            if not self.schema.has_vocabulary(table):
                continue
            with self.progress.step(f"vocabulary {table}"):
                before = self.previous.vocabulary(self.engine, table) if self.previous else None
                built = vocabulary.build(self.engine, table, self.schema, train, before, fitted, self.evict)
                made[table], reports[table] = built.table, built.report
                self._write_vocabulary(table, built)
        return made, reports

    def _write_vocabulary(self, table: str, built: vocabulary.Built) -> None:
        value = pa.field(
            "value", ibis.Schema({"value": built.table.schema()["value"]}).to_pyarrow().field(0).type, False
        )
        fields = [value, *(pa.field(n, t, False) for n, t in (("id", pa.int32()), ("count", pa.int64())))]
        whole = pa.schema([*fields, pa.field("unseen", pa.int32(), False)])
        self.engine.write_file(built.table, self.folder.made / "vocabulary" / f"{table}.parquet", whole, ["id"])
        if built.rare is not None:
            rare = pa.schema([value, pa.field("count", pa.int64(), False)])
            path = self.folder.made / "vocabulary" / "rare" / f"{table}.parquet"
            self.engine.write_file(built.rare, path, rare, ["value"])

    def _write(self, examples: ibis.Table, encoder: "_Encoder", histories: dict[str, ibis.Table], rows: int) -> None:
        """All splits in one sweep."""
        order = self.declaration.order
        by = {f"__order_{number}": examples[column] for number, column in enumerate(order.by)}
        drawn = {"__order_0": number_hash.of_row(examples, order.seed)} if order.shuffle else {}
        examples = examples.mutate(**by, **drawn)
        keep = (*self.declaration.keep, SPLIT, *by, *drawn)
        whole = encoder.whole(examples, histories, keep)
        output = _arrow_schema(whole, self.declaration, self.declaration.keep)
        width = encoder.width(examples, len(output))
        if by:  # sorted by the engine, however large
            chunks = iter([[whole]])
        else:
            chunks = (encoder.apart(part, histories, keep) for part in _chunks(self.engine, examples, width))
        shuffle = Shuffle("__order_0", number_hash.BOUND, self._parts(rows, width)) if drawn else None
        self.engine.write(chunks, self.folder.made, output, [*by, *KEY], by=SPLIT, shuffle=shuffle)

    def _parts(self, rows: int, width: int) -> int:
        """How many of so many rows, of about ``width`` integers of four bytes, the engine should hold at a time."""
        return -(-rows * 4 * width // self.engine.chunk_bytes) if self.engine.chunk_bytes else 1

    def _write_facts(self, fitted: statistics.Statistics, report: dict[str, Any], splits: list[str]) -> None:
        sizes = {name: FIRST_ID + found["values"] for name, found in report["vocabularies"].items()}
        sizes |= fitted.num_embeddings(self.schema)
        outputs.write_facts(self.folder, self.declaration, fitted.to_dict(), report, self.schema.filled(sizes), splits)


class _Encoder:
    """Examples -> prepared columns, with what was learnt from train."""

    def __init__(
        self,
        declaration: Declaration,
        engine: Engine,
        fitted: statistics.Statistics,
        vocabularies: dict[str, ibis.Table],
        tables: dict[str, ibis.Table],
    ) -> None:
        self.schema, self.engine = declaration.schema, engine
        self.fitted, self.vocabularies, self.tables = fitted, vocabularies, tables

    @property
    def has_histories(self) -> bool:
        return any(feature.make.history for feature in self.schema.features.values())

    def histories(self, examples: ibis.Table) -> dict[str, ibis.Table]:
        """A table (``__row``, ``__part``, ids) for each feature that is a history."""
        groups: dict[str, list[str]] = {}
        for name, feature in self.schema.features.items():
            made = feature.make.history
            if made:
                groups.setdefault(json.dumps([made.events, made.by, made.time, made.where]), []).append(name)
        found = {}
        for members in groups.values():
            spec = self.schema.features[members[0]].make.history
            wanted = {
                name: (self.schema.features[name].make.history.value, self.schema.features[name].max_length)
                for name in members
            }
            built = history.build(self.engine, examples, self.tables[spec.events], spec, wanted, self._encode_events)
            found |= dict.fromkeys(members, built)
        return found

    def _encode_events(self, feature: str, events: ibis.Table, column: str) -> ibis.Table:
        return encode.with_ids(events, column, feature, self.schema, self.vocabularies)

    def whole(self, examples: ibis.Table, histories: dict[str, ibis.Table], keep: tuple[str, ...]) -> ibis.Table:
        return encode.encode(examples, self.schema, self.fitted, self.vocabularies, histories, keep)

    def width(self, examples: ibis.Table, columns: int) -> int:
        """How many integers of four bytes a row takes on its way: a column each, and more for elements of lists."""
        return columns + math.ceil(_LIST_ELEMENT * encode.mean_elements(self.engine, examples, self.schema))

    def apart(self, examples: ibis.Table, histories: dict[str, ibis.Table], keep: tuple[str, ...]) -> list[ibis.Table]:
        """The same, as the engine likes it."""
        at_once = self.engine.joins_at_once
        if at_once is None:
            return [self.whole(examples, histories, keep)]
        learnt = (self.schema, self.fitted, self.vocabularies)
        return encode.encode_apart(examples, *learnt, histories, keep, joins_at_once=at_once)


def _tables(
    declaration: Declaration,
    engine: Engine,
    root: str,
    progress: Progress,
    optional: frozenset[str] = frozenset(),
    keep: tuple[str, ...] = (),
) -> dict[str, ibis.Table]:
    """Sources and views by name. Columns in ``optional`` may be missing from the files: they are then null. ``keep``: those
    that are needed beside what the declaration names."""
    tables: dict[str, ibis.Table] = {}
    for name, source in declaration.sources.items():
        with progress.step(f"source {name}"):
            tables[name] = _read(engine, name, source, root, optional, mentioned(declaration) | set(keep))
        for note in engine.inputs[name].notes(name):
            progress.note(note)
    for name, view in declaration.views.items():
        with progress.step(f"view {name}"):
            parsed = view.parsed(f"views.{name}")
            tables[name] = engine.store(steps.apply_steps(engine, tables[view.start], parsed, tables), f"views/{name}")
    return tables


def _inputs(engine: Engine) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(found) for name, found in engine.inputs.items()}


def _read(
    engine: Engine, name: str, source: Source, root: str, optional: frozenset[str], needed: frozenset[str]
) -> ibis.Table:
    try:
        return engine.read(name, source, root, optional, needed)
    except ValueError as error:
        raise UserError(str(error).replace("data.root", "input")) from error


def _chunks(engine: Engine, examples: ibis.Table, columns: int) -> Iterator[ibis.Table]:
    """The rows in parts that follow each other in raw order, of about ``engine.chunk_bytes`` as int32 columns."""
    if engine.chunk_bytes is None:
        yield examples
        return
    most = min(engine.chunk_bytes // (4 * columns), _MOST_ROWS)
    block = (examples[ROW] // _BLOCK).cast("int64")
    counts = engine.fetch(examples.group_by(__block=block).aggregate(rows=examples.count()).order_by("__block"))
    first, rows = None, 0
    for number, count in zip(counts["__block"].to_pylist(), counts["rows"].to_pylist()):
        if first is not None and rows + count > most:
            yield _between(examples, first, number)
            first, rows = None, 0
        first, rows = (number if first is None else first), rows + count
    if first is not None:
        yield _between(examples, first, None)


def _between(examples: ibis.Table, first: int, end: int | None) -> ibis.Table:
    chosen = examples.filter(examples[ROW] >= first * _BLOCK)
    if end is not None:
        chosen = chosen.filter(chosen[ROW] < end * _BLOCK)
    if PLACE in examples.columns:
        chosen = _skipping(chosen, first, end)
    return chosen


def _skipping(chosen: ibis.Table, first: int, end: int | None) -> ibis.Table:
    """The same rows, filtered so that the engine need not read the others."""
    per_file = (1 << FILE_SHIFT) // _BLOCK
    file = first // per_file
    chosen = chosen.filter(chosen[FILE] >= file)
    if end is None:
        return chosen
    last = (end - 1) // per_file
    chosen = chosen.filter(chosen[FILE] <= last)
    if last == file:
        places = chosen[PLACE]
        chosen = chosen.filter(places >= first % per_file * _BLOCK, places < ((end - 1) % per_file + 1) * _BLOCK)
    return chosen


def _arrow_schema(encoded: ibis.Table, declaration: Declaration, keep: tuple[str, ...] | list[str]) -> pa.Schema:
    """Types of the output. What we make is never null; raw columns that pass through stay as they are."""
    schema, found = declaration.schema, encoded.schema().to_pyarrow()
    fields = []
    for name in (schema.label, schema.weight, *schema.features, *keep):
        if name is None or name not in found.names or any(field.name == name for field in fields):
            continue
        kind = found.field(name).type
        if name in schema.features:
            fields.append(encode.output_field(name, schema, kind))
        elif name == schema.label:
            whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            fields.append(pa.field(name, pa.int8() if whole else pa.float32(), schema.on_bad_label == "drop"))
        else:
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _check_apart(options: Options, sources: Mapping[str, str | Path | None]) -> None:
    """Raises ``UserError`` where the output would lie in what it is made from, or the other way round: to replace it would
    delete that, and a later run would read it."""
    output = options.output.expanduser().resolve()
    for key, source in sources.items():
        if source is None or is_uri(str(source)):
            continue
        place = Path(source).expanduser().resolve()
        if place.is_relative_to(output) or output.is_relative_to(place):
            raise UserError(
                f"output={options.output} and {key}={source} lie in each other: name an output apart from it"
            )


def _files(declaration: Declaration, root: str) -> list[Stat]:
    """The raw files of all sources. Raises ``UserError`` for a source without any."""
    storage = Storage(root)
    files = []
    for source in declaration.sources.values():
        try:
            files += storage.expand(source.files)
        except ValueError as error:
            raise UserError(str(error).replace("data.root", "input")) from None
    return files


def _fingerprint(declaration: Declaration, options: Options, previous: Prepared | None, files: list[Stat]) -> str:
    """Changes whenever stored intermediate tables would."""
    facts = [
        compose.to_plain(declaration),
        [(stat.name, stat.size, stat.mtime_ns) for stat in files],
        options.engine,
        previous.identity if previous else None,
        options.evict,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
