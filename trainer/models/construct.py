"""A model by its name, with its tables on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import load_model_class
from trainer.modules import contract
from trainer.modules.execution import PLAIN, Execution, executed_by
from trainer.modules.head import Head


def build_model(model: Mapping[str, Any], schema: Schema, seed: int, execution: Execution = PLAIN) -> nn.Module:
    """The model with its tables on meta (no memory) and its dense layers initialised from ``seed`` alone."""
    torch.manual_seed(seed)
    hyperparameters = {key: value for key, value in model.items() if key != "name"}
    model_class = load_model_class(model["name"])
    with contract.explained(model["name"], model_class), executed_by(execution):
        built = model_class(schema, **hyperparameters, device=torch.device("meta"))
        if schema.vectors:
            read_vectors(model["name"], built, schema)
    contract.check_built(model["name"], built, schema)
    return built


def read_vectors(name: str, model: nn.Module, schema: Schema) -> None:
    """Raises ``UserError`` for a model without a ``Head``."""
    heads = [module for module in model.modules() if isinstance(module, Head)]
    if not heads:
        raise UserError(
            f"{contract.place(name, type(model))}: it has no Head (trainer.modules.head), which makes vectors into dense inputs: "
            f"use one, or leave {', '.join(schema.vectors)} out of schema.features"
        )
    for head in heads:
        head.read_vectors(schema)
