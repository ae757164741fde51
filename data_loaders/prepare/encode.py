"""Examples to the columns to train on, with what was learnt from train: the same for training and scoring.

Single values find their ids by a left join with their vocabulary: a few columns at a time where the engine can lay tables
side by side, since each join of a long chain moves the columns of all the others; else all in one SELECT.
Lists are taken apart, joined, and put together again in order.

A missing single id is ``MISSING_ID``. A missing list is empty; a missing element is left out of a bag, and ``MISSING_ID`` in
a sequence, so that sequences of the same events stay aligned. Where a feature's ``on_null`` is not ``missing``, nulls stay:
what happens to them is the trainer's business.
"""

from collections.abc import Callable, Sequence

import ibis
import pyarrow as pa

from data_loaders.errors import UserError
from data_loaders.prepare import columns, numbers, raw_values
from data_loaders.prepare.declaration import MISSING_ID, UNKNOWN_ID, PreparedFeature, PreparedSchema
from data_loaders.prepare.engine import KEY, Engine
from data_loaders.prepare.statistics import Statistics

Join = tuple[ibis.Table, list[tuple[str, str]]]  # a table, and the pairs of columns (ours, its) to compare


def encode(
    examples: ibis.Table,
    schema: PreparedSchema,
    statistics: Statistics,
    vocabularies: dict[str, ibis.Table],
    histories: dict[str, ibis.Table],
    keep: Sequence[str] = (),
) -> ibis.Table:
    """``__row``, ``__part``, label and weight where there are any, the features as ``output_field`` types them, and the
    columns of ``keep``. ``histories``: by feature, a table of ``__row``, ``__part`` and the list of ids.

    A column of ``keep`` with a feature's name is the feature. Raises ``UserError`` for raw columns that are missing or of
    a kind that cannot be encoded."""
    encoding, names = _begun(examples, schema, statistics, vocabularies, histories, keep)
    return encoding.table(names, list(encoding.single))


def encode_apart(
    examples: ibis.Table,
    schema: PreparedSchema,
    statistics: Statistics,
    vocabularies: dict[str, ibis.Table],
    histories: dict[str, ibis.Table],
    keep: Sequence[str] = (),
    *,
    joins_at_once: int,
) -> list[ibis.Table]:
    """The same columns in several tables of the same rows, which share ``__row`` and ``__part`` alone: the first holds all
    that is not a single id from a vocabulary, each other one at most ``joins_at_once`` of those."""
    encoding, names = _begun(examples, schema, statistics, vocabularies, histories, keep)
    single = list(encoding.single)
    groups = [single[i : i + joins_at_once] for i in range(0, len(single), joins_at_once)]
    rest = encoding.table([name for name in names if name not in encoding.single], [])
    return [rest, *(encoding.table([*KEY, *group], group) for group in groups)]


def with_ids(
    events: ibis.Table, column: str, feature: str, schema: PreparedSchema, vocabularies: dict[str, ibis.Table]
) -> ibis.Table:
    """``events`` with the ids (int32) of ``column``'s raw values as a column of the feature's name. Raises ``UserError``
    for values of another kind than the vocabulary's, and for ids that are hashed only when they are trained on."""
    spec, where = schema.features[feature], f"schema.features.{feature}.make.history.value"
    value = raw_values.as_identifier(events[column], where)
    if not schema.has_vocabulary(spec.table):
        if spec.ids == "hash" or not value.type().is_integer():
            raise UserError(
                f"{where}: the ids of a history come from a vocabulary: leave out num_embeddings of table '{spec.table}'"
            )
        return events.mutate(**{feature: ibis.coalesce(value, spec.missing_id or MISSING_ID).cast("int32")})
    known = vocabularies[spec.table].select(__known="value", __id="id")
    _check_family(feature, spec, value, known["__known"])
    joined = events.mutate(__value=value).left_join(known, [("__value", "__known")])
    ids = {feature: _or_unknown(joined["__value"], joined["__id"], spec)}
    return joined.select(*[joined[name] for name in events.columns], **ids)


def mean_elements(engine: Engine, examples: ibis.Table, schema: PreparedSchema) -> float:
    """Elements of a row's lists whose ids are looked up in a vocabulary, on average over the rows."""
    columns = {
        spec.make.column or name
        for name, spec in schema.features.items()
        if spec.table and schema.has_vocabulary(spec.table) and (spec.make.column or name) in examples.columns
    }
    lists = [examples[name].length() for name in sorted(columns) if examples[name].type().is_array()]
    if not lists:
        return 0.0
    total = sum(length.fill_null(0) for length in lists)
    return engine.fetch(examples.aggregate(mean=total.mean())).to_pylist()[0]["mean"] or 0.0


