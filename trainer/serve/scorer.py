"""Scores and ranks with an exported model.

Shapes: N candidates.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from data_loaders.column_decoders import Counters
from data_loaders.schema import Schema
from trainer.serve import requests
from trainer.serve.artifact import Artifact
from trainer.serve.features import Features
from trainer.serve.model import load_model, load_tables
from trainer.serve.versions import current

BLOCK = 1 << 14  # rows that are scored at a time, offline


@dataclass(frozen=True)
class Request:
    """One context, a table of one row, and N candidates."""

    context: pa.Table
    candidates: pa.Table


class Scorer:
    """An export in memory, of a run called ``name``. One thread scores at a time.

    ``scorer = Scorer.load("exports/shop")``; ``scorer.score(context, candidates)`` gives probabilities,
    ``scorer.rank(context, candidates, top=10)`` the best candidates, both of one request: ``context`` maps columns to values,
    ``candidates`` columns to lists.
    """

    def __init__(
        self,
        schema: Schema,
        model: nn.Module,
        types: Mapping[str, pa.DataType],
        *,
        correction: float = 0.0,
        name: str = "model",
        version: str = "",
    ) -> None:
        self.model, self.types, self.correction = model, dict(types), correction
        self.name, self.version = name, version
        self.counters = Counters()
        self.features = Features(schema, model.layout, self.types, self.counters)

    @classmethod
    def load(cls, export: Path | str) -> "Scorer":
        """The version that ``current.json`` of an export folder names, or a version's own folder. Raises ``UserError``."""
        return cls.open(Artifact(current(Path(export))))

    @classmethod
    def open(cls, artifact: Artifact) -> "Scorer":
        config, folder = artifact.config, artifact.path
        model = load_model(config, load_tables(folder, artifact.tables), folder)
        return cls(
            config.data.schema,
            model,
            artifact.types,
            correction=artifact.serving["correction"],
            name=artifact.serving["run"],
            version=artifact.version,
        )

    def score(self, context: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]) -> NDArray[np.float32]:
        """Probabilities [N]; NaN for a candidate that a policy of the schema leaves out. Raises ``UserError`` for columns or
        values that the schema does not allow."""
        (logits,) = self.logits([self.request(context, candidates)])
        return probabilities(logits)

    def rank(
        self, context: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]], top: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The numbers of the ``top`` best candidates (all), best first, and their probabilities; see ``order``."""
        scores = self.score(context, candidates)
        best = order(scores)[:top]
        return best, scores[best]

    def request(self, context: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]) -> Request:
        """From JSON's values. Raises ``RequestError``."""
        _check_apart(context, candidates)
        return Request(
            requests.row_of(context, self.types, "context"), requests.table_of(candidates, self.types, "candidates")
        )

    def request_of_tables(self, context: pa.Table, candidates: pa.Table) -> Request:
        """From Arrow tables, the context's of one row or without columns. Raises ``RequestError``."""
        _check_apart(context.column_names, candidates.column_names)
        return Request(
            requests.cast(context, self.types, "context"), requests.cast(candidates, self.types, "candidates")
        )

    def logits(self, batch: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Of the candidates of each request; NaN where a row is left out. All have the same columns in their contexts, and
        among their candidates."""
        counts = [request.candidates.num_rows for request in batch]
        owners = np.repeat(np.arange(len(batch)), counts)
        contexts = pa.concat_tables([request.context for request in batch])
        candidates = pa.concat_tables([request.candidates for request in batch])
        found = self._logits(contexts, candidates, len(batch), owners)
        return np.split(found, np.cumsum(counts)[:-1])

    def logits_of_rows(self, table: pa.Table) -> NDArray[np.float32]:
        """Of rows that each stand alone."""
        nothing = pa.table({})
        blocks = [table.slice(begin, BLOCK) for begin in range(0, table.num_rows, BLOCK)]
        found = [self._logits(nothing, block, 1, np.zeros(block.num_rows, np.int64)) for block in blocks]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    @torch.inference_mode()
    def _logits(
        self, contexts: pa.Table, candidates: pa.Table, requests: int, owners: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        if not len(owners):
            return np.empty(0, np.float32)
        features, dropped = self.features(contexts, candidates, requests, owners)
        logits = (self.model(features).float() + self.correction).numpy()
        return logits if dropped is None else np.where(dropped, np.nan, logits).astype(np.float32)


def _check_apart(context: Iterable[str], candidates: Collection[str]) -> None:
    both = [name for name in context if name in candidates]
    if both:
        raise requests.RequestError(f"{', '.join(both)}: in the context and among the candidates: give one of them")


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def order(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Best first; equal ones in the order in which they came, those left out (NaN) last."""
    return np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
