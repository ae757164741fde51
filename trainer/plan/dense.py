"""What the dense part of a model costs, found by running it: a small batch of the schema's own kind goes through the model
on this CPU, with tables of a few rows, and what backward keeps and computes is counted.

Both grow with the rows of a batch B as ``a + b B``; two batches give a and b.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch, Cursor
from data_loaders.schema import Layout, Schema
from trainer.config.job import TrainConfig
from trainer.models import load_model_class
from trainer.models.construct import read_vectors
from trainer.modules.execution import Execution, executed_by
from trainer.modules.task import ClickTask

ROWS = (32, 96)
FEW = 8  # rows of a table
IN_FLIGHT = 2  # gradients of the largest activation, that of its input beside that of its output


@dataclass(frozen=True)
class DenseCost:
    """Of ``rows`` rows: ``activations`` in bytes, kept from forward to backward, and ``operations`` of both."""

    activations: float
    operations: float


class DensePart:
    """The dense part of the configured model; ``cost(rows)`` of a rank's batch."""

    def __init__(self, config: TrainConfig, lengths: dict[str, float], execution: Execution) -> None:
        schema = _small(config.data.schema)
        hyperparameters = {key: value for key, value in config.model.items() if key != "name"}
        with executed_by(execution):
            model = load_model_class(config.model["name"])(schema, **hyperparameters, device=torch.device("cpu"))
            if schema.vectors:
                read_vectors(config.model["name"], model, schema)
        task = ClickTask(model, label_smoothing=config.loss.label_smoothing)
        self._few, self._more = (_measure(task, _batch(schema, model.layout, lengths, rows)) for rows in ROWS)

    def cost(self, rows: int) -> DenseCost:
        share = (rows - ROWS[0]) / (ROWS[1] - ROWS[0])
        return DenseCost(
            self._few.activations + share * (self._more.activations - self._few.activations),
            self._few.operations + share * (self._more.operations - self._few.operations),
        )


def _small(schema: Schema) -> Schema:
    """The same features over tables of a few rows."""
    tables = {name: replace(table, num_embeddings=FEW, dtype="fp32") for name, table in schema.tables.items()}
    features = {name: replace(feature, missing_id=None) for name, feature in schema.features.items()}
    crosses = {name: replace(cross, num_buckets=FEW) for name, cross in schema.crosses.items()}
    return replace(schema, tables=tables, features=features, crosses=crosses)


def _batch(schema: Schema, layout: Layout, lengths: dict[str, float], rows: int) -> Batch:
    def jagged(keys: tuple[str, ...], *, weighted: bool = False) -> KeyedJaggedTensor:
        counts = [int(lengths.get(key, 1)) for key in keys]
        return KeyedJaggedTensor(
            keys=list(keys),
            values=torch.arange(rows * sum(counts)) % FEW,
            weights=torch.ones(rows * sum(counts)) if weighted else None,
            lengths=torch.tensor(counts, dtype=torch.int64).repeat_interleave(rows),
            stride=rows,
        )

    return Batch(
        dense=torch.ones(rows, len(schema.dense_columns)),
        sparse=jagged(layout.plain),
        weighted=jagged(layout.weighted, weighted=True) if layout.weighted else None,
        sequence=jagged(layout.unpooled) if layout.unpooled else None,
        labels=(torch.arange(rows) % 2).float(),
        weights=torch.ones(rows),
        normalizer=torch.tensor(float(rows)),
        cursor=Cursor(0, 1, rows, rows),
    )


def _measure(task: nn.Module, batch: Batch) -> DenseCost:
    known = {tensor.untyped_storage().data_ptr() for tensor in (*task.parameters(), *task.buffers())}
    kept: dict[int, Tensor] = {}  # holds them, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    task.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = task(batch)
        loss.backward()
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known]
    return DenseCost(sum(sizes) + IN_FLIGHT * max(sizes, default=0), counter.get_total_flops())
