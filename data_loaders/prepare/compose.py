"""Recipe and command line -> a checked declaration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_loaders import configuration, safe_yaml, secrets, typed
from data_loaders.errors import UserError
from data_loaders.prepare.arguments import RECIPES, names
from data_loaders.prepare.declaration import Declaration


def load(recipe: str, overrides: Sequence[str] = ()) -> Declaration:
    """``recipe``: a name of ``conf/recipe``, or the path of a YAML file. ``overrides``: ``split.hash.valid=0.1`` …, which
    may also add to maps. Raises ``UserError``."""
    path = Path(recipe).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(RECIPES / f"{recipe}.yaml"))
        if not path.is_file():
            raise UserError(
                f"recipe={recipe} is not known{typed.near(recipe, names())}; or give the path of a YAML file"
            )
    elif not path.is_file():
        raise UserError(f"recipe={recipe}: there is no such file")
    text = safe_yaml.read_text(path)
    return check(safe_yaml.parse(text, f"recipe={recipe}"), f"recipe={recipe}", overrides)


def check(tree: Any, where: str, overrides: Sequence[str] = ()) -> Declaration:
    """``tree``: a recipe's plain content, or what was recorded of a declaration; ``where`` names it. Raises ``UserError``."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a map with sources, examples and schema")
    given = configuration.overrides(overrides, Declaration)
    try:
        typed.check(tree, Declaration)
        merged = OmegaConf.merge(OmegaConf.structured(Declaration), tree, given)
        plain = configuration.resolve(merged)
        typed.check(plain, Declaration)
        declaration = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Declaration), plain))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {configuration.explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    assert isinstance(declaration, Declaration)
    declaration.asked_as(configuration.record(merged))
    declaration.check()
    return declaration


def to_plain(declaration: Declaration) -> dict[str, Any]:
    """What ``check`` takes; YAML-able."""
    return OmegaConf.to_container(OmegaConf.structured(declaration))


def record(declaration: Declaration) -> dict[str, Any]:
    """The same as it may be written down: without secrets, and with what the environment provided as it was asked for."""
    return secrets.redact(configuration.keep_asked(to_plain(declaration), declaration.recorded))