def output_field(feature: str, schema: PreparedSchema, kind: pa.DataType) -> pa.Field:
    """Name, type and nullability of a feature's column in the output; ``kind`` is the type that ``encode`` made."""
    spec = schema.features[feature]
    if spec.kind == "dense":
        left_to_trainer = spec.on_null == "drop" or (spec.fill is not None and not _fills(spec))
        return pa.field(feature, pa.float32(), nullable=left_to_trainer)
    if spec.kind == "vector":
        return pa.field(feature, pa.list_(pa.float32()))
    if _is_unchanged(schema, feature):
        return pa.field(feature, kind)
    nullable = spec.on_null != "missing"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = pa.list_(pa.field("element", pa.int32(), nullable))
    else:
        kind = pa.int32()
    return pa.field(feature, kind, nullable)


def _begun(
    examples: ibis.Table,
    schema: PreparedSchema,
    statistics: Statistics,
    vocabularies: dict[str, ibis.Table],
    histories: dict[str, ibis.Table],
    keep: Sequence[str],
) -> tuple["_Encoding", list[str]]:
    """With the names of the output's columns."""
    copied = [name for name in (schema.label, schema.weight) if name in examples.columns]
    kept = [name for name in dict.fromkeys(keep) if name not in (*schema.features, *copied, *KEY)]
    columns.check(examples, [name for name in kept if not name.startswith("__")], "keep")
    encoding = _Encoding(examples, schema, statistics, vocabularies)
    for name in (*KEY, *copied, *kept):
        encoding.made[name] = examples[name]
    for name in schema.features:
        encoding.add(name, histories)
    return encoding, [*KEY, *copied, *schema.features, *kept]


class _Encoding:
    """``made``: columns made of the examples alone. ``joins``: tables to join to them, with the pairs of columns to compare;
    ``single``: those that one feature's single values need. ``ids``: how a column is made of both."""

    def __init__(
        self,
        examples: ibis.Table,
        schema: PreparedSchema,
        statistics: Statistics,
        vocabularies: dict[str, ibis.Table],
    ) -> None:
        self.examples, self.schema, self.learnt = examples, schema, statistics.steps
        self.vocabularies = vocabularies
        self.made: dict[str, ibis.Value] = {}
        self.joins: list[Join] = []
        self.single: dict[str, Join] = {}
        self.ids: dict[str, Callable[[ibis.Table], ibis.Value]] = {}
        self._histories: list[ibis.Table] = []

    def add(self, feature: str, histories: dict[str, ibis.Table]) -> None:
        spec = self.schema.features[feature]
        if spec.make.history:
            self._add_history(feature, histories[feature])
        elif spec.kind == "dense":
            self.made[feature] = self._dense(feature)
        elif spec.kind == "vector":
            self.made[feature] = _vector(self._column(feature), f"schema.features.{feature}")
        elif _is_unchanged(self.schema, feature):
            plain = not (spec.make.cross or spec.make.numbers)
            self.made[feature] = self._column(feature) if plain else self._raw(feature)
        elif self.schema.is_bucketed(feature):
            buckets = self._raw(feature)
            self.made[feature] = (buckets == MISSING_ID).ifelse(_missing(spec), buckets).cast("int32")
        else:
            raw = self._raw(feature)
            _check_family(feature, spec, raw, self.vocabularies[spec.table].value)
            (self._add_list if raw.type().is_array() else self._add_single)(feature, raw)

    def table(self, names: Sequence[str], single: Sequence[str]) -> ibis.Table:
        """The columns ``names``, of which ``single`` have a vocabulary to be joined."""
        rest = any(name not in (*KEY, *single) for name in names)
        raw = {_raw_name(name) for name in self.single}
        wanted = {*KEY, *map(_raw_name, single)}
        joined = self.examples.select(
            **{name: value for name, value in self.made.items() if name in wanted or (rest and name not in raw)}
        )
        for other, pairs in [*(self.joins if rest else []), *(self.single[name] for name in single)]:
            joined = joined.left_join(other, pairs)
        return joined.select(**{name: self.ids[name](joined) if name in self.ids else joined[name] for name in names})

    def _column(self, feature: str) -> ibis.Value:
        return raw_values.column(self.examples, self.schema, feature)

    def _raw(self, feature: str) -> ibis.Value:
        return raw_values.identifier(self.examples, self.schema, feature, self.learnt)

    def _dense(self, feature: str) -> ibis.Value:
        spec, steps = self.schema.features[feature], self.schema.numbers(feature)
        raw = raw_values.number(self.examples, self.schema, feature)
        value = numbers.finite(numbers.apply(raw, steps, self.learnt.get(feature, [])), numbers.LARGEST_FLOAT32)
        if _fills(spec):
            value = ibis.coalesce(value, numbers.exact(spec.fill))
        return value.cast("float32")

    def _add_single(self, feature: str, raw: ibis.Value) -> None:
        spec = self.schema.features[feature]
        raw_name, known, found = _raw_name(feature), f"__known_{feature}", f"__id_{feature}"
        self.made[raw_name] = raw
        vocabulary = self.vocabularies[spec.table].select(**{known: "value", found: "id"})
        self.single[feature] = (vocabulary, [(raw_name, known)])
        self.ids[feature] = lambda joined: _or_unknown(joined[raw_name], joined[found], spec)

    def _add_list(self, feature: str, raw: ibis.Value) -> None:
        spec = self.schema.features[feature]
        name, absent = f"__list_{feature}", f"__absent_{feature}"
        self._join_on_key(self._list(spec, raw).rename(**{name: "__ids"}))
        self.ids[feature] = lambda joined: _or_empty(joined[name])
        if spec.on_null != "missing":
            self.made[absent] = raw.isnull()
            self.ids[feature] = lambda joined: joined[absent].ifelse(ibis.null("array<int32>"), _or_empty(joined[name]))

    def _list(self, spec: PreparedFeature, raw: ibis.Value) -> ibis.Table:
        """``__row``, ``__part`` and ``__ids`` of the rows with a list that is not empty."""
        if spec.kind == "sparse" and spec.on_null == "missing":
            raw = raw.filter(lambda element: element.notnull())
        if spec.max_length is not None:
            raw = raw[-spec.max_length :]
        elements = self.examples.select(*KEY, __raw=raw).unnest("__raw", offset="__place")
        known = self.vocabularies[spec.table].select(__known="value", __id="id")
        joined = elements.left_join(known, [("__raw", "__known")])
        ids = _or_unknown(joined["__raw"], joined["__id"], spec)
        placed = joined.select(*KEY, __element=ibis.struct({"place": joined["__place"], "id": ids}))
        lists = placed.group_by(KEY).aggregate(__ids=placed["__element"].collect())
        return lists.mutate(__ids=lists["__ids"].sort().map(lambda element: element["id"]))

    def _add_history(self, feature: str, table: ibis.Table) -> None:
        if not any(table is other for other in self._histories):  # one table may hold several features
            self._histories.append(table)
            self._join_on_key(table.rename(**{f"__list_{name}": name for name in table.columns if name not in KEY}))
        self.ids[feature] = lambda joined: _or_empty(joined[f"__list_{feature}"])

    def _join_on_key(self, table: ibis.Table) -> None:
        keys = [(key, f"{key}_{len(self.joins)}") for key in KEY]
        self.joins.append((table.rename(**{theirs: mine for mine, theirs in keys}), keys))


