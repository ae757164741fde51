"""How raw logs become training data: sources, examples, split, and the schema extended with how each column is made.

The way of a row
----------------
``sources`` are raw files. ``views`` are tables made of sources and earlier views, ``examples`` the rows to train on; both
start ``from`` a table and take ``steps`` in order. ``split`` says which example is train, valid or test; everything that
is learnt from data (vocabularies, statistics) is learnt from train alone. ``schema`` is the training schema, where a
feature's ``make`` says how its column arises and a table's ``vocabulary`` how raw values become rows.

Ids of a vocabulary: 0 is the missing value, 1 a value outside the vocabulary, 2 … the values, most frequent first (ties:
ascending value). Buckets of numbers: 0 is the missing value, 1 … the buckets, ascending.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any

from data_loaders.errors import UserError
from data_loaders.prepare import sql
from data_loaders.schema import Cross, Feature, Schema, Table, one_of

FORMATS = ("parquet", "csv", "json")
ENCODINGS = ("utf-8", "latin-1", "cp1252", "utf-16", "utf-32", "gb18030")
BAD_ROWS = ("error", "skip")
SPLITS = ("train", "valid", "test")
ENGINES = ("duckdb", "spark")
TYPES = (
    *("int8", "int16", "int32", "int64", "float32", "float64", "string", "boolean", "date", "timestamp"),
    *("list<int64>", "list<float64>", "list<string>"),
)
MISSING_ID, UNKNOWN_ID, FIRST_ID = 0, 1, 2
TEMPORARY = re.compile(r"^__")
_FILE_NAME = re.compile(r"\w[\w.+-]{0,99}")


def is_file_name(text: str) -> bool:
    """Whether a name can be a file's without further ado: letters, digits and ``_ . + -``, and no path."""
    return _FILE_NAME.fullmatch(text) is not None and len(text.encode()) <= 200


def _check_name(name: str, where: str) -> None:
    if not is_file_name(name):
        raise UserError(
            f"{where}: the name {name!r} becomes a file's: make it of letters, digits, '_', '.', '+' and '-', at most 100, "
            "the first a letter, digit or '_'"
        )


@dataclass
class Source:
    """Raw files that make one table."""

    files: list[str] = field(default_factory=list)
    """Paths, folders or globs under ``input``, read in this order, those of a glob by name."""
    format: str = "parquet"
    """Format; csv has any separator, json one object a line. Text may be compressed (gzip, zstd, bzip2, xz, lz4; found
    by content)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Name -> type (``int32``, ``string``, ``list<int64>`` …), in the order of the file for csv without a header.
    Parquet may leave it empty: all columns, with the types of the file."""
    separator: str = ","
    """Separator of csv."""
    header: bool = True
    """Whether the first line of csv names the columns."""
    quote: str = '"'
    """Quote character of csv; empty: none."""
    escape: str = ""
    """What precedes a quote inside a quoted field: empty for a second quote, a backslash as Spark and MySQL write."""
    null_values: list[str] = field(default_factory=list)
    """Texts that mean null in csv, besides the empty field."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    bad_rows: str = "error"
    """A row of text that cannot be read as declared ends the run (``error``) or is left out and counted (``skip``)."""
    file_column: str | None = None
    """New column that holds the path of the row's file."""

    def __post_init__(self) -> None:
        self.separator = self.separator.replace("\\t", "\t")  # as a shell hands it over

    def check(self, where: str) -> None:
        if not self.files:
            raise UserError(f"{where}.files is empty: name the raw files, relative to input=")
        one_of(self.format, FORMATS, f"{where}.format")
        one_of(self.encoding, ENCODINGS, f"{where}.encoding")
        for file in self.files:
            if os.path.isabs(file) or "://" in file or ".." in file.split("/"):
                raise UserError(
                    f"{where}.files: {file!r} leads out of input=: name files relative to it, and link "
                    "what lies elsewhere"
                )
        one_of(self.bad_rows, BAD_ROWS, f"{where}.bad_rows")
        self._check_marks(where)
        for name, kind in self.columns.items():
            one_of(kind, TYPES, f"{where}.columns.{name}")
        self._check_columns(where)
        if self.format != "parquet" and not self.columns:
            raise UserError(f"{where}.columns is empty: {self.format} files need names and types of their columns")

    def _check_columns(self, where: str) -> None:
        """Names that the engines distinguish from each other and from the program's own."""
        names = [*self.columns, *([self.file_column] if self.file_column else [])]
        for number, name in enumerate(names):
            if TEMPORARY.match(name) or not name:
                raise UserError(f"{where}.columns: {name!r}: names that begin with '__' are the program's own")
            for other in names[:number]:
                if other.lower() == name.lower():
                    raise UserError(
                        f"{where}: the columns '{other}' and '{name}' differ by case alone, which SQL does not distinguish: "
                        "declare one of them"
                    )

    def _check_marks(self, where: str) -> None:
        """Of csv: what separates, quotes and escapes."""
        if not 1 <= len(self.separator.encode()) <= 4 or set(self.separator) & set("\r\n"):
            raise UserError(f"{where}.separator is {self.separator!r}: one to four characters, none of them a line end")
        for key in ("quote", "escape"):
            mark = getattr(self, key)
            if len(mark) > 1 or not mark.isascii() or mark in ("\r", "\n"):
                raise UserError(f"{where}.{key} is {mark!r}: one ASCII character, or empty")
            if mark and mark in self.separator:
                raise UserError(f"{where}.{key} and .separator are both {mark!r}: they must differ")
        if self.escape and not self.quote:
            raise UserError(f"{where}.escape is {self.escape!r} and quote is empty: only quoted fields have escapes")


