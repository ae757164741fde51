"""Every message that docs/troubleshooting.md quotes is one that the program prints."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
SHORTEST = 10  # letters of a quotation, so that it does not occur by chance


def quotations():
    """The first piece of code in each row of the tables of messages."""
    tables = PAGE.read_text().split("| message |")[1:]
    return [found[1] for table in tables for found in re.finditer(r"^\| `([^`]+)`", table, re.MULTILINE)]


def literals(source):
    """A module's strings, as they are printed: what is filled in becomes …, adjacent literals are one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w+\}", "…", node.value)  # str.format's fields
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


@cache
def printed():
    files = [REPOSITORY / "requirements" / "install.py"]
    files += [path for top in ("trainer", "data_loaders", "launch") for path in (REPOSITORY / top).rglob("*.py")]
    found = [text for path in files for text in literals(path.read_text())]
    return "\n\0\n".join([*found, (REPOSITORY / "Makefile").read_text()])


def occurs(quotation, text):
    """Whether one string holds the quotation's parts in order."""
    return re.search("[^\0]*".join(map(re.escape, quotation.split("…"))), text) is not None


def test_the_page_quotes_many_messages():
    found = quotations()
    assert len(found) > 50 and len(set(found)) == len(found)
    assert [it for it in found if len(it.replace("…", "").replace(" ", "")) < SHORTEST] == []


@pytest.mark.parametrize("quotation", quotations())
def test_a_quoted_message_is_in_the_source(quotation):
    assert occurs(quotation, printed()), "the message has changed: correct docs/troubleshooting.md"


def test_a_quotation_does_not_reach_into_another_string():
    text = "\n\0\n".join(literals('f"a {b} of" "fers"; "its own"'))
    assert occurs("a … offers", text) and not occurs("a … own", text)
