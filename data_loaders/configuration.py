"""Interpolations ``${…}`` of YAML and the command line: resolved, recorded and explained. With ``prepare.compose`` the only
module of ``data_loaders`` that knows OmegaConf.

A value from the environment is recorded as its interpolation (``${oc.env:NAME}``), by whichever way it came: within a
text, through another key, as a default. For that the resolver of ``oc.env`` is ours: it counts the answers it gives.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from omegaconf.resolvers import oc

from data_loaders import safe_yaml, secrets
from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.typed import check, shown

LONGEST = 1 << 20  # characters and nodes of all interpolations, written out
_REFERENCE = re.compile(r"[\w.\[\]-]+")
_ABSENT = "<no such variable>"


class _Environment:
    """The resolver; ``answers``: how often it has been asked."""

    def __init__(self) -> None:
        self.answers = 0

    def __call__(self, name: str, *default: Any) -> Any:
        self.answers += 1
        value = oc.env(name, _ABSENT)
        if value == _ABSENT:
            return oc.env(name, *default)
        secrets.remember(name, value)
        return value


_ENVIRONMENT = _Environment()
OmegaConf.register_new_resolver("oc.env", _ENVIRONMENT, replace=True)


def resolve(tree: DictConfig) -> dict[str, Any]:
    """Plain maps, lists and scalars. Raises ``UserError`` where something is missing, refers to nothing or to itself, or would
    become very large."""
    try:
        _check_size(OmegaConf.to_container(tree, resolve=False))
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    except RecursionError:
        raise UserError("the configuration is nested too deeply, or a key refers to itself: correct it") from None


def value_at(recorded: Any, path: str, where: str) -> Any:
    """The value of one key of a record, which may be recorded as its interpolation; None where there is no such key. Raises
    ``UserError``."""
    try:
        return OmegaConf.select(OmegaConf.create(recorded if isinstance(recorded, dict) else {}), path)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = explain(error) if isinstance(error, OmegaConfBaseException) else "it is nested too deeply"
        raise UserError(f"{where}: {reason}") from None


def record(tree: DictConfig) -> dict[str, Any]:
    """The same for the record: without secrets, and with what the environment provided as its interpolation."""
    return secrets.redact(_recorded(tree, OmegaConf.to_container(tree, resolve=False)))


def keep_asked(value: Any, recorded: Any) -> Any:
    """``value``, with the interpolations of ``recorded``."""
    if isinstance(value, Mapping) and isinstance(recorded, Mapping):
        return {key: keep_asked(inner, recorded.get(key)) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(recorded, list) and len(value) == len(recorded):
        return [keep_asked(inner, other) for inner, other in zip(value, recorded, strict=True)]
    asked = isinstance(recorded, str) and ("${" in recorded or recorded == secrets.REDACTED)
    return recorded if asked else value


def overrides(texts: Sequence[str], kind: Any) -> DictConfig:
    """``key=value`` arguments, values in YAML, as a tree that goes over a ``kind``. Raises ``UserError``."""
    merged = OmegaConf.create()
    for text in texts:
        key, equals, value = text.lstrip("+").partition("=")
        if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
            raise UserError(f"{secrets.redact_override(text)!r} is not an override: write key=value")
        tree: Any = safe_yaml.parse(value, f"the value of {key}=") if value else None  # Hydra's way to empty a value
        for name in reversed(key.split(".")):
            tree = {name: tree}
        check(tree, kind)
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from None
    return merged


def explain(error: OmegaConfBaseException) -> str:
    """One line, in keys of ours."""
    key, raw = str(error.full_key or error.key or ""), _raw(error)
    message = one_line(str(error).split("\n")[0])
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value: give it on the command line, {key}=…"
    reason = _why_unresolved(error, message)
    if reason or "${" in raw:
        is_raw = f" is {raw}" if raw else ""
        return f"{key or 'a value'}{is_raw}: {reason or 'what this stands for does not fit here'}"
    return f"{key}: {message}" if key and key not in message else message


def _why_unresolved(error: OmegaConfBaseException, message: str) -> str | None:
    """What is wrong with an interpolation; None where the error is about something else."""
    variable = re.search(r"Environment variable '(.*)' not found", message)
    if variable:
        return f"the environment variable {variable[1]} is not set; set it, or write ${{oc.env:{variable[1]},DEFAULT}}"
    if isinstance(error, InterpolationKeyError):
        return "there is no such key; give its full path, as in ${data.root}"
    if isinstance(error, UnsupportedInterpolationType):
        return "what stands before ':' is not known; ${oc.env:NAME} asks the environment, ${data.root} is another key"
    if isinstance(error, GrammarParseError):
        return "'${' begins an interpolation, which does not end or is not well formed; write ${data.root} or ${oc.env:NAME}"
    if "Recursive interpolation" in message:
        return "it refers to itself; give a value"
    return "it cannot be resolved; correct it" if isinstance(error, InterpolationResolutionError) else None


def _raw(error: OmegaConfBaseException) -> str:
    """The value that was to be resolved, as it is written; empty where that is not known."""
    parent, key = error.parent_node, error.key
    if isinstance(parent, (DictConfig, ListConfig)) and key is not None:
        plain = OmegaConf.to_container(parent, resolve=False)
        if isinstance(plain, list) and isinstance(key, int) and key < len(plain):
            return shown(plain[key])
        if isinstance(plain, dict) and key in plain:
            return shown(plain[key], str(key))
    return ""


def _recorded(node: DictConfig | ListConfig, raw: Any) -> Any:
    found = {
        key: _recorded_at(node, key, inner) for key, inner in (raw.items() if isinstance(raw, dict) else enumerate(raw))
    }
    return found if isinstance(raw, dict) else list(found.values())


def _recorded_at(node: DictConfig | ListConfig, key: Any, raw: Any) -> Any:
    if not OmegaConf.is_interpolation(node, key):
        return _recorded(node[key], raw) if isinstance(raw, (dict, list)) else raw
    before, value = _ENVIRONMENT.answers, node[key]
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if _ENVIRONMENT.answers > before:
        return raw
    return value.replace("${", "\\${") if isinstance(value, str) else value  # the text itself, when it is read again


def _check_size(plain: dict[str, Any]) -> None:
    """Refuses references that multiply each other (``b: ${a}${a}``, ``c: ${b}${b}`` …) before they are resolved. Raises
    ``UserError``."""
    known: dict[str, int] = {}

    def size(path: str, value: Any) -> int:
        if path not in known:
            known[path] = 0  # a circle, which is reported when it is resolved
            known[path] = min(sum(parts(path, value)), LONGEST + 1)
        if known[path] > LONGEST:
            raise UserError(f"{path or 'the configuration'} repeats other keys too often: write out what is meant")
        return known[path]

    def parts(path: str, value: Any) -> list[int]:
        if isinstance(value, (dict, list)):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            return [1, *(size(f"{path}.{key}".lstrip("."), item) for key, item in inner)]
        if not isinstance(value, str) or "${" not in value:
            return [len(value) if isinstance(value, str) else 1]
        return [len(value), *(size(name, item) for name, item in _referred(plain, path, value))]

    size("", plain)


def _referred(plain: dict[str, Any], path: str, text: str) -> list[tuple[str, Any]]:
    """What is named within the ``${…}`` of a text: full path and value of each."""
    found = []
    for name in _REFERENCE.findall(" ".join(re.findall(r"\$\{([^}]*)", text))):
        dots = len(name) - len(name.lstrip("."))
        outer = path.split(".")[:-dots] if dots else []
        full = [*outer, *re.sub(r"\[(\w+)\]", r".\1", name.lstrip(".")).split(".")]
        value: Any = plain
        for part in full:
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found.append((".".join(full), value))
    return found
