"""Command line -> typed configuration, with one clear line for every mistake.

The only module below the command line that knows Hydra (with ``trainer.config.files``, which reads its files). Composition
needs no process group and writes nothing.
"""

import argparse
import dataclasses
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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_loaders import configuration, safe_yaml, secrets
from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.typed import check, made, near
from trainer.config import arguments
from trainer.config import files as config_files
from trainer.config.job import TrainConfig
from trainer.models import is_ours, load_model_class
from trainer.modules import contract

# Their keys are names of the user's own, so a new one is no mistake.
SHORT = re.compile(r"^warm_start=")
MAPS = re.compile(r"(^|\.)(tables|features|crosses|by_table|options|rename|optimizer)$")


@dataclasses.dataclass(frozen=True)
class Composed:
    """``config``: checked objects. ``tree``: the same as plain, YAML-able data, for the record: without secrets, and with what
    the environment provided as it was asked for. ``words``: the command line that says all of it, of a job's."""

    config: TrainConfig
    tree: dict[str, Any]
    words: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """``tree`` as YAML."""
        return yaml.safe_dump(self.tree, sort_keys=False)


def compose(argv: Sequence[str]) -> Composed:
    """Composes and checks the configuration of a job.

    ``argv`` holds Hydra overrides (``model=din optim.dense.lr=3e-4``) and ``--config-dir DIR`` for folders of one's own.
    Raises ``UserError``.
    """
    options, overrides = parse(argv)
    folders = _folders(options.config_dir)
    files: dict[str, Path] = {}
    given: list[str] = []
    try:
        given = check_overrides(overrides, folders)
        tree, choices = _compose_tree(folders, options.config_name, overrides)
        config_files.check_not_hidden(choices, folders)
        files = dict(config_files.file_of(choices, folders))
        return dataclasses.replace(_checked(tree), words=tuple(argv))
    except MissingConfigException as error:
        raise UserError(_within(error, folders) + _explain_missing(error, options.config_dir)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_within(error, folders) + _explain(error)) from None
    except RecursionError:
        raise UserError(
            "the configuration is nested too deeply, or files choose each other in a circle: correct it"
        ) from None
    except ValueError as error:
        message = _first_line(error)
        origin = config_files.origin(message, files, given)
        raise UserError(f"{origin}: {message}" if origin and origin not in message else message) from None


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """The configuration that a run folder recorded, with overrides. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a finished or checkpointed run")
    try:
        given, recorded = configuration.overrides(overrides, TrainConfig), safe_yaml.read(path)
    except ValueError as error:
        raise UserError(_first_line(error)) from None
    if not isinstance(recorded, dict):
        raise UserError(f"{path} is empty or no map of keys: give the folder of a finished or checkpointed run")
    try:
        check(recorded, TrainConfig, "")
        tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), recorded, given)
        if OmegaConf.select(given, "model.name") is None:
            _check_ours(OmegaConf.select(tree, "model.name"))
        return _checked(tree)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {configuration.explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None


def _check_ours(name: Any) -> None:
    """A folder, which may be anybody's, does not say which code is run. Raises ``UserError``."""
    if isinstance(name, str) and not is_ours(name):
        raise UserError(
            f"model.name is {name!r}, code that is not this program's, which a run folder cannot ask to be run: if it is your "
            f"model, say so by adding model.name={name}"
        )


def _checked(tree: DictConfig) -> Composed:
    """Raises ``UserError``."""
    plain = configuration.resolve(tree)
    # Held against the dataclasses once more: '+key=value' opens even a typed node.
    check(plain, TrainConfig)
    config = made(plain, TrainConfig)
    config = dataclasses.replace(config, model=check_model(config.model))
    recorded = configuration.record(tree)
    model = configuration.keep_asked(dict(config.model), recorded["model"])
    return Composed(config, {**recorded, "model": secrets.redact(model, "model")})


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    options = arguments.job().parse_intermixed_args(list(argv))
    # A key cannot be both a value and a section: the path is what one means.
    return options, [SHORT.sub("warm_start.path=", override) for override in options.overrides]


