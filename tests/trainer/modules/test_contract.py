"""A slip in a model of a user's own is one line: what, where, how to mend it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data_loaders.schema import Feature, Schema, Table
from trainer.modules.contract import check_built, check_class, check_logits, explained
from trainer.modules.embeddings import bag_configs, build_embedding_bags

SCHEMA = Schema(embedding_dim=4, tables={"user": Table(10)}, features={"user": Feature("sparse", table="user")})
META = torch.device("meta")
LABELS = torch.zeros(3)


class Sound(nn.Module):
    def __init__(self, schema: Schema, *, units: int = 4, device: torch.device) -> None:
        super().__init__()
        self.layout = schema.layout()
        self.head = nn.Linear(4, 1)
        self.bags = build_embedding_bags(bag_configs(schema, list(self.layout.pooled)), device)

    def forward(self, batch):
        return self.head(batch).squeeze(1)


class NoSchema(Sound):
    def __init__(self, *, device: torch.device) -> None: ...


class NoDevice(Sound):
    def __init__(self, schema: Schema, *, units: int = 4) -> None: ...


class NoType(Sound):
    def __init__(self, schema, *, units=4, device) -> None: ...


class Anything(Sound):
    def __init__(self, schema, *, device, **more) -> None: ...


CLASSES = [
    (NoSchema, r"class NoSchema\): its constructor takes no 'schema': write def __init__"),
    (NoDevice, "takes no 'device'"),
    (NoType, "its hyperparameter 'units' has no type"),
    (Anything, r"takes '\*\*more', so that nobody knows its hyperparameters"),
]


@pytest.mark.parametrize(("model_class", "problem"), CLASSES)
def test_a_constructor_that_cannot_be_called(model_class, problem):
    with pytest.raises(ValueError, match=problem):
        check_class("mine.model", model_class)


def without(name):
    model = Sound(SCHEMA, device=META)
    delattr(model, name)
    return model


def changed(name, value):
    model = Sound(SCHEMA, device=META)
    setattr(model, name, value)
    return model


BUILT = [
    (without("layout"), "has no 'layout': set self.layout = schema.layout"),
    (changed("layout", "all"), "has a 'layout' that is of type str"),
    (without("bags"), "has no embedding tables"),
    (changed("head", nn.Linear(2, 1, device=META)), "'head.weight' lies on device 'meta', which is for tables alone"),
]


@pytest.mark.parametrize(("model", "problem"), BUILT)
def test_what_a_built_model_lacks(model, problem):
    with pytest.raises(ValueError, match=rf"^model 'mine.model' \(.*test_contract.py, class Sound\): .*{problem}"):
        check_built("mine.model", model, SCHEMA)


def test_a_layout_names_features_of_the_schema():
    with pytest.raises(ValueError, match="its layout names 'user', which data.schema does not declare"):
        check_built("mine.model", Sound(SCHEMA, device=META), Schema(embedding_dim=4, tables={}, features={}))
    assert check_built("mine.model", Sound(SCHEMA, device=META), SCHEMA) is None
    assert check_class("mine.model", Sound) is Sound


LOGITS = [
    (None, "None: expected one floating-point logit per row, shape \\[3\\]"),
    ((torch.zeros(3),), "something of type tuple"),
    (torch.zeros(3, 1), r"shape \[3, 1\].*end it with .squeeze\(1\)"),
    (torch.zeros(3, 2), r"shape \[3, 2\]"),
    (torch.zeros(()), r"shape \[\]"),
    (torch.zeros(3, dtype=torch.int64), "torch.int64"),
    (torch.zeros(3), "no parameter can learn from"),
]


@pytest.mark.parametrize(("logits", "problem"), LOGITS)
def test_what_are_no_logits(logits, problem):
    with pytest.raises(ValueError, match=rf"the forward of class Sound \(.*test_contract.py\) returns .*{problem}"):
        check_logits(Sound, logits, LABELS, training=True)


def test_logits_of_any_floating_type_that_can_be_learnt():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_logits(Sound, torch.zeros(3, dtype=dtype, requires_grad=True), LABELS, training=True)
        check_logits(Sound, torch.zeros(3, dtype=dtype), LABELS, training=False)


def test_an_error_in_a_users_code_names_its_line():
    def wrong():
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    with (
        pytest.raises(
            ValueError, match=r"model 'mine.model' .* line \d+, in wrong: RuntimeError: mat1 and mat2 shapes"
        ),
        explained("mine.model", Sound, lambda error: False),
    ):
        wrong()
    for name, passes in (("deepfm", False), ("mine.model", True)):  # our own models' bugs keep their traceback
        with pytest.raises(RuntimeError), explained(name, Sound, lambda error, passes=passes: passes):
            wrong()
    with pytest.raises(OSError), explained("mine.model", Sound, lambda error: False):
        Path("/no/such/file").read_text()
