"""The one declaration of what a row means: tables (parameters), features (columns), crosses, label.

Everything else is derived from it and never listed again: column projection, KeyedJaggedTensor keys, table
configs, input dimensions, synthetic data, test fixtures.

Conventions
-----------
* A *table* has ``num_embeddings`` rows. A table that any feature reaches with ``ids: hash`` reserves row 0 for the
  missing id; hashed ids take rows 1 … num_embeddings - 1. A table with ``ids: identity`` reserves nothing unless the
  feature names a ``missing_id``; a missing id is then an empty bag, which contributes a zero vector and trains no row.
* A *feature* is one column. ``dense`` is a number, ``vector`` a list of so many numbers in each row, ``sparse`` an id or a bag of
  ids, ``sequence`` ids in time order, oldest first.
* The *dense inputs* of a model are the numbers, then the entries of vectors (``project``: of what a linear map makes of them).
"""

import difflib
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from data_loaders.errors import UserError

KINDS = ("dense", "vector", "sparse", "sequence")
ID_MODES = ("identity", "hash")
POOLINGS = ("mean", "sum")
POLICIES = ("missing", "error", "drop")
INITS = ("normal", "uniform")
TABLE_DTYPES = ("fp32", "fp16")
NORMALIZATIONS = ("none", "l2")
LABEL_POLICIES = ("error", "drop")


@dataclass
class VectorFile:
    """Parquet with vectors for the rows of a table."""

    file: str = ""
    """File, folder or glob under ``data.root``, or an address; empty: none."""
    id: str = "id"
    """Column of ids, as the training data have them; of a table with a vocabulary (``data.prepared``), raw values."""
    vector: str = "vector"
    """Column of vectors: lists of ``dim`` numbers."""
    dim: int | None = None
    """Numbers of a vector; by default the table's ``embedding_dim``. With another width rows are as wide as the file's, and a
    linear map, trained with the model, makes ``embedding_dim`` of them."""


@dataclass
class Table:
    """Embedding rows that one or more features share."""

    num_embeddings: int = 0
    """Number of rows; must be given."""
    embedding_dim: int | None = None
    """Width of a row, a multiple of 4 (FBGEMM); by default the schema's."""
    pooling: str = "mean"
    """How a bag of ids becomes one vector."""
    init_std: float | None = None
    """Standard deviation of the initial values, around 0. By default 0.01 (``normal``), or that of the range
    -1/√num_embeddings to 1/√num_embeddings (``uniform``, as in DLRM). 0 gives zeros."""
    init: str = "normal"
    """Distribution of the initial values."""
    dtype: str = "fp32"
    """Type of the rows; fp16 takes half the memory and rounds after each update (docs/training.md)."""
    init_from: VectorFile = field(default_factory=VectorFile)
    """Initial values of a new run from a file; rows without a vector there get those of ``init``."""
    freeze: bool = False
    """Leave the rows of ``init_from`` (and all others of the table) as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.init_from, dict):  # of a schema read as JSON
            self.init_from = VectorFile(**self.init_from)


@dataclass
class Feature:
    """A column of the log."""

    kind: str = ""
    """A number (``dense``), a list of ``dim`` numbers (``vector``), an id or a bag of ids (``sparse``), or ids in order of
    time, oldest first (``sequence``); must be given."""
    column: str | None = None
    """Parquet column; by default the feature's name."""
    table: str | None = None
    """Table whose rows the ids are (sparse, sequence)."""
    ids: str = "identity"
    """``identity``: the integer is the row. ``hash``: any integer or string is hashed to a row."""
    on_null: str = "missing"
    """A null counts as missing (``fill``, or ``missing_id``), ends the run (``error``), or drops the row, which keeps
    its place in the batch as padding does (``drop``). All are counted."""
    on_out_of_range: str = "error"
    """The same for an id outside the table."""
    on_non_finite: str = "missing"
    """The same for a dense value that is not finite; a vector with one is missing as a whole."""
    missing_id: int | None = None
    """Row for missing ids."""
    max_length: int | None = None
    """Ids of a list that are kept, from its end (the most recent of a sequence); what is cut is counted."""
    target: str | None = None
    """Sparse feature that a sequence is compared with."""
    history: str | None = None
    """Sequences with the same ``history`` are attributes of the same events: equally long, and attended to as one."""
    wide: bool | None = None
    """Whether the linear part uses the feature; by default sparse features and no sequences."""
    offset: float = 0.0
    """A dense value becomes (x - offset) · scale, computed in float64. A timestamp in seconds needs an offset: float32
    keeps steps of 64 s of it."""
    scale: float = 1.0
    """See ``offset``."""
    fill: float | None = None
    """Value in place of a missing dense value, or of each entry of a missing vector; not given: missing is an error."""
    log1p: bool = False
    """Apply log(1 + max(x, 0)) at the end."""
    dim: int | None = None
    """Numbers of a vector; must be given for one."""
    project: int | None = None
    """Width that a linear map, trained with the model, gives a vector; not given: its entries are the model's inputs."""
    normalize: str = "none"
    """``l2``: a vector is divided by its length, before it is projected; one of length 0 stays so."""
    weights: str | None = None
    """Parquet column of lists, a number for each id of a list: the rows of ids are multiplied by them where they are summed, or
    averaged by them (Σ w v / Σ w). In the linear part, too."""