# The steps of a view or of the examples, each a map of one key: {where: "rating > 0"}.


@dataclass
class Explode:
    """One row for each element of list columns of equal length. The lists are left out; a row with an empty or missing
    list is dropped."""

    columns: dict[str, str] = field(default_factory=dict)
    """List column -> column of its elements."""
    position: str | None = None
    """New column with the position of the element, from 0."""


@dataclass
class Join:
    """Add columns of another table; null where nothing matches."""

    table: str = ""
    """Source or view whose columns are added; its keys must be unique."""
    on: list[str] = field(default_factory=list)
    """Key columns, of the same name in both."""
    columns: list[str] = field(default_factory=list)
    """Columns to add; empty: all."""


@dataclass
class Lookup:
    """Add the value that a column of maps has for the key in another column; null where it has none."""

    map: str = ""
    """Column of maps."""
    key: str = ""
    """Column of keys."""
    into: str = ""
    """New column."""


@dataclass
class Overlap:
    """Add how many different values two lists have in common; 0 where one is missing."""

    lists: list[str] = field(default_factory=list)
    """Two list columns of one type."""
    into: str = ""
    """New column."""


@dataclass
class NGrams:
    """Add the runs of up to ``longest`` words of a text as a list of texts, for a bag with ``ids: hash``. Words are letters and
    digits between other characters, in lower case; a missing text has none."""

    text: str = ""
    """Column of text."""
    into: str = ""
    """New column."""
    longest: int = 2
    """Words of the longest run."""


@dataclass
class Clicks:
    """Label impressions by a separate log of clicks: 1 where a click with the same ``on`` columns lies between the time
    of the impression and ``within`` later, both included. A click counts for the latest such impression only."""

    table: str = ""
    """Source or view of clicks."""
    on: list[str] = field(default_factory=list)
    """Columns that a click and its impression share."""
    time: str = ""
    """Column with the time of the impression."""
    click_time: str | None = None
    """Column with the time of the click; by default ``time``."""
    within: float = 0.0
    """How much later a click may come: in the unit of the time; seconds for timestamps, days for dates."""
    label: str = "label"
    """Column of the label to add."""


@dataclass
class Negatives:
    """Add negative rows behind each row, which is positive. The draws depend on ``seed`` and the place of the row
    alone."""

    user: str = ""
    """Column of users."""
    item: str = ""
    """Column of items: a negative has another item, one that its user touched nowhere in ``touched``."""
    count: int = 1
    """Negative rows for each positive row."""
    strategy: str = "uniform"
    """``uniform`` over the distinct items, or by ``popularity`` (share of the touched rows)."""
    touched: str | None = None
    """Table with both columns; by default the table at this step."""
    attributes: list[str] = field(default_factory=list)
    """Columns of the item that change with it, taken from the item's first row in ``touched``."""
    label: str = "label"
    """Column of the label to add, 1 and 0."""
    seed: int = 2024
    """Seed of the draws."""


STEPS: dict[str, type] = {
    "where": str,  # an SQL condition (DuckDB's dialect, translated for other engines)
    "select": dict,  # {column: SQL expression}: adds or replaces columns
    "drop": list,  # columns to leave out
    "explode": Explode,
    "join": Join,
    "lookup": Lookup,
    "overlap": Overlap,
    "ngrams": NGrams,
    "clicks": Clicks,
    "negatives": Negatives,
    "distinct": list,  # one row for each value of these columns: the first in the table's order
}


