"""A configuration group that is not the trainer's: its keys on the command line beside the job's, its files in ``conf/NAME``
or in the user's ``--config-dir``."""

import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_loaders import safe_yaml
from data_loaders.errors import UserError


def split(argv: Sequence[str], name: str) -> tuple[dict[str, str], list[str]]:
    """``name=…`` and ``name.KEY=…`` with their values, and all other arguments in order."""
    own, others = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and (key == name or key.startswith(f"{name}.")):
            own[key] = value
        else:
            others.append(argument)
    return own, others


def load(
    name: str, choice: str, config_dir: str | None, parse: Callable[[str, str], Any], example: str
) -> dict[str, Any]:
    """The file that ``name=choice`` names, the user's first, by ``parse(its text, its path)``. Raises ``UserError``, with
    ``example``, a choice that shows how a file looks."""
    folders = [Path(config_dir).expanduser() / name] if config_dir else []
    folders.append(importlib.resources.files("conf") / name)
    for folder in folders:
        if (file := folder / f"{choice}.yaml").is_file():
            loaded = parse(safe_yaml.read_text(file), str(file))
            if not isinstance(loaded, dict):
                raise UserError(f"{file} is no map of keys: see conf/{name}/{example}.yaml")
            return loaded
    known = {file.name.removesuffix(".yaml") for folder in folders if folder.is_dir() for file in folder.iterdir()}
    raise UserError(f"{name}={choice}: there is no conf/{name}/{choice}.yaml (valid: {', '.join(sorted(known))})")
