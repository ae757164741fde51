"""From a request's columns to a batch: decoded by the loader's own decoder, contexts once a request.

Which columns are a context's is what the request itself says: it may be another split in each.

Shapes: R requests, N rows to score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.batch import Batch, Cursor
from data_loaders.collate import Chunk, Collator
from data_loaders.column_decoders import Counters
from data_loaders.columns import Columns
from data_loaders.decode import Decoder
from data_loaders.schema import Layout, Schema
from trainer.serve.requests import RequestError, with_nulls
from trainer.serve.tables import RequestIds


@dataclass(frozen=True)
class Side:
    """The contexts, or the candidates: their columns, and what decodes these."""

    columns: tuple[str, ...]
    schema: Schema
    layout: Layout
    decoder: Decoder

    def decode(self, table: pa.Table, types: Mapping[str, pa.DataType], rows: int) -> Columns:
        return self.decoder([with_nulls(table, self.columns, types, rows)], rows)

    def batch(self, columns: Columns) -> Batch:
        rows = columns.num_rows
        cursor = Cursor(0, 0, rows, rows, dropped=columns.dropped)
        collator = Collator(self.layout, self.decoder.slots, rows)
        return collator([Chunk(columns, 0, rows)], max(rows, 1), cursor)


class Features:
    """``features(contexts, candidates, requests, request) -> (Batch, dropped)`` for the columns of ``schema.columns(layout)``, of
    the Arrow ``types`` of the training data. What is missing or replaced is added to ``counters``."""

    def __init__(self, schema: Schema, layout: Layout, types: Mapping[str, pa.DataType], counters: Counters) -> None:
        self.schema, self.layout, self.types, self.counters = schema, layout, dict(types), counters
        self._sides: dict[frozenset[str], tuple[Side, Side]] = {}

    def __call__(
        self, contexts: pa.Table, candidates: pa.Table, requests: int, request: NDArray[np.int64]
    ) -> tuple[Batch, NDArray[np.bool_] | None]:
        """``contexts`` of R ``requests``, N ``candidates``, and the request of each -> N rows, and which of them the schema's
        policies leave out. A column of neither is null everywhere. Raises ``RequestError``, and ``RowError`` where a policy
        does not allow a value."""
        of_context, of_candidate = self.sides(frozenset(contexts.column_names))
        crossed = [name for name in of_candidate.columns if name in contexts.column_names]
        for name in crossed:  # a cross of both sides
            candidates = candidates.append_column(name, contexts.column(name).take(pa.array(request)))
        shared = of_context.decode(contexts, self.types, requests)
        own = of_candidate.decode(candidates, self.types, len(request))
        owners = torch.from_numpy(request)
        return self._joined(of_context, shared, of_candidate, own, owners), _dropped(shared, own, request)

    def sides(self, context: frozenset[str]) -> tuple[Side, Side]:
        """How contexts with these columns, and their candidates, are decoded."""
        if context not in self._sides:
            self._check_histories(context)
            shared, own = self._split(context)
            self._sides[context] = self._side(shared), self._side(own)
        return self._sides[context]

    def _split(self, context: frozenset[str]) -> tuple[set[str], set[str]]:
        """Numbers, features and crosses by side; a cross is a context's where all its columns are."""
        keys = [*self.schema.numbers, *self.schema.vectors, *self.layout.keys]
        shared = {key for key in keys if all(column in context for column in self._columns_of(key))}
        return shared, set(keys) - shared

    def _columns_of(self, key: str) -> list[str]:
        names = self.schema.crosses[key].columns if key in self.schema.crosses else [key]
        return [self.schema.column(name) for name in names]

    def _side(self, keys: set[str]) -> Side:
        kept = {name: feature for name, feature in self.schema.features.items() if feature.table or name in keys}
        schema = replace(self.schema, features=kept)
        layout = self.layout.only(keys)
        columns = schema.columns(layout)
        decoder = Decoder(schema, layout, self.types, self.counters, labeled=False)
        return Side(columns, schema, layout, decoder)

    def _check_histories(self, context: frozenset[str]) -> None:
        for name, group in self.schema.histories.items():
            columns = [self.schema.column(key) for key in group]
            apart = [column for column in columns if column not in context]
            if 0 < len(apart) < len(columns):
                raise RequestError(
                    f"history '{name}' has {', '.join(apart)} among the candidates and the rest of it in the context: send all "
                    "its columns on one side"
                )

    def _joined(self, of_context: Side, shared: Columns, of_candidate: Side, own: Columns, request: Tensor) -> Batch:
        context, candidate = of_context.batch(shared), of_candidate.batch(own)
        return replace(
            candidate,
            dense=_dense(self.schema.dense_columns, of_context, context, of_candidate, candidate, request),
            sparse=RequestIds(context.sparse, candidate.sparse, request),
            weighted=RequestIds(context.weighted, candidate.weighted, request) if self.layout.weighted else None,
            sequence=_sequence(context, candidate, request) if self.layout.unpooled else None,
        )


def _sequence(context: Batch, candidate: Batch, request: Tensor) -> RequestIds:
    return RequestIds(context.sequence, candidate.sequence, request)


def _dense(
    names: Sequence[str], of_context: Side, context: Batch, of_candidate: Side, candidate: Batch, request: Tensor
) -> Tensor:
    """[N, D] in the schema's order."""
    dense = candidate.dense.new_empty(len(request), len(names))
    for side, values in ((of_context, context.dense.index_select(0, request)), (of_candidate, candidate.dense)):
        places = [place for place, name in enumerate(names) if name in side.schema.features]
        dense[:, places] = values
    return dense


def _dropped(shared: Columns, own: Columns, request: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    found = [own.dropped] if own.dropped is not None else []
    found += [shared.dropped[request]] if shared.dropped is not None else []
    return np.logical_or.reduce(found) if found else None
