"""A dataclass's fields as rows of a page: key, type, default, allowed values, and the docstring under the field; section by
section."""

import ast
import dataclasses
import inspect
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from data_loaders.prepare.declaration import Source
from data_loaders.schema import Feature, Schema, Table
from trainer.config.job import TrainConfig

PROBE, PLACED = "no-such-value", "placed-by-the-probe"
MANDATORY = "???"  # OmegaConf's mark
# What stands for a name of the user's own in a key.
NAMES = {
    "tables": "<table>",
    "features": "<feature>",
    "crosses": "<cross>",
    "by_table": "<table>",
    "sources": "<source>",
    "views": "<view>",
}


@dataclass(frozen=True)
class Key:
    """A row of the page; ``allowed`` is empty where the type says all."""

    path: str
    type: str
    default: str
    allowed: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass. ``introduction``: what its docstring says of the whole."""

    heading: str
    introduction: str
    keys: tuple[Key, ...]


def sections(root: type, prefix: str, done: dict[type, str]) -> Iterator[Section]:
    """A dataclass's own keys, then those of the dataclasses in it; one met before (``done``: its path) is only named.
    Raises ``ValueError`` naming a key without a docstring."""
    done[root] = prefix
    hints, said = typing.get_type_hints(root), field_docstrings(root)
    inherited = [base for base in root.__mro__[1:] if base in done]
    keys, inner = [], []
    for item in dataclasses.fields(root):
        if any(item.name in base.__dataclass_fields__ for base in inherited):
            continue
        path = f"{prefix}.{item.name}" if prefix else item.name
        nested, is_map = _nested(hints[item.name])
        if nested is None:
            if item.name == "model" and root is TrainConfig:
                continue  # free in the dataclass; a section of its own here
            if item.name not in said:
                raise ValueError(
                    f"{root.__module__}.{root.__name__}.{item.name} has no docstring: write one under the field"
                )
            kind, default = _type(hints[item.name]), _default(item)
            keys.append(Key(path, kind, default, allowed(root, item.name), said[item.name]))
            continue
        place = f"{path}.{NAMES[item.name]}" if is_map else path
        if nested in done:
            meaning = said.get(item.name, "")
            keys.append(Key(place, f"as `{done[nested]}`", _changed(item, nested), (), meaning))
        else:
            done[nested] = place
            inner.append((nested, place))
    besides = [f"And all of `{done[base]}`." for base in inherited]
    introduction = markdown((inspect.getdoc(root) or "").partition("\n\nRaises ")[0])
    yield Section(prefix, " ".join((introduction, *besides)).strip(), tuple(keys))
    for nested, place in inner:
        yield from sections(nested, place, done)


def field_docstrings(owner: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those it extends."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(owner.__mro__)):
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0].body
        for node, below in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[node.target.id] = markdown(ast.literal_eval(below.value))
    return found


def markdown(text: str) -> str:
    """A docstring, as it stands in the cell of a table."""
    text = " ".join(text.replace("``", "`").split())
    return re.sub(r"(?<!`)docs/([\w-]+\.md)", r"[\1](\1)", text)


def allowed(owner: type, name: str) -> tuple[str, ...]:
    """The values that ``owner`` names when the field is given one that it does not know (``schema.one_of``)."""
    hint = typing.get_type_hints(owner)[name]
    if "str" not in str(hint):
        return ()
    origin = typing.get_origin(hint)
    value = [PROBE] if origin is list else {PROBE: PROBE} if origin is dict else PROBE
    try:
        _makers().get(owner, owner)(**{name: value})
    except ValueError as error:
        match = re.search(rf"'{PROBE}'.*(?:valid: |choose (?:from )?)(.*)$", str(error))
        values = tuple(re.split(", | or ", match[1])) if match else ()
        return () if PLACED in values else values
    return ()


def _makers() -> dict[type, Callable[..., Any]]:
    """Those that are checked as parts of another."""
    table = Table(num_embeddings=2)

    def feature(**values: Any) -> Schema:
        return Schema(tables={PLACED: table}, features={"f": Feature(**{"kind": "sparse", "table": PLACED, **values})})

    def source(**values: Any) -> None:
        Source(**{"files": ["a"], **values}).check("source")

    return {Table: lambda **values: Schema(tables={PLACED: Table(2, **values)}), Feature: feature, Source: source}


def _nested(hint: Any) -> tuple[type | None, bool]:
    """``(the dataclass that a field holds, whether it is a map of them)``."""
    arguments = typing.get_args(hint)
    is_map = typing.get_origin(hint) is dict
    for candidate in (arguments[1],) if is_map else (hint, *arguments):
        if dataclasses.is_dataclass(candidate):
            return candidate, is_map
    return None, False


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if it is type(None) else _type(it) for it in arguments)
    if origin is list:
        return "list" if arguments[0] is Any else f"list of {_type(arguments[0])}"
    if origin is dict:
        return "map" if arguments[1] is Any else f"map to {_type(arguments[1])}"
    return "any" if hint is Any else hint.__name__


def _default(item: dataclasses.Field) -> str:
    value = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    return "must be given" if value == MANDATORY else f"`{as_yaml(value)}`"


def _changed(item: dataclasses.Field, owner: type) -> str:
    """Where a section met before differs from its class's defaults."""
    if item.default_factory in (dict, owner) or item.default_factory is dataclasses.MISSING:
        return ""
    value, plain = item.default_factory(), owner()
    changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(owner)}
    return ", ".join(f"`{name}: {as_yaml(it)}`" for name, it in changed.items() if it != getattr(plain, name))


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
