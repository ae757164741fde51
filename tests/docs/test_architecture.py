"""The maps of README.md and docs/architecture.md show every room, and the files they link hold the names they say."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "architecture.md"
ROOMS = {path.parent.name for path in (REPOSITORY / "trainer").glob("*/__init__.py")}
STEPS = [
    step
    for section in PAGE.read_text().split("\n## Adding ")[1:]
    for step in re.split(r"\n(?:\d\.|\*) ", section)
    if "](../" in step
]


def named(text):
    """What stands in the first column of the tables in ``text``."""
    cells = re.findall(r"^\| ((?:`\w+/?`(?:, )?)+) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)]


def test_both_maps_show_every_room():
    readme = (REPOSITORY / "README.md").read_text().partition("**`trainer/`**")[2].partition("**`data_loaders/`**")[0]
    assert set(named(readme)) == ROOMS
    assert set(named(PAGE.read_text().partition("## The rooms")[2].partition("\n## ")[0])) == ROOMS


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.split("\n")[0][:40])
def test_a_linked_file_holds_the_names(step):
    linked = [(PAGE.parent / link) for link in re.findall(r"\]\((\.\./[^)#]+)\)", step)]
    text = " ".join(path.read_text() for path in linked if path.is_file())
    names = [name for name in re.findall(r"`(\w+)`", step) if not name.islower() or "_" in name]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
