"""Command line -> typed configuration, with one clear line for every mistake.

The only module below the command line that knows Hydra. Composition needs no process group and writes nothing.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import TrainConfig
from trainer.models import load_model_class

# Their keys are names of the user's own, so a new one is no mistake.
SHORT = re.compile(r"^warm_start=")
MAPS = re.compile(r"(^|\.)(tables|features|crosses|by_table|options|rename|optimizer)$")
SECRET = re.compile(r"secret|token|password|passwd|credential|api_?key", re.IGNORECASE)


class UserError(ValueError):
    """A mistake that its maker can mend: shown as one line, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Composed:
    """``config``: checked objects. ``tree``: the same as plain, resolved, secret-free YAML-able data, for the record."""

    config: TrainConfig
    tree: dict[str, Any]


def compose(argv: Sequence[str]) -> Composed:
    """Composes and checks the configuration of a job.

    ``argv`` holds Hydra overrides (``model=din optim.dense.lr=3e-4``) and ``--config-dir DIR`` for a folder of one's own.
    Raises ``UserError``.
    """
    options, overrides = parse(argv)
    try:
        tree = _compose_tree(options.config_dir, options.config_name, overrides)
        plain = _resolve(tree)
        # Held against the dataclasses once more: '+key=value' opens even a typed node.
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), plain))
        assert isinstance(config, TrainConfig)
        config.model = check_model(config.model)
    except OverrideParseException as error:
        raise UserError(
            f"{error.override!r} is not an override: write key=value (quote lists and spaces for the shell)"
        ) from None
    except MissingConfigException as error:
        raise UserError(_explain_missing(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is not plain YAML: {' '.join(str(error).split())}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from None
    except ValueError as error:
        raise UserError(_first_line(error)) from None
    plain["model"] = dict(config.model)
    raw = OmegaConf.to_container(tree, resolve=False)
    return Composed(config, redact(_without_environment(plain, raw)))


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """The configuration that a run folder recorded, with overrides. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a finished or checkpointed run")
    try:
        base = OmegaConf.structured(TrainConfig)
        tree = OmegaConf.merge(base, OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        plain = _resolve(tree)
        config = OmegaConf.to_object(tree)
        config.model = check_model(config.model)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    raw = OmegaConf.to_container(tree, resolve=False)
    return Composed(config, redact(_without_environment(plain, raw)))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="trainer.train",
        description="Trains a click model. Overrides are Hydra's: model=din data=ml1m data.root=DIR optim.dense.lr=3e-4 …",
    )
    parser.add_argument("overrides", nargs="*", help="key=value; +key=value adds, ~key deletes")
    parser.add_argument("--config-dir", help="a folder of your own with data/, model/, experiment/ … beside ours")
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    options = parser.parse_args(list(argv))
    # A key cannot be both a value and a section: the path is what one means.
    return options, [SHORT.sub("warm_start.path=", override) for override in options.overrides]


def check_model(model: dict[str, Any]) -> dict[str, Any]:
    """Types and names of a model's hyperparameters, held against its constructor; defaults filled in."""
    if not model.get("name"):
        raise UserError("model.name is missing: choose a model, such as model=deepfm")
    hyperparameters = hyperparameter_class(load_model_class(model["name"]))
    given = {key: value for key, value in model.items() if key != "name"}
    valid = [f.name for f in dataclasses.fields(hyperparameters)]
    for key in given:
        if key not in valid:
            raise UserError(f"model.{key} is not a hyperparameter of {model['name']}{_near(key, valid)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(hyperparameters), given)
    except OmegaConfBaseException as error:
        raise UserError(f"model.{error.key}: {_first_line(error)}") from None
    return {"name": model["name"], **OmegaConf.to_container(merged)}


def hyperparameter_class(model_class: type) -> type:
    """A dataclass with the keyword arguments of a model's constructor (``schema`` and ``device`` left out)."""
    fields = []
    for parameter in inspect.signature(model_class.__init__).parameters.values():
        if parameter.name in ("self", "schema", "device"):
            continue
        default = parameter.default
        make: Callable = dataclasses.field
        spec = (
            make(default_factory=lambda d=default: list(d))
            if isinstance(default, (list, tuple))
            else make(default=default)
        )
        fields.append((parameter.name, parameter.annotation, spec))
    return dataclasses.make_dataclass(model_class.__name__, fields)


def redact(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(v, key) for v in value]
    return "<redacted>" if SECRET.search(key) and isinstance(value, str) else value


def _without_environment(value: Any, raw: Any) -> Any:
    """What the environment provided is recorded as it was asked for (``${oc.env:NAME}``), not as it was answered."""
    if isinstance(value, dict) and isinstance(raw, dict):
        return {k: _without_environment(v, raw.get(k)) for k, v in value.items()}
    if isinstance(value, list) and isinstance(raw, list):
        return [_without_environment(v, r) for v, r in zip(value, raw, strict=True)]
    return raw if isinstance(raw, str) and "oc.env" in raw else value


def search_path(*folders: Path) -> str:
    """The override that adds folders; quoted, as Hydra would read a name such as day=2026-11-01 as one more override."""
    quoted = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in folders]
    return "hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in quoted) + "]"


def _compose_tree(config_dir: str | None, config_name: str, overrides: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store("train_schema", TrainConfig)
    extra = []
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir} is not a folder")
        extra = [search_path(folder)]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("conf", version_base="1.3"):
        tree = hydra.compose(config_name, overrides=[*extra, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(tree)
    OmegaConf.set_readonly(tree.hydra, False)
    asked = OmegaConf.to_container(tree.run, resolve=False)
    OmegaConf.resolve(tree.run)  # before Hydra's own part goes, which it may speak of
    for key, text in asked.items():
        if isinstance(text, str) and "oc.env" in text and "hydra:" not in text:
            tree.run[key] = text
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    OmegaConf.set_struct(tree, True)
    return tree


def _resolve(tree: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


def _explain_missing(error: MissingConfigException) -> str:
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = wanted.rpartition("/")
    options = [o for o in (error.options or []) if o]
    if not options:
        return _first_line(error)
    return f"{group}={name}: there is no conf/{group}/{name}.yaml{_near(name, options)}"


def _explain(error: Exception) -> str:
    """The one line of a Hydra or OmegaConf error, with the nearest valid names where a key is unknown."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    message = _first_line(cause or error)
    key = str(getattr(cause, "full_key", None) or getattr(cause, "key", None) or "")
    unknown = re.search(r"Key '([^']+)' (?:is )?not in (struct|'\w+')", message)
    if unknown:
        parent = key.rpartition(".")[0]
        is_map = unknown.group(2) == "struct" and MAPS.search(parent)
        adds = f"; +{key}=… adds one" if is_map else ""
        return f"{key} is not a known key{_near(unknown.group(1), _keys(cause), parent)}{adds}"
    if "missing mandatory value" in message.lower():
        return f"{key} has no value: give it on the command line, {key}=…"
    mismatch = re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", message)
    if mismatch:
        return f"{key}={mismatch.group(1)}: expected {mismatch.group(3).lower()}, found {mismatch.group(2)}"
    if "dict is not a subclass of" in message:
        return f"'{key}' cannot be added by itself: add it to its map as +map={{{key}: {{…}}}}"
    return f"{key}: {message}" if key and key not in message else message


def _keys(cause: BaseException | None) -> list[str]:
    parent = getattr(cause, "parent_node", None)
    return [str(k) for k in parent if k != "hydra"] if isinstance(parent, DictConfig) else []


def _near(name: str, valid: Sequence[str], parent: str = "") -> str:
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    prefix = f"{parent}." if parent else ""
    hint = f"; did you mean {' or '.join(prefix + n for n in near)}?" if near else ""
    return f"{hint} (valid: {', '.join(sorted(valid))})" if valid else hint


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
