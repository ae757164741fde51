"""Rows written by hand, as a schema and batches: what the tests of the models share.

A row is ``{feature or cross: list of ids, or a number for a dense feature}``; features left out are empty.
"""

import inspect
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import conf
from data_loaders.batch import Batch, Cursor
from data_loaders.schema import Cross, Feature, Layout, Schema, Table
from tests.helpers.rounding import BF16_ROUNDINGS, BF16_UNIT, ROUNDINGS, UNIT, model_tolerance
from trainer.modules.execution import bfloat16

Row = dict[str, Any]


def small_schema() -> Schema:
    """Every kind of feature: a dotted name, a bag, an attended history of two attributes of different widths, a history
    without a target beside it, a summed table, numbers and crosses."""
    return Schema(
        embedding_dim=8,
        tables={
            "user": Table(20),
            "item": Table(30),
            "category": Table(10, embedding_dim=4),
            "tag": Table(12, pooling="sum"),
        },
        features={
            "price": Feature("dense"),
            "user.id": Feature("sparse", table="user"),
            "item_id": Feature("sparse", table="item"),
            "category_id": Feature("sparse", table="category"),
            "tags": Feature("sparse", table="tag"),
            "clicked_items": Feature("sequence", table="item", max_length=6, target="item_id", history="clicked"),
            "clicked_categories": Feature(
                "sequence", table="category", max_length=6, target="category_id", history="clicked"
            ),
            "carted_items": Feature("sequence", table="item", max_length=6),
            "age": Feature("dense"),
        },
        crosses={"user_x_category": Cross(["user.id", "category_id"], 50)},
    )


def one_dim_schema() -> Schema:
    """As ``small_schema``, all tables equally wide."""
    schema = small_schema()
    schema.tables["category"] = Table(10)
    return schema


