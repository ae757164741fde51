"""docs/keys.md names every key of the dataclasses, with a meaning, and is what they say today."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from data_loaders.schema import POLICIES, Feature
from docs import keys, sections
from launch.sweep.options import SweepConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.checks import BEST
from trainer.config.sharding import SHARDING_TYPES, ShardingConfig

PAGE = Path(keys.__file__).with_name("keys.md")


@dataclass
class Base:
    inherited: int = 0
    """Of the ``base``."""


@dataclass
class Undocumented(Base):
    said: int = 0
    """Longer than
    a line; docs/seeing.md."""
    forgotten: int = 0


def leaves(tree, prefix=""):
    """The keys that OmegaConf finds in a structured configuration; maps of one's own names are leaves, and empty."""
    for name in tree:
        value = tree._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name)


def test_the_page_is_current():
    assert PAGE.read_text() == keys.page(), "run: python -m docs.keys > docs/keys.md"


@pytest.mark.parametrize(
    ("config", "prefix"), [(root, prefix) for *_, roots in keys.parts() for _, root, prefix in roots]
)
def test_every_key_has_a_row(config, prefix):
    found = [f"{prefix}.{key}".removeprefix(".") for key in leaves(OmegaConf.structured(config))]
    rows = {line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    inside = (
        "model",
        "data.synthetic",
        "optim.wide.",
        "optim.dense.schedule.",
        "examples.",
    )  # sections met before, or free
    missing = [key for key in found if not any(row == key or row.startswith((f"{key}.", f"{key}.<")) for row in rows)]
    assert found and [key for key in missing if not key.startswith(inside)] == []


def test_a_field_without_a_docstring_is_named():
    said = {"inherited": "Of the `base`.", "said": "Longer than a line; [seeing.md](seeing.md)."}
    assert sections.field_docstrings(Undocumented) == said
    with pytest.raises(ValueError, match=r"test_keys\.Undocumented\.forgotten has no docstring"):
        list(sections.sections(Undocumented, "x", {}))


def test_allowed_values_are_those_that_the_check_names():
    assert sections.allowed(CheckpointConfig, "best") == BEST
    assert sections.allowed(ShardingConfig, "types") == sections.allowed(ShardingConfig, "by_table") == SHARDING_TYPES
    assert sections.allowed(SweepConfig, "method") == ("grid", "optuna")
    assert sections.allowed(Feature, "on_null") == POLICIES
    assert sections.allowed(Feature, "table") == sections.allowed(Feature, "column") == ()


def test_a_section_met_twice_stands_once():
    text = PAGE.read_text()
    assert "| `optim.wide` | as `optim.tables` | `name: adagrad` | Tables of the linear part. |" in text
    assert "### `optim.by_table.<table>`" not in text and text.count("`optim.tables.mini_batch_l2`") == 1
