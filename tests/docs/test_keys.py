"""docs/keys.md names every key of the dataclasses, with a meaning, and is what they say today."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from data_loaders.schema import POLICIES, Feature
from docs import keys, sections
from docs.meanings import Meanings, attributed
from launch.sweep.options import SweepConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.checks import BEST
from trainer.config.sharding import SHARDING_TYPES, ShardingConfig

PAGE = Path(keys.__file__).with_name("keys.md")


@dataclass
class Undocumented:
    """``said``: in the docstring."""

    said: int = 0
    beside: int = 0  # in a comment
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


def test_a_field_without_a_meaning_is_named():
    meanings = Meanings(Undocumented)
    assert meanings.of("said") == "In the docstring." and meanings.of("beside") == "In a comment."
    with pytest.raises(ValueError, match=r"test_keys\.Undocumented\.forgotten has no meaning"):
        meanings.of("forgotten")


def test_a_sentence_belongs_to_the_fields_it_is_the_first_to_name():
    doc = """All of it. ``a`` and ``b=2`` go together (not; here). They do, as ``a`` says; ``c``: alone.

    Nothing of ``d`` in this one. Raises ``ValueError``. ``e`` is too late."""
    found, rest = attributed(doc, ["a", "b", "c", "d", "e"])
    together = "`a` and `b=2` go together (not; here). They do, as `a` says."
    assert found == {"a": together, "b": together, "c": "Alone.", "d": "Nothing of `d` in this one."}
    assert rest == "All of it."


def test_allowed_values_are_those_that_the_check_names():
    assert sections.allowed(CheckpointConfig, "best") == BEST
    assert sections.allowed(ShardingConfig, "types") == sections.allowed(ShardingConfig, "by_table") == SHARDING_TYPES
    assert sections.allowed(SweepConfig, "method") == ("grid", "optuna")
    assert sections.allowed(Feature, "on_null") == POLICIES
    assert sections.allowed(Feature, "table") == sections.allowed(Feature, "column") == ()


def test_a_section_met_twice_is_told_once():
    text = PAGE.read_text()
    assert "| `optim.wide` | as `optim.tables` | `name: adagrad` |" in text
    assert "### `optim.by_table.<table>`" not in text and text.count("`optim.tables.mini_batch_l2`") == 1
