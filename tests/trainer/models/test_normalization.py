"""Every model with an MLP takes ``model.normalization``, and keeps what it owes its callers (``samples.check_model``)."""

import inspect
from pathlib import Path

import pytest
import torch

import conf
from tests.helpers.samples import check_model, one_dim_schema, randomize
from trainer.models import load_model_class
from trainer.modules.mlp import MLP
from trainer.modules.normalization import BatchNorm, LayerNorm

NAMES = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))


def built(name, **hyperparameters):
    torch.manual_seed(0)
    schema = one_dim_schema()
    return load_model_class(name)(schema, **hyperparameters, device=torch.device("cpu")), schema


def test_a_model_has_the_option_where_it_has_an_mlp():
    for name in NAMES:
        model, _ = built(name, **({"hidden_units": [8]} if name == "autoint" else {}))
        has_mlp = (
            any(isinstance(module, MLP) for module in model.modules()) and name != "masknet"
        )  # normalised as it is
        assert ("normalization" in inspect.signature(load_model_class(name)).parameters) == has_mlp, name


@pytest.mark.parametrize("normalization", ["batch", "layer"])
@pytest.mark.parametrize(
    "name", [n for n in NAMES if "normalization" in inspect.signature(load_model_class(n)).parameters]
)
def test_a_normalised_model_keeps_its_promises(name, normalization):
    # Two hidden layers: of FinalMLP one in each network, whose last layer is its output.
    units = {"first_units": [8, 4], "second_units": [6, 4]} if name == "finalmlp" else {"hidden_units": [8, 4]}
    model, schema = built(name, **units, normalization=normalization)
    kind = BatchNorm if normalization == "batch" else LayerNorm
    found = [module for module in model.modules() if isinstance(module, (BatchNorm, LayerNorm))]
    assert len(found) == 2 and all(isinstance(module, kind) for module in found)
    randomize(model)
    check_model(model, schema)