@dataclass
class Cross:
    """A cross-product feature of the linear part."""

    columns: list[str] = field(default_factory=list)
    """Single-valued sparse features whose combination is hashed."""
    num_buckets: int = 0
    """Rows that it is hashed into; row 0 stands for a combination with a missing part."""


@dataclass(frozen=True)
class Layout:
    """Which features a model wants in which KeyedJaggedTensor of the batch, in key order.

    ``pooled`` holds features and crosses (``Batch.sparse``), ``unpooled`` the features whose table a model reads id by
    id (``Batch.sequence``). ``weighted``: those of ``pooled`` whose ids have weights (``Batch.weighted`` in place of
    ``Batch.sparse``).
    """

    pooled: tuple[str, ...]
    unpooled: tuple[str, ...] = ()
    weighted: tuple[str, ...] = ()

    @property
    def plain(self) -> tuple[str, ...]:
        """Those of ``pooled`` whose ids have no weights."""
        return tuple(key for key in self.pooled if key not in self.weighted)

    @property
    def keys(self) -> tuple[str, ...]:
        """All, one KeyedJaggedTensor after the other."""
        return (*self.plain, *self.weighted, *self.unpooled)

    def only(self, keys: Container[str]) -> "Layout":
        """Without all others."""
        parts = (self.pooled, self.unpooled, self.weighted)
        return Layout(*(tuple(key for key in part if key in keys) for part in parts))


