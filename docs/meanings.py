"""What a dataclass says of its fields.

A field's meaning is what the class's docstring says of it: from the sentence (or the part before a semicolon) that first
names it, as ``name``, to the next one that names another for the first time; else the comment beside the field. What comes
before is of the class as a whole.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator


class Meanings:
    """What the docstring of ``owner`` says of each field, and of the whole (``introduction``)."""

    def __init__(self, owner: type) -> None:
        self.owner = owner
        self.names = [item.name for item in dataclasses.fields(owner)]
        self.said, self.introduction = attributed(inspect.getdoc(owner) or "", self.names)
        self.comments = _comments(owner)

    def of(self, name: str, otherwise: str | None = None) -> str:
        """Raises ``ValueError`` where nothing is said, unless ``otherwise`` is to stand for it."""
        meaning = self.said.get(name) or self.comments.get(name) or otherwise
        if meaning is None:
            raise ValueError(
                f"{self.owner.__module__}.{self.owner.__name__}.{name} has no meaning: name ``{name}`` in the class's docstring, "
                "or write a comment beside the field"
            )
        return meaning


def attributed(doc: str, names: list[str]) -> tuple[dict[str, str], str]:
    """``(meaning of each field that the docstring names, the rest)``."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    for paragraph in doc.split("\n\n"):
        owners: list[str] = []
        for part in _parts(" ".join(paragraph.split())):
            if part.startswith("Raises "):
                break
            named = [name for name in names if re.search(rf"``{name}(``|: |=)", part)]
            owners = [name for name in named if name not in found] or owners
            for place in [found.setdefault(name, []) for name in owners] or [rest]:
                place.append(part)
    return {name: sentence(" ".join(parts), name) for name, parts in found.items()}, sentence(" ".join(rest), "")


def _parts(text: str) -> Iterator[str]:
    """Sentences, cut also at semicolons; neither inside brackets nor inside ``code``."""
    start, depth, code = 0, 0, False
    for position, letter in enumerate(text):
        if text.startswith("``", position) and not text.startswith("``", position - 1):
            code = not code
        if not code:
            depth += (letter in "(") - (letter in ")")
        after = text[position + 1 : position + 3]
        ends = letter == ";" or (letter == "." and (after[1:].isupper() or after[1:] == "`"))
        if ends and after.startswith(" ") and not depth and not code:
            yield text[start : position + 1]
            start = position + 2
    if text[start:]:
        yield text[start:]


def sentence(text: str, name: str) -> str:
    """As it stands in a cell: without the field's own name before a colon, in Markdown, ending in a full stop."""
    text = text.removeprefix(f"``{name}``: ").replace("``", "`").rstrip(";.,")
    text = re.sub(r"(?<!`)docs/([\w-]+\.md)", r"[\1](\1)", text)
    first = text[:1].upper() if text[:1].isascii() else text[:1]  # λ stays λ
    return first + text[1:] + "." if text else ""


def _comments(owner: type) -> dict[str, str]:
    """Comments beside fields, from the source."""
    lines = inspect.getsource(owner).splitlines()
    body = ast.parse(inspect.cleandoc("\n".join(lines))).body[0]
    assert isinstance(body, ast.ClassDef)
    beside = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            if comment:
                beside[node.target.id] = sentence(comment, "")
    return beside