@dataclass(frozen=True)
class Step:
    """``name`` of ``STEPS``, ``argument`` of its type; ``where`` is its place in the declaration, for messages."""

    name: str
    argument: Any
    where: str


@dataclass
class View:
    """Rows that steps make of a source or of another view."""

    start: str = ""
    """Source or view to start from."""
    steps: list[Any] = field(default_factory=list)
    """Steps, in order (docs/prepare.md)."""

    def __post_init__(self) -> None:
        self.steps = [_with_on(step) for step in self.steps]

    def parsed(self, where: str) -> tuple[Step, ...]:
        return tuple(_step(step, f"{where}.steps[{number}]") for number, step in enumerate(self.steps))


@dataclass
class History:
    """Earlier events of the user of an example: the feature's ``max_length`` most recent before it, oldest first.
    Events at the time of the example never count, itself included. Events of one time keep their order in the log."""

    events: str = ""
    """Source or view of events."""
    by: list[str] = field(default_factory=list)
    """Columns that name the user, in both."""
    time: str = ""
    """Column of the time, in both."""
    value: str = ""
    """Column of the event to take."""
    where: str | None = None
    """SQL condition on events."""


@dataclass
class Make:
    """How the column of a feature is made; by default it is the raw column of the feature's name."""

    column: str | None = None
    """Raw column."""
    numbers: list[Any] = field(default_factory=list)
    """Steps from the raw number to the value of the feature, in order (docs/prepare.md)."""
    cross: list[str] = field(default_factory=list)
    """Features or raw columns whose combination is the raw value; null where a part is null."""
    history: History | None = None

    def parsed(self, where: str) -> tuple["Number", ...]:
        return tuple(_number(step, f"{where}.numbers[{number}]") for number, step in enumerate(self.numbers))


# name -> what the argument is. Written as "log1p" or {clip: [0, 100]}.
NUMBERS = {
    "fill": "number",  # stands for a missing value
    "clip": "bounds",  # [low, high], either may be null
    "log1p": None,  # log(1 + max(x, 0))
    "log": None,  # natural logarithm; null where x <= 0
    "minmax": None,  # (x - min) / (max - min) of train, clipped to [0, 1]
    "standardize": None,  # (x - mean) / standard deviation of train
    "quantiles": "count",  # to [0, 1] by the cumulative distribution: quantile i of n becomes i / (n - 1), i = 0 … n - 1
    "buckets": "buckets",  # to a bucket's id: a number of quantile buckets, or the inner boundaries themselves
    "log2": None,  # Criteo's: x where x <= 2, else 2 + floor(log(x)²); an integer, for a vocabulary
}
DISCRETE = ("buckets", "log2")


@dataclass(frozen=True)
class Number:
    """One step of ``Make.numbers``."""

    name: str
    argument: Any = None


@dataclass
class Vocabulary:
    """Which raw values get a row of their own."""

    min_count: int = 1
    """Least number of times a value must occur in train."""
    max_size: int | None = None
    """Most values; the most frequent are taken."""
    keep_rare: bool = True
    """Also write the counts of the other values, so that a later day can add to them."""


@dataclass
class PreparedTable(Table):
    """A table whose ``num_embeddings`` may be left open: then it has a ``vocabulary`` or its features' buckets."""

    vocabulary: Vocabulary | None = None


@dataclass
class PreparedFeature(Feature):
    """A feature, and how its column is made."""

    make: Make = field(default_factory=Make)
    counted: bool | None = None
    """Whether its values count for the table's vocabulary; by default those of sparse features, and of sequences whose
    table no sparse feature shares."""