def _vector(raw: ibis.Value, where: str) -> ibis.Value:
    """Whether each has as many entries as ``dim`` says is the trainer's to check."""
    if not (raw.type().is_array() and raw.type().value_type.is_numeric()):
        raise UserError(f"{where} is a vector, but its column is {raw.type()}: give a list of numbers")
    return raw.cast("array<float32>")


def _raw_name(feature: str) -> str:
    return f"__raw_{feature}"


def _is_unchanged(schema: PreparedSchema, feature: str) -> bool:
    """Whether the raw values are the ids: the table has its rows already, and hashes or takes them as they are."""
    spec = schema.features[feature]
    return not (spec.make.history or schema.is_bucketed(feature) or schema.has_vocabulary(spec.table))


def _fills(spec: PreparedFeature) -> bool:
    """Whether ``fill`` is written: what the trainer scales before it fills is left to it."""
    return spec.fill is not None and spec.on_null == "missing" and spec.offset == 0 and spec.scale == 1


def _missing(spec: PreparedFeature) -> ibis.Value:
    return ibis.literal(MISSING_ID, "int32") if spec.on_null == "missing" else ibis.null("int32")


def _or_unknown(raw: ibis.Value, found: ibis.Value, spec: PreparedFeature) -> ibis.Value:
    return raw.isnull().ifelse(_missing(spec), ibis.coalesce(found, UNKNOWN_ID)).cast("int32")


def _or_empty(ids: ibis.Value) -> ibis.Value:
    return ibis.coalesce(ids, ibis.literal([], "array<int32>"))


def _check_family(feature: str, spec: PreparedFeature, raw: ibis.Value, known: ibis.Value) -> None:
    kind = raw.type()
    kind = kind.value_type if kind.is_array() else kind
    if kind.copy(nullable=True) != known.type().copy(nullable=True):
        raise UserError(
            f"schema.features.{feature}: its raw values are {kind}, those of the vocabulary of table '{spec.table}' "
            f"{known.type()}: declare the type that the vocabulary was made with (sources), or cast with a step (select)"
        )