def check_model(model: dict[str, Any]) -> dict[str, Any]:
    """Types and names of a model's hyperparameters, held against its constructor; defaults filled in."""
    if not model.get("name"):
        raise UserError("model.name is missing: choose a model, such as model=deepfm")
    model_class = contract.check_class(model["name"], load_model_class(model["name"]))
    hyperparameters = hyperparameter_class(model_class)
    given = {key: value for key, value in model.items() if key != "name"}
    valid = [f.name for f in dataclasses.fields(hyperparameters)]
    for key in given:
        if key not in valid:
            raise UserError(f"model.{key} is not a hyperparameter of {model['name']}{near(key, valid)}")
    for field in dataclasses.fields(hyperparameters):
        if field.name not in given and field.default is inspect.Parameter.empty:
            raise UserError(f"model.{field.name} has no value: give it one in the model's YAML file, or a default")
    for key, value in given.items():
        check(value, hyperparameters.__annotations__[key], f"model.{key}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(hyperparameters), given)
    except OmegaConfBaseException as error:
        raise UserError(configuration.explain(error)) from None
    return {"name": model["name"], **OmegaConf.to_container(merged)}


def hyperparameter_class(model_class: type) -> type:
    """A dataclass with the keyword arguments of a model's constructor (``schema`` and ``device`` left out)."""
    fields = []
    for parameter in inspect.signature(model_class).parameters.values():
        if parameter.name in ("schema", "device"):
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


def _search_path(folders: Sequence[Path]) -> str:
    """The override that adds folders; quoted, as Hydra would read a name such as day=2026-11-01 as one more override."""
    quoted = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in folders]
    return "hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in quoted) + "]"


