"""Keys on a command line that are not the job's: `NAME=CHOICE` (a file of conf/NAME, or of NAME/ in a `--config-dir`) and
`NAME.KEY=VALUE`; NAME is sweep or launch."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data_loaders import safe_yaml
from data_loaders.configuration import explain
from data_loaders.errors import UserError
from data_loaders.typed import check

T = TypeVar("T")


def split(overrides: Sequence[str], name: str) -> tuple[dict[str, str], list[str]]:
    """``name=…`` and ``name.KEY=…`` with their values, and all other overrides in order."""
    own, others = {}, []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and (key == name or key.startswith(f"{name}.")):
            own[key] = value
        else:
            others.append(override)
    return own, others


def load(name: str, choice: str, config_dirs: Sequence[str]) -> dict[str, Any]:
    """The file that ``name=choice`` names. Raises ``UserError``."""
    folders = [*(Path(folder).expanduser() / name for folder in config_dirs), Path(str(files("conf") / name))]
    for folder in folders:
        if (file := folder / f"{choice}.yaml").is_file():
            loaded = _values(safe_yaml.read_text(file), str(file))
            if not isinstance(loaded, dict):
                raise UserError(f"{file} is no map of keys: see the files of conf/{name}")
            return loaded
    known = {file.name.removesuffix(".yaml") for folder in folders if folder.is_dir() for file in folder.iterdir()}
    raise UserError(f"{name}={choice}: there is no conf/{name}/{choice}.yaml (valid: {', '.join(sorted(known))})")


def merge(name: str, tree: dict[str, Any], own: Mapping[str, str], kind: type[T]) -> T:
    """A ``kind``: its defaults, a file's ``tree``, then each ``name.KEY``. Raises ``UserError``."""
    for key, text in own.items():
        _put(tree, key.split(".", 2)[1:], key, text)
    try:
        check(tree, kind, name)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), tree))
    except MissingMandatoryValue as error:
        raise UserError(f"{name}.{error.full_key} has no value: {name}.{error.full_key}=…") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{name}.{explain(error)}") from None


def _put(tree: dict[str, Any], path: Sequence[str], key: str, text: str) -> None:
    """``launch.nodes=2``; ``launch.setup=[a, b]``; of a map's keys, which may have dots, ``launch.options.time=10:00:00``."""
    if len(path) == 1:
        tree[path[0]] = _values(text, key)
    elif path and isinstance(tree.setdefault(path[0], {}), dict):
        tree[path[0]][path[1]] = text
    elif path:
        raise UserError(f"{key}: {key.rpartition('.')[0]} has no keys of its own")


def _values(text: str, where: str) -> Any:
    """Texts, as they are written: YAML takes 10:00:00 for a number in base 60. The dataclasses know which are numbers."""
    return _with_nulls(safe_yaml.parse(text, where, strings=True))


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    return None if value in ("null", "~", "") else value