@dataclass
class PreparedSchema:
    """The training schema, with vocabularies and how columns are made."""

    label: str = "label"
    """As ``data.schema.label``."""
    on_bad_label: str = "error"
    """As ``data.schema.on_bad_label``."""
    weight: str | None = None
    """As ``data.schema.weight``."""
    embedding_dim: int = 16
    """As ``data.schema.embedding_dim``."""
    tables: dict[str, PreparedTable] = field(default_factory=dict)
    features: dict[str, PreparedFeature] = field(default_factory=dict)
    crosses: dict[str, Cross] = field(default_factory=dict)

    def members(self, table: str) -> tuple[str, ...]:
        """The features of a table."""
        return tuple(name for name, feature in self.features.items() if feature.table == table)

    def numbers(self, feature: str) -> tuple[Number, ...]:
        return self.features[feature].make.parsed(f"schema.features.{feature}.make")

    def is_bucketed(self, feature: str) -> bool:
        numbers = self.numbers(feature)
        return bool(numbers) and numbers[-1].name == "buckets"

    def has_vocabulary(self, table: str) -> bool:
        """Whether raw values of the table's features go through a vocabulary."""
        return not self.tables[table].num_embeddings and not any(map(self.is_bucketed, self.members(table)))

    def counted(self, table: str) -> tuple[str, ...]:
        """The features whose values are counted for a table's vocabulary."""
        members = self.members(table)
        shared = any(self.features[name].kind == "sparse" for name in members)
        chosen = []
        for name in members:
            feature = self.features[name]
            default = feature.kind == "sparse" or not shared
            if feature.counted if feature.counted is not None else default:
                chosen.append(name)
        return tuple(chosen)

    def filled(self, num_embeddings: dict[str, int]) -> Schema:
        """The plain schema of the prepared columns; ``num_embeddings`` for the tables that left it open."""
        tables = {name: _filled_table(table, num_embeddings.get(name)) for name, table in self.tables.items()}
        features = {name: self._filled_feature(name) for name in self.features}
        return Schema(self.label, self.on_bad_label, self.weight, self.embedding_dim, tables, features, self.crosses)

    def _filled_feature(self, name: str) -> Feature:
        feature = self.features[name]
        values = {f.name: getattr(feature, f.name) for f in dataclasses.fields(Feature)}
        values["column"] = None
        if feature.table and not self.tables[feature.table].num_embeddings:
            values |= {"ids": "identity", "missing_id": MISSING_ID}
        return Feature(**values)


def _filled_table(table: PreparedTable, num_embeddings: int | None) -> Table:
    values = {f.name: getattr(table, f.name) for f in dataclasses.fields(Table)}
    return Table(**{**values, "num_embeddings": num_embeddings or table.num_embeddings})


@dataclass
class TimeSplit:
    """By time. Bounds are included; either may be left out. Rows without a time are left out."""

    column: str = ""
    """Column of the time."""
    valid: Any = None
    """Where valid begins: a number, or an ISO date (UTC) for a timestamp."""
    test: Any = None
    """Where test begins."""


@dataclass
class HashSplit:
    """By hash: rows with the same values of ``by`` go to the same split."""

    by: list[str] = field(default_factory=list)
    """Columns that are hashed."""
    valid: float = 0.0
    """Share of valid."""
    test: float = 0.0
    """Share of test."""
    seed: int = 2024
    """Seed of the hash."""


@dataclass
class LastSplit:
    """The last rows of each ``by`` are test, those before them valid. Rows with a missing ``by`` are train; a missing
    ``order`` comes first."""

    by: list[str] = field(default_factory=list)
    """Columns that name the group."""
    order: list[str] = field(default_factory=list)
    """Columns that order a group; ties keep the raw order."""
    valid: float = 0
    """Rows of valid in a group: a whole number, or a share below 1 (rounded down)."""
    test: float = 0
    """Rows of test in a group, likewise."""


@dataclass
class Split:
    """One of four ways; with none given all rows are train."""

    column: str | None = None
    """Column that holds train, valid or test; rows with another value are left out."""
    time: TimeSplit | None = None
    hash: HashSplit | None = None
    last: LastSplit | None = None


@dataclass
class Order:
    """How the rows of each split are ordered; by default as in the raw data."""

    by: list[str] = field(default_factory=list)
    """Columns to sort by; ties keep the raw order."""
    shuffle: bool = False
    """Shuffle the rows of each split instead, out of core; files say so, and the trainer then reads them in order, row
    groups in a random one."""
    seed: int = 2024
    """Seed of the shuffle; with the data it alone determines the order."""


