"""The files that Hydra composes from, checked before Hydra reads them: plain YAML, keys and kinds of values as the dataclasses
have them, a defaults list that chooses something.

Hydra reads files by a class for each scheme of its search path, kept in a private registry (hydra-core 1.3); ours takes the
place of the one for ``file://``. Hydra's own error about a file says neither key nor line.
"""

import dataclasses
import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_loaders import safe_yaml
from data_loaders.configuration import explain
from data_loaders.errors import UserError
from data_loaders.typed import at, check, near, shown
from trainer.config.job import TrainConfig

OURS = importlib.resources.files("conf")
ROOT_PACKAGE = "_global_"
HEADER = f"# @package {ROOT_PACKAGE}"
KEYS = tuple(field.name for field in dataclasses.fields(TrainConfig))
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)


class CheckedFiles(FileConfigSource):
    """Hydra's reading of a file, by ``data_loaders.safe_yaml``."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises ``UserError``, which Hydra passes on."""
        path = Path(self.path, self._normalize_file_name(config_path))
        if not path.exists():
            raise ConfigLoadError(f"Config not found : {path}")
        text = safe_yaml.read_text(path)
        header = self._get_header_dict(text[:512])
        name = shorter(path)
        content = safe_yaml.parse(text, name)
        check_file(name, config_path, header.get("package"), content)
        try:
            config = OmegaConf.create(content)
        except OmegaConfBaseException as error:
            raise UserError(f"{name}: {explain(error)}") from None
        return ConfigResult(config=config, path=f"file://{self.path}", provider=self.provider, header=header)


def install() -> None:
    Plugins.instance()  # registers Hydra's own, which would complain after ours
    SourcesRegistry.instance().types["file"] = CheckedFiles


def check_file(name: str, config_path: str, package: str | None, content: Any) -> None:
    """``name``: for messages. ``config_path``: as Hydra has it, ``data/shop``. ``package``: what its header says. Raises
    ``UserError``."""
    group = config_path.rpartition("/")[0].removeprefix("/")
    if content is None and group.startswith("hydra"):
        return
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds {shown(content)}"
        raise UserError(f"{name} {what}: expected keys and values, such as those of conf/{group or 'train'}")
    if group.partition("/")[0] == "experiment" and not package:
        raise UserError(f"{name} sets keys of the whole configuration: begin the file with the line '{HEADER}'")
    content = {key: value for key, value in content.items() if key != "hydra"}
    check_defaults(name, config_path, content.pop("defaults", []))
    where = group.replace("/", ".") if not package else package.replace("_group_", group.replace("/", "."))
    path = [] if where in ("", ROOT_PACKAGE) else where.removeprefix(f"{ROOT_PACKAGE}.").split(".")
    kind = at(path, TrainConfig)
    if kind is not None:
        with_name(name, lambda: check(content, kind, ".".join(path)))
    elif package:
        raise UserError(f"{name}: '# @package {package}' names no part of the configuration{near(path[0], KEYS)}")


def check_defaults(name: str, config_path: str, defaults: Any) -> None:
    """The form of a defaults list; whether its files exist is Hydra's to say. Raises ``UserError``."""
    example = "a list of '- override /data: shop', '- override /model: din', '- _self_'"
    if not isinstance(defaults, list):
        raise UserError(f"{name}: defaults is {shown(defaults)}: expected {example}")
    for number, item in enumerate(defaults, 1):
        if isinstance(item, dict) and len(item) == 1:
            ((key, value),) = item.items()
            text = isinstance(value, str) or isinstance(value, list) and all(isinstance(v, str) for v in value)
            if not isinstance(key, str) or not (text or value is None):
                raise UserError(f"{name}: defaults, item {number}, is {shown(item)}: a group's value is a file's name")
            _check_default(name, config_path, key, value)
        elif not isinstance(item, str):
            raise UserError(f"{name}: defaults, item {number}, is {shown(item)}: expected {example}, one group an item")


def _check_default(name: str, config_path: str, key: str, value: Any) -> None:
    """An experiment overrides what ``conf/train.yaml`` chooses; a name without '/' is one of its own folder."""
    if not config_path.startswith("experiment/") or "@" in key:
        return
    word, _, group = key.rpartition(" ")
    chosen = groups_of_train()
    bare = group.lstrip("/")
    if bare in chosen and (not group.startswith("/") or "override" not in word.split()):
        raise UserError(
            f"{name}: defaults: write '- override /{bare}: {value}', as conf/train.yaml chooses a {bare} already"
        )
    if "override" in word.split() and bare not in chosen and not bare.startswith("hydra"):
        raise UserError(
            f"{name}: defaults: '{key}' overrides what conf/train.yaml does not choose{near(bare, chosen, '')}"
        )


def groups_of_train() -> list[str]:
    """Those that conf/train.yaml chooses from."""
    defaults = safe_yaml.parse((OURS / "train.yaml").read_text(), "conf/train.yaml")["defaults"]
    return [next(iter(item)).rpartition(" ")[2] for item in defaults if isinstance(item, dict)]


def with_name(name: str, action: Any) -> None:
    """``action()``; its ``UserError`` begins with the file's name."""
    try:
        action()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def file_of(choices: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The user's own files among what was chosen (group -> name): group, path."""
    for group, choice in choices.items():
        for folder in folders:
            if isinstance(choice, str) and (path := folder / group / f"{choice}.yaml").is_file():
                yield group, path


def check_not_hidden(choices: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Raises ``UserError`` for a user's file of a name that ``conf``, or another of the user's folders, has too: only the
    first one would be read."""
    found: dict[str, Path] = {}
    for group, path in file_of(choices, folders):
        if (OURS / group / path.name).is_file():
            raise UserError(
                f"{shorter(path)}: conf/{group}/{path.name} has the same name and would be read instead: rename yours"
            )
        if (first := found.setdefault(group, path)) != path:
            raise UserError(
                f"{shorter(path)}: {shorter(first)} has the same name and would be read instead: rename one"
            )


def origin(message: str, files: Mapping[str, Path], given: Sequence[str]) -> str | None:
    """The file of a user's (by its group) that sets the key which ``message`` begins with; None where none of them does, or the
    command line goes over it by a key among ``given``."""
    found = re.match(r"(?:optim: )?([\w.]+\w)", message)
    if found is None or any(f".{key}.".endswith(f".{found[1]}.") for key in given):
        return None
    for group, path in files.items():
        text = safe_yaml.read_text(path)
        package = _PACKAGE.search(text[:512])
        prefix = "" if package and package[1] == ROOT_PACKAGE else group.replace("/", ".") + "."
        if any(f".{prefix}{key}".endswith(f".{found[1]}") for key in _keys(safe_yaml.parse(text, str(path)))):
            return shorter(path)
    return None


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _keys(inner, f"{prefix}{key}.")


def shorter(path: Path) -> str:
    """From the working folder on, where it lies in it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