def check_overrides(texts: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Holds each ``key=value`` against the dataclasses, before Hydra does with words of its own. Returns their keys. Raises
    ``UserError``."""
    parser, keys = OverridesParser.create(), []
    for text in texts:
        try:
            override = parser.parse_override(text)
        except (OverrideParseException, HydraException):
            raise UserError(
                f"{secrets.redact_override(text)!r} is not an override: write key=value (quote lists and spaces for the shell)"
            ) from None
        except RecursionError:
            raise UserError(f"{text[:40]}… is nested too deeply: that is no configuration") from None
        if not override.key_or_group:
            raise UserError(f"{secrets.redact_override(text)!r} is not an override: write key=value")
        if override.is_sweep_override():
            raise UserError(
                f"{text} gives several values: a list is [a,b], a text with a comma 'a,b', a sweep --multirun"
            )
        if not override.is_delete() and not _is_choice(override, folders):
            _check_override(override)
            keys.append(override.key_or_group)
    return keys


def _is_choice(override: Override, folders: Sequence[Path]) -> bool:
    """Whether it chooses a file, such as ``model=din``."""
    name = override.key_or_group.partition("@")[0]
    group = any((place / name).is_dir() for place in (config_files.OURS, *folders))
    if group and isinstance(override.value(), list) and name in config_files.groups_of_train() and name != "experiment":
        raise UserError(f"{override.input_line}: choose one file, as in {name}=NAME")
    return group and isinstance(override.value(), (str, list)) or name.partition(".")[0].partition("/")[0] == "hydra"


def _check_override(override: Override) -> None:
    path = override.key_or_group.split(".")
    if "[" in override.key_or_group or "@" in override.key_or_group:  # an element of a list; a group's package
        return
    tree: Any = override.value()
    for name in reversed(path):
        tree = {name: tree}
    check(tree, TrainConfig)


def _folders(config_dirs: Sequence[str]) -> list[Path]:
    """Each ``--config-dir``. Raises ``UserError``."""
    folders = [Path(name).expanduser().resolve() for name in config_dirs]
    for name, folder in zip(config_dirs, folders):
        if not folder.is_dir():
            raise UserError(f"--config-dir {name} is not a folder")
    return folders


def _compose_tree(
    folders: Sequence[Path], config_name: str, overrides: Sequence[str]
) -> tuple[DictConfig, dict[str, Any]]:
    """Hydra's composition, and what was chosen of each group."""
    ConfigStore.instance().store("train_schema", TrainConfig)
    config_files.install()
    GlobalHydra.instance().clear()
    extra = [_search_path(folders)] if folders else []
    with hydra.initialize_config_module("conf", version_base="1.3"):
        tree = hydra.compose(config_name, overrides=[*extra, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(tree)
    choices = OmegaConf.to_container(tree.hydra.runtime.choices)
    _write_out_hydra(tree)
    OmegaConf.set_readonly(tree.hydra, False)
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    OmegaConf.set_struct(tree, True)
    return tree, choices


def _write_out_hydra(tree: DictConfig) -> None:
    """``${hydra:…}`` in names of the run, so that a record of them needs no Hydra."""

    def value(found: re.Match[str]) -> str:
        chosen = OmegaConf.select(tree.hydra, found[1], throw_on_missing=True)
        return found[0] if chosen is None else str(chosen)

    for key, text in OmegaConf.to_container(tree.run, resolve=False).items():
        if isinstance(text, str):
            tree.run[key] = re.sub(r"\$\{hydra:([\w.]+)\}", value, text)


def _within(error: Exception, folders: Sequence[Path]) -> str:
    """The user's file that Hydra was reading, for the beginning of a message."""
    found = re.search(r"In '([^']+)'", str(error))
    paths = [folder / f"{found[1]}.yaml" for folder in folders] if found else []
    return next((f"{config_files.shorter(path)}: " for path in paths if path.is_file()), "")


def _explain_missing(error: MissingConfigException, config_dirs: Sequence[str]) -> str:
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = wanted.rpartition("/")
    if not group:
        return f"--config-name {name}: there is no conf/{name}.yaml; what is your own is an experiment, experiment=NAME"
    places = [Path(str(config_files.OURS)), *(Path(folder).expanduser() for folder in config_dirs)]
    options = {path.stem for place in places for path in (place / group).glob("*.yaml")}
    for folder in config_dirs:
        if Path(folder, f"{wanted}.yml").is_file():
            return f"{group}={name}: {folder}/{wanted}.yml must be called {name}.yaml"
    own = "".join(f" nor {folder}/{wanted}.yaml" for folder in config_dirs)
    where = "" if config_dirs else "; a folder of your own is named by --config-dir"
    return f"{group}={name}: there is no conf/{wanted}.yaml{own}{near(name, options)}{where}"


# Hydra's words -> ours.
SAYINGS = (
    (
        r"Multiple values for ([\w/]+)",
        "{0} is chosen twice: write {0}=NAME without '+', and in a file '- override /{0}: NAME'",
    ),
    (r"Could not override '([^']+)'. No match", "'{0}' overrides what no defaults list chooses: correct the name"),
    (
        r"An item is already at '([^']+)'|Could not append to config",
        "there is a value already: write key=value without '+'",
    ),
    (r"Could not delete (?:from config. )?'?([^' ]+)", "there is nothing to delete by ~{0}"),
    (r"You must specify '([^']+)'", "{0} has no value: choose one, {0}=NAME"),
    (r"looks like a config group", "there is no folder of files of that name: correct the part before '='"),
    (r"hydra.searchpath", "hydra.searchpath belongs on the command line: give the folder by --config-dir"),
    (r"Duplicate _self_ defined in (\S+)", "{0} names _self_ twice in its defaults: leave one"),
)


def _explain(error: Exception) -> str:
    """The one line of a Hydra or OmegaConf error, with the nearest valid names where a key is unknown."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        whole = one_line(error)
        said = ((re.search(theirs, whole), ours) for theirs, ours in SAYINGS)
        return next(
            (ours.format(*found.groups()) for found, ours in said if found), f"the configuration is not valid: {whole}"
        )
    message = _first_line(cause)
    if cause.key == "_dummy_":  # Hydra's name for an item of a defaults list
        return "a defaults list names a file by ${…}, which cannot be resolved: name the file, or set what is asked for"
    key = str(cause.full_key or cause.key or "")
    unknown = re.search(r"Key '([^']+)' (?:is )?not in (struct|'\w+')", message)
    if unknown:
        parent = key.rpartition(".")[0]
        is_map = unknown.group(2) == "struct" and MAPS.search(parent)
        adds = f"; +{key}=… adds one" if is_map else ""
        return f"{key} is not a known key{near(unknown.group(1), _keys(cause), parent)}{adds}"
    if "dict is not a subclass of" in message:
        return f"'{key}' cannot be added by itself: add it to its map as +map={{{key}: {{…}}}}"
    return configuration.explain(cause)


def _keys(cause: OmegaConfBaseException) -> list[str]:
    parent = cause.parent_node
    return [str(k) for k in parent if k != "hydra"] if isinstance(parent, DictConfig) else []


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
