"""YAML that a person wrote or a run recorded, read so that no file can hang the reader, run code, or mean two things.

The one reader of YAML. A first pass over the parser's events, which takes no memory to speak of, refuses what is too large,
nested too deeply, multiplied by aliases ("billion laughs"), tagged (``!!python/…``) or given twice; every mistake is one line
with file, line and remedy. Numbers are read as OmegaConf reads them: ``1e-3`` is one, a date is text.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_loaders.errors import UserError

MAX_BYTES = 8 << 20
MAX_DEPTH = 50
MAX_REPEATED = 100_000  # nodes that aliases may add
_FLOAT = re.compile(
    r"""^(?:[-+]?\d+(?:_\d+)*\.[\d_]*(?:[eE][-+]?\d+)?
    |[-+]?\d+(?:_\d+)*[eE][-+]?\d+
    |\.\d+(?:_\d+)*(?:[eE][-+]?\d+)?
    |[-+]?\d+(?:_\d+)*(?::[0-5]?\d)+\.[\d_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FAST_STRINGS = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
# A parser's words -> ours.
_REASONS = (
    (
        r"cannot start any token",
        "no value begins with this character: quote values such as '@x', and indent with spaces",
    ),
    (r"mapping values are not allowed", "a ':' where none is expected: quote the value, or correct the indentation"),
    (r"sequence entries are not allowed", "a '- ' where none is expected: begin a new line for it"),
    (r"alias", "'*' begins an alias, and there is none of this name: quote a text such as '*.parquet'"),
    (
        r"block (mapping|collection|end)|expected '-'",
        "the indentation does not fit the lines above, or a quote is missing",
    ),
    (r"could not find expected ':'", "a key without ': ' and a value, or a quote that is not closed"),
    (r"flow|node content", "a '[' or '{' that is not closed, a ',' too many, or a '${…}' between them without quotes"),
    (r"quoted scalar|unexpected end of stream", "a quote that is not closed"),
    (r"special characters|control characters", "a character that no text file holds: save it as plain UTF-8 text"),
    (r"another document|single document|document start", "a second document ('---'): put it into a file of its own"),
    (r"merg", "'<<' of what is no map: name one, as in <<: *anchor"),
)


class _Loader(_FAST):  # type: ignore[misc, valid-type] # which class it is, PyYAML's build decides
    """Scalars as in OmegaConf. A key is a word, even where YAML would take it for a truth value (``on: [user]``)."""

    yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in _FAST.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)  # first, as the keys that '<<' brings are words too
        pairs = [(_word(key), value) for key, value in node.value]
        return super().construct_mapping(yaml.MappingNode(node.tag, pairs, node.start_mark), deep=deep)


def _word(key: yaml.Node) -> yaml.Node:
    if key.tag.endswith((":bool", ":null")):
        return yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark)
    return key


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read(path: Path) -> Any:
    """What a file says; None where it says nothing. Raises ``UserError``."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A small text file, UTF-8. Raises ``UserError``."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB: a configuration file is not; correct the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8 text: save the file as UTF-8") from None


def parse(text: str, where: str, *, strings: bool = False) -> Any:
    """``where`` is what messages call the text. ``strings``: every scalar as it is written. Raises ``UserError``."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is larger than {MAX_BYTES >> 20} MiB: shorten it")
    try:
        _check(text)
        return yaml.load(text, _FAST_STRINGS if strings else _Loader)
    except yaml.YAMLError as error:
        raise UserError(_explain(error, text, where)) from None
    except _Refused as refused:
        raise UserError(f"{where}, line {refused.line}: {refused}") from None
    except (ValueError, OverflowError):  # int() of ten thousand digits
        raise UserError(f"{where} holds a number that is too long: correct it, or quote it") from None


class _Refused(Exception):
    """YAML that is not taken here."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass
class _Open:
    """A list or map whose end has not come yet. ``nodes``: in it so far, aliases written out."""

    is_map: bool
    anchor: str | None
    nodes: int = 1
    children: int = 0
    keys: set[str] = field(default_factory=set)

    def take(self, anchor: str | None, nodes: int, sizes: dict[str, int]) -> None:
        """A child that is whole."""
        self.nodes += nodes
        self.children += 1
        if anchor is not None:
            sizes[anchor] = nodes


def _check(text: str) -> None:
    """Raises ``_Refused``."""
    sizes: dict[str, int] = {}  # of what an anchor names
    repeated, path = 0, [_Open(is_map=False, anchor=None)]
    for event in yaml.parse(text, _FAST):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionEndEvent):
            done = path.pop()
            path[-1].take(done.anchor, done.nodes, sizes)
            continue
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)  # an alias of what is still open is refused by the constructor
            if any(event.anchor == outer.anchor for outer in path):
                raise _Refused(line, f"*{event.anchor} stands within what it names: write it out")
            repeated += size
            if repeated > MAX_REPEATED:
                raise _Refused(line, f"aliases such as *{event.anchor} repeat too much: write out what is meant")
            _take_key(path[-1], None, line)
            path[-1].take(None, size, sizes)
        elif isinstance(event, yaml.NodeEvent):
            _check_tag(event, line)
            scalar = isinstance(event, yaml.ScalarEvent)
            _take_key(path[-1], event if scalar else None, line)
            if scalar:
                path[-1].take(event.anchor, 1, sizes)
                continue
            path.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))
            if len(path) > MAX_DEPTH:
                raise _Refused(line, f"lists and maps are nested more than {MAX_DEPTH} deep: that is no configuration")


def _take_key(parent: _Open, event: yaml.ScalarEvent | None, line: int) -> None:
    """A map's children are keys and values in turn."""
    if not parent.is_map or parent.children % 2:
        return
    if event is None:
        raise _Refused(line, "a key that is a list, a map or an alias: keys are plain words")
    key = event.value
    if key in parent.keys:
        raise _Refused(line, f"the key '{key}' is given twice: leave one of them out")
    parent.keys.add(key)


def _check_tag(event: yaml.NodeEvent, line: int) -> None:
    tag = getattr(event, "tag", None)
    if tag not in (None, "!"):
        short = tag.replace("tag:yaml.org,2002:", "!!")
        raise _Refused(line, f"the tag {short} names a type, which plain YAML does not: leave it out")


def _explain(error: yaml.YAMLError, text: str, where: str) -> str:
    problem = " ".join(str(part) for part in (getattr(error, "context", ""), getattr(error, "problem", error)) if part)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark else text[: getattr(error, "position", 0)].count("\n") + 1
    lines = text.splitlines()
    line = max(1, min(line, len(lines)))  # an end that comes too soon is seen behind it
    if any("\t" in shown[: len(shown) - len(shown.lstrip())] for shown in lines[max(0, line - 2) : line]):
        return f"{where}, line {line}: a tab: indent with spaces"
    reason = next((ours for theirs, ours in _REASONS if re.search(theirs, problem)), None)
    return f"{where}, line {line}: {reason or 'this is no YAML: check quotes, brackets and indentation'}"