@dataclass
class Declaration:
    """A recipe.

    Raises ``UserError`` (what, where, remedy) when it contradicts itself.
    """

    name: str = "prepared"
    """Name of the data set that comes out (``data=<name>``)."""
    sources: dict[str, Source] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    examples: View = field(default_factory=View)
    split: Split = field(default_factory=Split)
    order: Order = field(default_factory=Order)
    negative_sampling_rate: float = 1.0
    """Share of the rows of train with label 0 to keep, drawn by the place of the row; valid and test stay whole.
    ``loss.negative_sampling_rate`` of the job is the same number."""
    keep: list[str] = field(default_factory=list)
    """Raw columns to copy to the output besides the features (a group for GAUC, a time)."""
    schema: PreparedSchema = field(default_factory=PreparedSchema)

    def asked_as(self, recorded: dict[str, Any]) -> None:
        """Keeps how it was written, where that is not what it came to: ``${oc.env:NAME}``."""
        self._recorded = recorded

    @property
    def recorded(self) -> dict[str, Any]:
        return getattr(self, "_recorded", {})

    def check(self) -> None:
        """Everything that can be known before a file is opened."""
        _check_name(self.name, "name")
        for name, source in self.sources.items():
            _check_name(name, f"sources.{name}")
            source.check(f"sources.{name}")
        known = list(self.sources)
        for name, view in (*self.views.items(), ("examples", self.examples)):
            where = "examples" if view is self.examples else f"views.{name}"
            if name in known:
                raise UserError(f"{where}: a source or view has the same name; rename one")
            _check_name(name, where)
            self._check_view(where, view, known)
            known.append(name)
        self._check_split()
        self._check_schema(known[:-1])

    def _check_view(self, where: str, view: View, known: list[str]) -> None:
        one_of(view.start, known, f"{where}.start")
        for step in view.parsed(where):
            list(sql.of_step(step))  # raises for what is not an expression
            for key in ("table", "touched"):
                table = getattr(step.argument, key, None)
                if table is not None:
                    one_of(table, known, f"{step.where}.{step.name}.{key}")

    def _check_split(self) -> None:
        given = [f.name for f in dataclasses.fields(Split) if getattr(self.split, f.name) is not None]
        if len(given) > 1:
            raise UserError(f"split has {' and '.join(given)}: give one of them")
        for kind in (self.split.hash, self.split.last):
            if kind is None:
                continue
            if not kind.by:
                raise UserError("split: 'by' is empty: name the columns that rows are split by")
            if min(kind.valid, kind.test) < 0 or max(kind.valid, kind.test) < 1 <= kind.valid + kind.test:
                raise UserError(f"split: valid {kind.valid} and test {kind.test} leave nothing to train on")
        if self.split.hash and self.split.hash.valid + self.split.hash.test >= 1:
            raise UserError("split.hash: valid and test are shares of the rows, below 1 together")
        if not 0 < self.negative_sampling_rate <= 1:
            raise UserError(
                f"negative_sampling_rate is {self.negative_sampling_rate}: it is the share of negatives to keep, above 0 "
                "and at most 1"
            )
        if self.order.shuffle and self.order.by:
            raise UserError("order has both by and shuffle: give one of them")

    def _check_schema(self, tables: list[str]) -> None:
        schema = self.schema
        if not schema.features:
            raise UserError("schema.features is empty: declare at least one feature")
        for name, feature in schema.features.items():
            where = f"schema.features.{name}"
            if TEMPORARY.match(name):
                raise UserError(f"{where}: names that begin with '__' are the program's own; rename the feature")
            if feature.table:
                one_of(feature.table, schema.tables, f"{where}.table")
            self._check_make(where, name, feature, tables)
        for name in schema.tables:
            _check_name(name, f"schema.tables.{name}")
            self._check_table(name)
        # The rest is the training schema's own; two rows stand for the number not known yet.
        schema.filled({name: FIRST_ID for name, table in schema.tables.items() if not table.num_embeddings})

    def _check_make(self, where: str, name: str, feature: PreparedFeature, tables: list[str]) -> None:
        make, numbers = feature.make, self.schema.numbers(name)
        if feature.column:
            raise UserError(f"{where}.column: name the raw column with make: {{column: {feature.column}}}")
        if bool(make.cross) + bool(make.history) + bool(make.column) > 1:
            raise UserError(f"{where}.make: give one of column, cross and history")
        if make.cross and len(make.cross) < 2:
            raise UserError(f"{where}.make.cross has one column: a cross needs at least two")
        if make.cross and feature.kind != "sparse":
            raise UserError(f"{where}.make.cross: a combination is an id, so the feature must have kind: sparse")
        if make.history:
            one_of(make.history.events, tables, f"{where}.make.history.events")
            if make.history.where is not None:
                sql.parse(make.history.where, f"{where}.make.history.where")
            if feature.kind != "sequence" or not (make.history.by and make.history.time and make.history.value):
                raise UserError(f"{where}.make.history: it needs kind: sequence, by, time and value")
        if numbers and (make.cross or make.history or feature.kind in ("sequence", "vector")):
            raise UserError(f"{where}.make.numbers: only a single raw number can be transformed")
        for number in numbers[:-1]:
            if number.name in DISCRETE:
                raise UserError(f"{where}.make.numbers: {number.name} makes ids, so it must be the last step")
        if numbers and (numbers[-1].name in DISCRETE) != (feature.kind == "sparse"):
            wanted = "end with buckets or log2" if feature.kind == "sparse" else "not end with buckets or log2"
            raise UserError(f"{where}.make.numbers: those of a {feature.kind} feature must {wanted}")

    def _check_table(self, name: str) -> None:
        table, members = self.schema.tables[name], self.schema.members(name)
        where = f"schema.tables.{name}"
        if not members:
            raise UserError(f"{where}: no feature uses the table; remove it")
        bucketed = [member for member in members if self.schema.is_bucketed(member)]
        if bucketed and (len(members) > 1 or table.vocabulary):
            raise UserError(f"{where}: the buckets of '{bucketed[0]}' need a table of their own, without a vocabulary")
        if table.vocabulary and table.num_embeddings:
            raise UserError(f"{where} has num_embeddings and vocabulary: give one of them")
        if table.vocabulary and table.vocabulary.min_count < 1:
            raise UserError(f"{where}.vocabulary.min_count is {table.vocabulary.min_count}: it must be at least 1")


