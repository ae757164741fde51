"""What an evaluation's ranking qualities need beside its rows: how often items are in the training data, and their vectors."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from data_loaders.errors import UserError
from data_loaders.group_ids import rows_by_group_id, table_rows_by_group_id
from data_loaders.manifest import Manifest
from data_loaders.schema import Schema
from trainer.checkpoint import Reader
from trainer.config.evaluation import QualitiesConfig
from trainer.metrics.qualities import ItemFacts
from trainer.metrics.shuffle_by_key import Rows
from trainer.run import build
from trainer.run.load import LoadedRun

SLAB_BYTES = 1 << 26


def item_facts(options: QualitiesConfig, trained: LoadedRun, manifest: Manifest) -> ItemFacts:
    """``manifest``: the rows that are evaluated. Raises ``UserError``, on every rank alike."""
    data, found = trained.config.data, ItemFacts()
    if not options.item:
        return found
    if options.novelty:
        try:
            train = build.scan(data, "train", trained.layout)
            train.check_columns([options.item])
        except ValueError as error:
            raise UserError(f"evaluation.qualities.novelty counts the items of data.train: {error}") from None
        found = ItemFacts(partial(training_rows, train, options.item, trained))
    if options.cosine:
        feature = feature_of(options.item, data.schema)
        find = partial(item_vectors, trained, manifest, feature)
        found = ItemFacts(found.trained, find)
    return found


def feature_of(column: str, schema: Schema) -> str:
    """The feature that looks the column up in a table."""
    for name, feature in schema.features.items():
        if feature.kind == "sparse" and schema.column(name) == column:
            return name
    raise UserError(
        f"evaluation.qualities.cosine compares rows of a table, but no sparse feature reads column '{column}' "
        "(evaluation.qualities.item)"
    )


def training_rows(train: Manifest, column: str, trained: LoadedRun) -> Rows:
    """[U, 2]: rows and item, of this rank's share of the training data."""
    ids, counts = rows_by_group_id(train, column, trained.ranks.rank, trained.ranks.world_size)
    return np.stack([counts, ids], axis=1)


def item_vectors(trained: LoadedRun, manifest: Manifest, feature: str, items: NDArray[np.int64]) -> NDArray[np.float64]:
    """[U, D] of group ids [U]; zeros for an item without a row in the table."""
    schema = trained.config.data.schema
    ids, rows = table_rows_by_group_id(manifest, schema, feature)
    wanted = rows[np.searchsorted(ids, items)]
    return table_rows(Reader(trained.checkpoint), f"tables/{schema.features[feature].table}/weight", wanted)


def table_rows(reader: Reader, name: str, wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """The rows ``wanted`` [U] of a tensor, zeros for -1: a slab is read where one of them lies."""
    dim = reader.shape(name)[1]
    found, step = np.zeros((len(wanted), dim)), max(1, SLAB_BYTES // (4 * dim))
    order = np.argsort(wanted, kind="stable")
    order = order[wanted[order] >= 0]
    for slab in np.split(order, np.flatnonzero(np.diff(wanted[order] // step)) + 1):
        if len(slab):
            first, last = int(wanted[slab[0]]), int(wanted[slab[-1]])
            read = reader.read(name, (first, 0), (last + 1 - first, dim)).to(torch.float64).numpy()
            found[slab] = read[wanted[slab] - first]
    return found
