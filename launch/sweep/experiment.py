"""The best trial as an experiment file: what was given on the command line and what was found, ready to run."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from data_loaders.secrets import redact
from data_loaders.state_files import write_text

NAME = "best"


def write(root: Path, overrides: Sequence[str], config_dirs: Sequence[str], headline: str) -> list[str]:
    """Writes ``root/experiment/best.yaml``; returns the arguments that run it. What a file cannot say (``~key``) stays with
    the arguments."""
    parser = OverridesParser.create()
    parsed = [override for override in map(parser.parse_override, overrides) if override.key_or_group != "run.dir"]
    groups = [override for override in parsed if is_group(override, config_dirs)]
    defaults: list[Any] = [_default(override) for override in groups]
    # Experiments first: what else is chosen goes over what they choose.
    defaults.sort(key=lambda item: not isinstance(item, str))
    tree: dict[str, Any] = {"defaults": [*defaults, "_self_"]}
    for override in parsed:
        if override not in groups and not override.is_delete():
            _put(tree, override.key_or_group.split("."), override.value())
    path = root / "experiment" / f"{NAME}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# @package _global_\n# {headline}\n" + yaml.safe_dump(redact(tree), sort_keys=False))
    deleted = [override.input_line for override in parsed if override.is_delete()]
    folders = [word for folder in (*config_dirs, str(root)) for word in ("--config-dir", folder)]
    return [*folders, f"experiment={NAME}", *map(str, deleted)]


def is_group(override: Override, config_dirs: Sequence[str]) -> bool:
    """Whether it chooses a file, such as ``model=din``."""
    folders = [importlib.resources.files("conf"), *(Path(folder).expanduser() for folder in config_dirs)]
    name = override.key_or_group
    return not override.is_delete() and "." not in name and any((folder / name).is_dir() for folder in folders)


def _default(override: Override) -> Any:
    if override.key_or_group == "experiment":
        return str(override.value())
    return {f"{'' if override.is_add() else 'override '}/{override.get_key_element().lstrip('+')}": override.value()}


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """A map replaces nothing, but goes over what is there, as on the command line."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    known = tree.get(path[-1])
    tree[path[-1]] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