def _with_on(value: Any) -> Any:
    """YAML 1.1 reads a key ``on`` without quotes as the boolean true."""
    if not isinstance(value, dict):
        return value
    return {"on" if key is True else key: _with_on(inner) for key, inner in value.items()}


_KIND_NAMES = {str: "text", float: "a number", int: "a whole number", list: "a list", dict: "a map"}


def _step(step: Any, where: str) -> Step:
    if not isinstance(step, dict) or len(step) != 1:
        raise UserError(f"{where}: a step is a map of one key, such as {{where: 'rating > 0'}}")
    ((name, argument),) = step.items()
    one_of(name, STEPS, where)
    kind = STEPS[name]
    if not dataclasses.is_dataclass(kind):
        if not isinstance(argument, kind):
            raise UserError(f"{where}.{name}: expected {kind.__name__}, found {type(argument).__name__}")
        return Step(name, argument, where)
    return Step(name, _dataclass(kind, argument, f"{where}.{name}"), where)


def _dataclass(kind: type, values: Any, where: str) -> Any:
    valid = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a map with keys of {', '.join(valid)}")
    for key in values:
        one_of(key, valid, where)
    made = kind(**values)
    for key, spec in valid.items():
        _check_kind(getattr(made, key), spec, f"{where}.{key}")
        if getattr(made, key) in ("", [], {}) and spec.default_factory is list and key == "on":
            raise UserError(f"{where}.on is empty: name the key columns")
        if isinstance(getattr(made, key), str) and not getattr(made, key) and key != "label":
            raise UserError(f"{where}.{key} is missing")
    return made


def _check_kind(value: Any, spec: dataclasses.Field, where: str) -> None:
    default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
    kinds: tuple[type, ...] = (str, type(None)) if default is None else (type(default),)
    if kinds == (float,):
        kinds = (float, int)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}: expected {_KIND_NAMES[kinds[0]]}")
    inside = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    for item in inside:
        if not isinstance(item, str):
            raise UserError(f"{where} holds {item!r}: expected names of columns")


def _number(step: Any, where: str) -> Number:
    if not isinstance(step, str) and not (isinstance(step, dict) and len(step) == 1):
        raise UserError(
            f"{where}: {step!r} is no step: write a name, such as log1p, or a map of one key, such as {{fill: 0}}"
        )
    name, argument = (step, None) if isinstance(step, str) else next(iter(step.items()))
    one_of(name, NUMBERS, where)
    wanted = NUMBERS[name]
    good = {
        None: argument is None,
        "number": isinstance(argument, (int, float)),
        "count": isinstance(argument, int) and argument >= 2,
        "bounds": isinstance(argument, list) and len(argument) == 2,
        "buckets": (isinstance(argument, int) and argument >= 2)
        or (isinstance(argument, list) and argument == sorted(set(argument)) and len(argument) > 0),
    }[wanted]
    if not good:
        raise UserError(f"{where}.{name}: {argument!r} does not fit; expected {wanted or 'no argument'}")
    return Number(name, argument)
