"""What every model of conf/model promises in one process; tests/trainer/models/test_contract_ranks.py has the rest."""

from pathlib import Path

import pytest

import conf
from tests.helpers.samples import check_conf, check_dense_start, check_model, one_dim_schema, randomize
from trainer.models import load_model_class
from trainer.models.construct import build_model

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_padding_and_precision(name):
    """Shapes, finite, gradients everywhere; a batch of one, rows without ids, empty histories."""
    model = build_model({"name": name}, one_dim_schema(), seed=1)
    model.to_empty(device="cpu")
    randomize(model)
    check_model(model, one_dim_schema())


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_part_starts_from_the_seed_and_the_conf_shows_the_defaults(name):
    check_dense_start(load_model_class(name), one_dim_schema())
    check_conf(load_model_class(name), name)
