"""Recipe and command line -> a checked declaration. The only module of ``data_loaders`` that knows OmegaConf."""

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_loaders.prepare.declaration import Declaration

RECIPES = importlib.resources.files("conf") / "recipe"


def load(recipe: str, overrides: Sequence[str] = ()) -> Declaration:
    """``recipe``: a name of ``conf/recipe``, or the path of a YAML file. ``overrides``: ``split.hash.valid=0.1`` …, which
    may also add to maps. Raises ``ValueError``."""
    path = Path(recipe).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(RECIPES / f"{recipe}.yaml"))
        if not path.is_file():
            raise ValueError(f"recipe={recipe} is not known{_near(recipe)}; or give the path of a YAML file")
    elif not path.is_file():
        raise ValueError(f"recipe={recipe}: there is no such file")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # noqa: BLE001 - a YAML parser's errors have no common base
        raise ValueError(f"recipe={recipe}: {_one_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"recipe={recipe}: expected a map with sources, examples and schema")
    return check(tree, overrides, f"recipe={recipe}")


def from_plain(tree: dict[str, Any], where: str) -> Declaration:
    """A declaration that was recorded. Raises ``ValueError``."""
    return check(OmegaConf.create(tree), (), where)


def check(tree: DictConfig, overrides: Sequence[str], where: str) -> Declaration:
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Declaration), tree, OmegaConf.from_dotlist([_nulled(text) for text in overrides])
        )
        declaration = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_explain(error)}") from None
    assert isinstance(declaration, Declaration)
    declaration.check()
    return declaration


def to_plain(declaration: Declaration) -> dict[str, Any]:
    """What ``from_plain`` takes; YAML-able."""
    return OmegaConf.to_container(OmegaConf.structured(declaration))


def names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir() if path.name.endswith(".yaml"))


def _nulled(text: str) -> str:
    # Hydra's way to empty a value; YAML knows it too, but not after a bare "=".
    return text + "null" if text.endswith("=") else text


def _near(recipe: str) -> str:
    near = difflib.get_close_matches(recipe, names(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} (known: {', '.join(names())})"


def _explain(error: OmegaConfBaseException) -> str:
    key = str(getattr(error, "full_key", None) or "")
    message = _one_line(error)
    parent = getattr(error, "parent_node", None)
    if "not in" in message and isinstance(parent, DictConfig):
        valid = [str(name) for name in parent]
        near = difflib.get_close_matches(key.rpartition(".")[2], valid, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"{key} is not a known key{hint} (valid: {', '.join(valid)})"
    return f"{key}: {message}" if key and key not in message else message


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
