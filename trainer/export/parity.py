"""Whether an export scores as the model it was made from: on held-out rows, by logit, AUC and log loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from data_loaders.column_decoders import Counters, Label, Source, Weight
from data_loaders.manifest import Manifest
from data_loaders.reader import Handle, RowGroups
from data_loaders.schema import Schema
from trainer.metrics.click_metrics import ClickMetrics
from trainer.serve.scorer import Scorer

READ_ROWS = 1 << 14


@dataclass(frozen=True)
class Parity:
    """Over ``rows``: the largest difference of a logit, and AUC and log loss of the reference and of the export."""

    rows: int
    largest: float
    auc: tuple[float | None, float | None]
    logloss: tuple[float | None, float | None]

    @property
    def auc_loss(self) -> float:
        """How much AUC the export costs; 0 where there is none (one class only)."""
        before, after = self.auc
        return 0.0 if before is None or after is None else before - after


def compare(reference: Scorer, export: Scorer, tables: Iterator[pa.Table], schema: Schema) -> Parity:
    """Scores ``tables`` of held-out rows with both."""
    sums = ClickMetrics(), ClickMetrics()
    largest, rows = 0.0, 0
    for table in tables:
        labels, weights = labels_of(table, schema)
        found = [scorer.logits_of_rows(table) for scorer in (reference, export)]
        counted = ~np.isnan(found[0]) & (weights > 0)
        rows += int(counted.sum())
        if counted.any():
            largest = max(largest, float(np.abs(found[0] - found[1])[counted].max()))
        for metrics, logits in zip(sums, found):
            metrics.update(*(torch.from_numpy(part[counted]) for part in (logits, labels, weights)))
    before, after = (metrics.compute() for metrics in sums)
    return Parity(rows, largest, (before["auc"], after["auc"]), (before["logloss"], after["logloss"]))


def labels_of(table: pa.Table, schema: Schema) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Labels and weights [rows]; weight 0 for a row that a policy leaves out."""
    source = Source(table, 0)
    labels, weights = np.zeros(table.num_rows, np.float32), np.ones(table.num_rows, np.float32)
    Label(schema, Counters()).decode(source, labels)
    if schema.weight:
        Weight(schema.weight).decode(source, weights)
    if source.dropped is not None:
        weights[source.dropped] = 0
    return labels, weights


def read_rows(manifest: Manifest, columns: Sequence[str], most: int) -> Iterator[pa.Table]:
    """The first ``most`` rows, in tables."""
    groups, handle = RowGroups(manifest, list(columns), set()), Handle()
    for number in range(groups.count):
        for table in groups.read(number, READ_ROWS, handle):
            yield table.slice(0, most)
            most -= min(most, table.num_rows)
            if not most:
                return
