"""Every configuration key, read from the dataclasses: `python -m docs.keys > docs/keys.md`.

What a key means is the docstring under its field. Allowed values are those that the class itself names when it
is given another one. Models are read from their syntax trees, so that nothing here takes the time to load PyTorch.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from data_loaders.prepare.declaration import STEPS, Declaration
from docs.sections import Key, Section, as_yaml, markdown, sections
from launch.cluster.options import KINDS, Nodes
from launch.sweep.options import SweepConfig
from trainer.config.job import TrainConfig

ROOT = Path(__file__).parents[1]
HEAD = """\
# Every key

Written by `python -m docs.keys > docs/keys.md` from the dataclasses that check the configuration; do not edit it.

Defaults are the dataclasses'. The files that a command chooses set others (`conf/optim/<model>.yaml`, `conf/data/<data>.yaml`,
`conf/evaluation/<data>.yaml`, an experiment), the command line has the last word, and `--print-config` added to a command shows
what comes out. A `<table>`, `<feature>` … in a key is a name of your own; a new one is added to its map with a
plus: `'+optim.by_table={user: {lr: 0.01}}'`.
"""
MODELS = """
### `model`

`model=NAME` chooses a file of `conf/model`. Hyperparameters are keyword arguments of the model's class; one of your own brings
its own ([add-a-model.md](add-a-model.md)).
"""


def parts() -> Iterator[tuple[str, str, list[tuple[str, type, str]]]]:
    """``(title, what it is about, [(heading, dataclass, what its keys begin with)])``."""
    yield "A run", "Of `clicktrainer train`, and of `plan`, `evaluate` and `predict`.", [("", TrainConfig, "")]
    yield "A sweep", "Of `clicktrainer sweep` ([sweeps.md](sweeps.md)).", [("sweep=NAME", SweepConfig, "sweep")]
    kinds = [(f"launch={name}", kind, "launch") for name, kind in KINDS.items()]
    about = "Of `clicktrainer cluster` ([clusters.md](clusters.md)): a job on several machines."
    yield "A job on a cluster", about, [("launch=NAME", Nodes, "launch"), *kinds]
    steps = [(f"steps: {{{name}: …}}", kind, name) for name, kind in STEPS.items() if dataclasses.is_dataclass(kind)]
    about = "Of `clicktrainer prepare` ([prepare.md](prepare.md)); the file of a recipe holds these keys."
    yield "A recipe", about, [("", Declaration, ""), *steps]


def main() -> None:
    print(page(), end="")


def page() -> str:
    text, done = [HEAD], {}
    for title, about, roots in parts():
        text.append(f"\n## {title}\n\n{about}\n")
        for heading, root, prefix in roots:
            first, *others = sections(root, prefix, done)
            text += map(_rendered, (dataclasses.replace(first, heading=heading), *others))
            text += [_models()] if root is TrainConfig else []
    return "".join(text)


def _rendered(section: Section) -> str:
    lines = [f"\n### `{section.heading}`\n"] if section.heading else [""]
    if section.introduction:
        lines.append(f"{section.introduction}\n")
    if section.keys:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [*map(_row, section.keys), ""]
    return "\n".join(lines) if section.keys or section.introduction else ""


def _row(key: Key) -> str:
    kind = key.type + (": " + ", ".join(f"`{value}`" for value in key.allowed) if key.allowed else "")
    return (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key.path}`", kind, key.default, key.meaning)) + " |"
    )


def _models() -> str:
    """The hyperparameters of each model of ours, from its constructor; checked there, so no ``allowed``."""
    names = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
    return "\n".join((MODELS, *map(_model, names)))


def _model(name: str) -> str:
    tree = ast.parse((ROOT / "trainer" / "models" / f"{name}.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    owner = next(node.value.id for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "Model")
    init = next(node for node in classes[owner].body if getattr(node, "name", "") == "__init__")
    arguments = [it for it in zip(init.args.kwonlyargs, init.args.kw_defaults) if it[0].arg != "device"]
    said = inspect.cleandoc(ast.get_docstring(classes[owner]) or "").partition("Raises ")[0]
    for argument, _ in arguments:
        if f"``{argument.arg}``" not in said:
            raise ValueError(f"trainer.models.{name}: {owner}'s docstring does not say what ``{argument.arg}`` means")
    file = (ROOT / "conf" / "model" / f"{name}.yaml").read_text()
    paper = re.split("[;\n]", file.removeprefix("# "))[0]
    text = " ".join(filter(None, (markdown(paper[:1].upper() + paper[1:] + "."), markdown(said))))
    lines = [f"#### `model={name}`\n", text]
    if arguments:
        lines += ["\n| key | type | default |", "|---|---|---|"]
    for argument, default in arguments:
        kind = ast.unparse(argument.annotation).replace("None", "null").replace(" | ", " or ")
        kind = re.sub(r"list\[(\w+)\]", r"list of \1", kind)
        lines.append(f"| `model.{argument.arg}` | {kind} | `{as_yaml(ast.literal_eval(default))}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
