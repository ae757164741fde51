"""What docs/train.md says there is to choose from is what there is."""

import re
from pathlib import Path

from trainer.config.optim import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "train.md").read_text()


def row(key):
    """What the table of choices names behind ``key``, word by word."""
    (found,) = re.findall(rf"^\| `{re.escape(key)}`[^|]*\|(.*)\|$", PAGE, re.MULTILINE)
    return re.findall(r"\b[a-z_0-9]+\b", found.replace("\\|", " "))


def names(group):
    return {path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml")}


def test_choices():
    assert names("model") <= set(row("model=")) and names("data") <= set(row("data="))
    assert set(DENSE_OPTIMIZERS) <= set(row("optim.dense"))
    assert set(TABLE_OPTIMIZERS) <= set(row("optim.tables"))