@dataclass
class Schema:
    """What a row means.

    Raises ``UserError`` (what, where, remedy) when it contradicts itself.
    """

    label: str = "label"
    """Column of clicks, 0 or 1."""
    on_bad_label: str = "error"
    """A label that is null, or neither 0 nor 1, ends the run (``error``) or drops the row, which is counted
    (``drop``)."""
    weight: str | None = None
    """Column of sample weights."""
    embedding_dim: int = 16
    """Width of tables that do not give their own."""
    tables: dict[str, Table] = field(default_factory=dict)
    features: dict[str, Feature] = field(default_factory=dict)
    crosses: dict[str, Cross] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(self.on_bad_label, LABEL_POLICIES, "schema.on_bad_label")
        for name, table in self.tables.items():
            self._check_table(name, table)
        for name, feature in self.features.items():
            self._check_feature(name, feature)
        for name, cross in self.crosses.items():
            self._check_cross(name, cross)

    # What the rest of the program derives.

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(n for n, f in self.features.items() if f.kind == "dense")

    @property
    def vectors(self) -> tuple[str, ...]:
        return tuple(n for n, f in self.features.items() if f.kind == "vector")

    @property
    def dense(self) -> tuple[str, ...]:
        """The feature of each dense input of a model: the numbers, then each vector as often as it has entries there."""
        return (
            *self.numbers,
            *(n for n in self.vectors for _ in range(self.features[n].project or self.features[n].dim)),
        )

    @property
    def dense_columns(self) -> tuple[str, ...]:
        """The feature of each column of ``Batch.dense``, where no vector is projected yet."""
        return (*self.numbers, *(n for n in self.vectors for _ in range(self.features[n].dim)))

    @property
    def sparse(self) -> tuple[str, ...]:
        return tuple(n for n, f in self.features.items() if f.kind == "sparse")

    @property
    def sequences(self) -> tuple[str, ...]:
        return tuple(n for n, f in self.features.items() if f.kind == "sequence")

    @property
    def may_drop(self) -> bool:
        """Whether a row can be left out, so that how many rows of a batch count is known only once it is read."""
        policies = ((f.on_null, f.on_non_finite, f.on_out_of_range) for f in self.features.values())
        return self.on_bad_label == "drop" or any("drop" in found for found in policies)

    @property
    def wide(self) -> tuple[str, ...]:
        """Features and crosses of a linear model."""
        chosen = (
            n for n, f in self.features.items() if f.table and (f.wide if f.wide is not None else f.kind == "sparse")
        )
        return (*chosen, *self.crosses)

    @property
    def histories(self) -> dict[str, tuple[str, ...]]:
        """Sequences that have a target, grouped by ``history``: ``{history: (sequence, …)}``."""
        groups: dict[str, list[str]] = {}
        for name in self.sequences:
            feature = self.features[name]
            if feature.target:
                groups.setdefault(feature.history or name, []).append(name)
        return {name: tuple(members) for name, members in groups.items()}

    def column(self, feature: str) -> str:
        return self.features[feature].column or feature

    def columns(self, layout: Layout) -> tuple[str, ...]:
        """The Parquet columns a layout needs, without the label and weight, each once."""
        names: dict[str, None] = {self.column(n): None for n in (*self.numbers, *self.vectors)}
        for key in (*layout.pooled, *layout.unpooled):
            for feature in self.crosses[key].columns if key in self.crosses else (key,):
                names[self.column(feature)] = None
                if self.features[feature].weights is not None:
                    names[self.features[feature].weights] = None
        return tuple(names)

    def dim(self, table: str) -> int:
        return self.tables[table].embedding_dim or self.embedding_dim

    def stored_dim(self, table: str) -> int:
        """Width of a table's rows in memory, a multiple of 4: wider than ``dim``, or narrower, where they are projected."""
        spec = self.tables[table].init_from
        return self.dim(table) if spec.dim is None else -(-spec.dim // 4) * 4

    def projected(self, features: Iterable[str]) -> dict[str, str]:
        """``{feature: table}`` of those whose rows are projected to the table's ``dim``."""
        found = {name: self.features[name].table for name in features if name in self.features}
        return {name: table for name, table in found.items() if self.stored_dim(table) != self.dim(table)}

    def num_embeddings(self, key: str) -> int:
        """Rows that a feature or a cross addresses."""
        return (
            self.crosses[key].num_buckets
            if key in self.crosses
            else self.tables[self.features[key].table].num_embeddings
        )

    def missing_id(self, feature: str) -> int | None:
        """The row of a missing id, or None where a missing id is an empty bag."""
        spec = self.features[feature]
        return spec.missing_id if spec.missing_id is not None else (0 if spec.ids == "hash" else None)

    def attention_tables(self) -> tuple[str, ...]:
        """Tables that target attention reads id by id: those of sequences that have a target."""
        members = (m for group in self.histories.values() for m in group)
        return tuple(dict.fromkeys(self.features[m].table for m in members))

    def layout(self, *, crosses: bool = False, attention: bool = False) -> Layout:
        """A model's layout: all features pooled, or (``attention``) those of the attention tables unpooled."""
        apart = set(self.attention_tables()) if attention else set()
        features = (*self.sparse, *self.sequences)
        pooled = tuple(n for n in features if self.features[n].table not in apart)
        unpooled = tuple(n for n in features if self.features[n].table in apart)
        weighing = {feature.table: name for name, feature in self.features.items() if feature.weights}
        for table in apart & weighing.keys():
            raise UserError(
                f"schema.features.{weighing[table]}.weights: its table '{table}' is read id by id by this model, which attends "
                "to histories by weights of its own: give the feature a table that no history with a target reads, or leave "
                "weights out"
            )
        for name, table in self.projected(unpooled).items():
            raise UserError(
                f"schema.tables.{table}.init_from.dim is {self.tables[table].init_from.dim}, and its embedding_dim "
                f"{self.dim(table)}: this model reads '{name}' id by id, which is not projected; give the table "
                f"embedding_dim={self.stored_dim(table)}"
            )
        weighted = tuple(n for n in pooled if self.features[n].table in weighing)
        return Layout((*pooled, *(self.crosses if crosses else ())), unpooled, weighted)

    # Checks. Every message names the key, the value and the remedy.

    def _check_table(self, name: str, table: Table) -> None:
        where = f"schema.tables.{name}"
        if table.num_embeddings < 2:
            raise UserError(f"{where}.num_embeddings is {table.num_embeddings}: give the number of rows, at least 2")
        if self.dim(name) <= 0 or self.dim(name) % 4:
            raise UserError(f"{where}.embedding_dim is {self.dim(name)}: FBGEMM needs a positive multiple of 4")
        source = table.init_from
        if source != VectorFile() and not source.file:
            raise UserError(f"{where}.init_from.file is empty: name the Parquet with the table's vectors")
        if source.dim is not None and source.dim < 1:
            raise UserError(f"{where}.init_from.dim is {source.dim}: give the number of entries that each vector has")
        if table.freeze and not source.file:
            raise UserError(f"{where}.freeze leaves random rows as they are: name a file of vectors, {where}.init_from")
        one_of(table.pooling, POOLINGS, f"{where}.pooling")
        one_of(table.init, INITS, f"{where}.init")
        one_of(table.dtype, TABLE_DTYPES, f"{where}.dtype")
        if table.init_std is not None and not (table.init_std >= 0 and math.isfinite(table.init_std)):
            raise UserError(f"{where}.init_std is {table.init_std}: give a standard deviation, 0 for zeros")

    def _check_feature(self, name: str, feature: Feature) -> None:
        where = f"schema.features.{name}"
        if "@" in name:
            raise UserError(
                f"{where}: a feature's name must not contain '@' (TorchRec joins feature and table with it)"
            )
        one_of(feature.kind, KINDS, f"{where}.kind")
        for policy in ("on_null", "on_non_finite", "on_out_of_range"):
            one_of(getattr(feature, policy), POLICIES, f"{where}.{policy}")
        if feature.weights is not None and feature.kind not in ("sparse", "sequence"):
            raise UserError(f"{where}.weights: only ids have weights, this is {feature.kind}")
        if feature.kind == "vector":
            return self._check_vector(where, feature)
        if (feature.dim, feature.project, feature.normalize) != (None, None, "none"):
            raise UserError(f"{where}: dim, project and normalize are for kind: vector, this is {feature.kind}")
        if feature.kind == "dense":
            if feature.table:
                raise UserError(f"{where}: a dense feature has no table; use kind: sparse for ids")
            if not math.isfinite(feature.offset) or not math.isfinite(feature.scale) or feature.scale == 0:
                raise UserError(
                    f"{where}: offset {feature.offset}, scale {feature.scale}: they must be finite, and scale not 0"
                )
            return
        one_of(feature.table, self.tables, f"{where}.table")
        one_of(feature.ids, ID_MODES, f"{where}.ids")
        rows = self.tables[feature.table].num_embeddings
        if feature.missing_id is not None and not 0 <= feature.missing_id < rows:
            raise UserError(
                f"{where}.missing_id is {feature.missing_id}: table '{feature.table}' has rows 0 … {rows - 1}"
            )
        if feature.max_length is not None and feature.max_length < 1:
            raise UserError(f"{where}.max_length is {feature.max_length}: it must be at least 1")
        if feature.kind == "sequence":
            self._check_sequence(where, feature)

    def _check_vector(self, where: str, feature: Feature) -> None:
        one_of(feature.normalize, NORMALIZATIONS, f"{where}.normalize")
        if feature.table:
            raise UserError(f"{where}: a vector has no table; use kind: sparse for ids")
        if (feature.offset, feature.scale, feature.log1p) != (0, 1, False):
            raise UserError(f"{where}: offset, scale and log1p are for kind: dense; of a vector, see normalize")
        if feature.dim is None or feature.dim < 1:
            raise UserError(f"{where}.dim is {feature.dim}: give the number of entries that each vector has")
        if feature.project is not None and feature.project < 1:
            raise UserError(f"{where}.project is {feature.project}: give the width to project to, or leave it out")

    def _check_sequence(self, where: str, feature: Feature) -> None:
        if feature.max_length is None:
            raise UserError(f"{where}.max_length is missing: a sequence needs a bound (how many recent ids to keep)")
        if feature.target is None:
            return
        one_of(feature.target, self.sparse, f"{where}.target")
        if self.features[feature.target].table != feature.table:
            raise UserError(
                f"{where}.target is '{feature.target}', which reads table '{self.features[feature.target].table}', not "
                f"'{feature.table}': a sequence and its target share a table"
            )

    def _check_cross(self, name: str, cross: Cross) -> None:
        where = f"schema.crosses.{name}"
        if "@" in name:
            raise UserError(f"{where}: a cross's name must not contain '@' (TorchRec joins feature and table with it)")
        if name in self.features:
            raise UserError(f"{where}: a feature has the same name; rename the cross")
        if len(cross.columns) < 2:
            raise UserError(f"{where}.columns has {len(cross.columns)} feature(s): a cross needs at least two")
        for feature in cross.columns:
            one_of(feature, self.sparse, f"{where}.columns")
        if cross.num_buckets < 2:
            raise UserError(f"{where}.num_buckets is {cross.num_buckets}: it must be at least 2")


def one_of(value: object, valid: Iterable[str], where: str) -> None:
    """Raises ``UserError`` naming the nearest valid names unless ``value`` is one of ``valid``."""
    valid = tuple(valid)
    if value in valid:
        return
    near = difflib.get_close_matches(str(value), valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    shown = ", ".join(valid[:20]) + (", …" if len(valid) > 20 else "")
    raise UserError(f"{where}: {value!r} is not known; {hint}valid: {shown or 'none'}")