def random_rows(schema: Schema, count: int, seed: int = 0) -> list[Row]:
    """Single ids that may be missing, bags and histories of 0 to 5 ids; histories of one group are equally long."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        lengths = {name: draw.randrange(6) for name in (*schema.histories, *schema.sequences, "tags")}
        row: Row = {name: draw.gauss(0, 1) for name in schema.dense}
        for key in (*schema.sparse, *schema.sequences, *schema.crosses):
            feature = schema.features.get(key)
            if feature is not None and feature.target:
                length = lengths[feature.history or key]
            else:
                length = lengths[key] if key in lengths else int(draw.random() < 0.9)
            row[key] = [draw.randrange(schema.num_embeddings(key)) for _ in range(length)]
        rows.append(row)
    return rows


def make_batch(
    schema: Schema,
    layout: Layout,
    rows: Sequence[Row],
    *,
    labels: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    normalizer: float | None = None,
    cursor: Cursor | None = None,
) -> Batch:
    count = len(rows)
    dense = [[row.get(name, 0.0) for name in schema.dense] for row in rows]
    return Batch(
        dense=torch.tensor(dense, dtype=torch.float32).reshape(count, len(schema.dense)),
        sparse=keyed_jagged(layout.pooled, rows),
        sequence=keyed_jagged(layout.unpooled, rows) if layout.unpooled else None,
        labels=torch.tensor([float(i % 2) for i in range(count)] if labels is None else labels),
        weights=torch.ones(count) if weights is None else torch.tensor(weights),
        normalizer=torch.tensor(float(count) if normalizer is None else normalizer),
        cursor=cursor or Cursor(0, 1, count, count),
    )


def keyed_jagged(keys: Sequence[str], rows: Sequence[Row]) -> KeyedJaggedTensor:
    bags = [row.get(key, []) for key in keys for row in rows]
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.tensor([i for bag in bags for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int64),
        stride=len(rows),
    )


def randomize(model: nn.Module, seed: int = 0, std: float = 0.5) -> None:
    """Parameters and statistics far from their initial values (zeros would hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for name, buffer in model.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(noise + 0.5 if name.endswith("variance") else noise)


def state(module: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers in float64."""
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def pooled_bag(table: np.ndarray, ids: Sequence[int], pooling: str) -> np.ndarray:
    total = np.zeros(table.shape[1])
    for i in ids:
        total = total + table[i]
    return total / len(ids) if ids and pooling == "mean" else total


def mlp(values: dict[str, np.ndarray], prefix: str, inputs: np.ndarray, activation: str) -> np.ndarray:
    """An MLP of the models on one row, from its parameters; Dice with its moving averages."""
    layer = 0
    while f"{prefix}.layers.{layer}.weight" in values:
        inputs = values[f"{prefix}.layers.{layer}.weight"] @ inputs + values[f"{prefix}.layers.{layer}.bias"]
        inputs = activate(values, f"{prefix}.activations.{layer}", inputs, activation)
        layer += 1
    return values[f"{prefix}.output.weight"] @ inputs + values[f"{prefix}.output.bias"]


def activate(values: dict[str, np.ndarray], prefix: str, inputs: np.ndarray, activation: str) -> np.ndarray:
    if activation == "relu":
        return np.maximum(inputs, 0)
    if activation == "prelu":
        return np.where(inputs > 0, inputs, values[f"{prefix}.weight"] * inputs)
    mean, variance = values[f"{prefix}.moving_mean"], values[f"{prefix}.moving_variance"]
    gate = 1 / (1 + np.exp(-(inputs - mean) / np.sqrt(variance + 1e-8)))
    return gate * inputs + (1 - gate) * values[f"{prefix}.alpha"] * inputs


def check_model(model: nn.Module, schema: Schema, cancelled: Sequence[str] = ()) -> None:
    """What every model owes its callers, on a model with random parameters. ``cancelled``: endings of the names of parameters
    that the logits do not depend on."""
    rows = random_rows(schema, 9, seed=3)
    _check_rows_are_independent(model, schema, rows)
    _check_padding_changes_nothing(model, schema, rows)
    for some in (rows, rows[:1], [{}, {}]):
        _check_gradients(model, schema, some)
    _check_every_parameter_matters(model, schema, rows, tuple(cancelled))
    _check_bf16(model, schema, rows)


def _check_rows_are_independent(model: nn.Module, schema: Schema, rows: list[Row]) -> None:
    """In evaluation each row's logit is its own; in training, statistics are of the batch, in whatever order."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    for training in (True, False):
        model.train(training)
        logits = model(make_batch(schema, model.layout, rows))
        assert logits.shape == (len(rows),) and logits.dtype == torch.float32
        allowed = model_tolerance(model, partial(model, make_batch(schema, model.layout, rows)))
        shuffled = model(make_batch(schema, model.layout, [rows[i] for i in order]))
        torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=allowed)
    alone = torch.cat([model(make_batch(schema, model.layout, [row])) for row in rows])
    torch.testing.assert_close(alone, logits, rtol=0, atol=allowed)
    assert logits.std() > 1e-3


def _check_padding_changes_nothing(model: nn.Module, schema: Schema, rows: list[Row]) -> None:
    model.train()
    logits = model(make_batch(schema, model.layout, rows))
    allowed = model_tolerance(model, partial(model, make_batch(schema, model.layout, rows)))
    weights = [1.0] * len(rows) + [0.0] * 3
    padded = model(make_batch(schema, model.layout, [*rows, {}, {}, {}], weights=weights))
    torch.testing.assert_close(padded[: len(rows)], logits, rtol=0, atol=allowed)
    assert padded.isfinite().all()


def _check_gradients(model: nn.Module, schema: Schema, rows: list[Row]) -> None:
    """Every parameter gets a finite gradient (DistributedDataParallel waits for each), also without a single id."""
    model.train()
    model.zero_grad()
    model(make_batch(schema, model.layout, rows)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def _check_every_parameter_matters(
    model: nn.Module, schema: Schema, rows: list[Row], cancelled: tuple[str, ...]
) -> None:
    """A gradient that is 0 in exact arithmetic is the rounding of what cancels: 0 on one CPU, not on another."""
    _check_gradients(model, schema, rows)
    sizes = {name: float(parameter.grad.abs().max()) for name, parameter in model.named_parameters()}
    rounding = ROUNDINGS * UNIT * max(sizes.values())
    for name, size in sizes.items():
        assert size <= rounding if cancelled and name.endswith(cancelled) else size > 0, name


def _check_bf16(model: nn.Module, schema: Schema, rows: list[Row]) -> None:
    model.eval()
    batch = make_batch(schema, model.layout, rows)
    exact = model(batch).detach()
    allowed = model_tolerance(model, partial(model, batch), BF16_ROUNDINGS * BF16_UNIT)
    with mock.patch.object(model.head, "autocast_dtype", bfloat16):
        rounded = model(batch).detach()
    assert rounded.dtype == torch.float32
    has_layers = any(isinstance(module, nn.Linear) for module in model.modules())  # sums alone stay float32
    assert torch.equal(rounded, exact) != has_layers
    assert not torch.equal(rounded, rounded.bfloat16().float()), "logits have only bf16's digits"
    torch.testing.assert_close(rounded, exact, rtol=0, atol=allowed)


def check_dense_start(model_class: type, schema: Schema, **hyperparameters: Any) -> None:
    """The dense part starts from the seed alone, wherever the tables are."""
    parts = []
    for device in ("cpu", "meta"):
        torch.manual_seed(11)
        model = model_class(schema, **hyperparameters, device=torch.device(device))
        assert {p.device.type for n, p in model.named_parameters() if not n.startswith("head.")} == {device}
        parts.append(model.head.state_dict())
    for name, tensor in parts[0].items():
        torch.testing.assert_close(parts[1][name], tensor, rtol=0, atol=0)


def check_conf(model_class: type, name: str) -> None:
    """``conf/model/<name>.yaml`` shows the constructor's own keys and defaults."""
    parameters = inspect.signature(model_class).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ("schema", "device")}
    path = Path(conf.__file__).parent / "model" / f"{name}.yaml"
    assert yaml.safe_load(path.read_text()) == {"name": name, **defaults}
