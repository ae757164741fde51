"""`clicktrainer COMMAND …`: the one door to the program.

A command's module is imported late, by name, which nothing else in the program does: PyTorch takes seconds to import, and
`--help`, `--version` and a mistyped option are answered without it.
"""

import importlib
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from data_loaders import packages
from trainer import __version__, completion

USER_ERROR = 2


@dataclass(frozen=True)
class Command:
    """``parser``: makes its argument parser, without PyTorch; ``work``: takes the arguments and returns the exit code; both as
    module:function."""

    summary: str
    parser: str
    work: str


COMMANDS = {
    "train": Command("train a model on this machine", "trainer.config.arguments:train", "launch.run:main"),
    "evaluate": Command(
        "metrics of a trained run on any data", "trainer.config.arguments:evaluate", "trainer.evaluate:main"
    ),
    "predict": Command("click probabilities for new rows", "trainer.config.arguments:predict", "trainer.predict:main"),
    "report": Command("draw the report of a run", "trainer.config.arguments:report", "trainer.report.__main__:main"),
    "compare": Command("runs side by side", "trainer.config.arguments:compare", "trainer.report.compare:main"),
    "checkpoint": Command(
        "inspect, verify, compare checkpoints",
        "trainer.config.arguments:checkpoint",
        "trainer.checkpoint.__main__:main",
    ),
    "prepare": Command(
        "raw logs to training-ready Parquet",
        "data_loaders.prepare.arguments:prepare",
        "data_loaders.prepare.__main__:main",
    ),
    "sweep": Command("many runs: a grid or a search", "trainer.config.arguments:sweep", "launch.run:sweep"),
    "incremental": Command("train day after day", "trainer.config.arguments:incremental", "launch.incremental:main"),
    "cluster": Command("train on many machines", "trainer.config.arguments:cluster", "launch.cluster.command:main"),
    "plan": Command("whether a job fits on a cluster", "trainer.config.arguments:plan", "trainer.plan.__main__:main"),
    "doctor": Command("check this machine", "trainer.config.arguments:doctor", "trainer.doctor.__main__:program"),
}


def main(argv: Sequence[str] | None = None) -> int:
    packages.explain_missing()
    first, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if first in ("-h", "--help", "help"):
        print(overview())
        return 0
    if first == "--version":
        print(f"clicktrainer {__version__}")
        return 0
    if first == "--completion":
        return _print_completion(rest)
    if first == "--complete":
        print(
            "\n".join(
                completion.candidates(rest, list(COMMANDS), lambda name: find(COMMANDS[name].parser)().format_help())
            )
        )
        return 0
    if first not in COMMANDS:
        print(f"error: {_mistaken(first, rest)}", file=sys.stderr)
        return USER_ERROR
    return run(COMMANDS[first], rest)


def run(command: Command, argv: Sequence[str]) -> int:
    """Reads the arguments first: a mistake among them does not wait for PyTorch."""
    parser: ArgumentParser = find(command.parser)()
    parser.parse_intermixed_args(list(argv))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it is imported, Ctrl-C ends without a traceback
    work = find(command.work)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's model is found; after our own packages
    return work(argv) or 0


def find(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    """What `clicktrainer --help` prints."""
    commands = "\n".join(f"  {name:<12} {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: clicktrainer COMMAND [options] key=value …

{commands}

models:     {" ".join(_names("model"))}  (model=NAME)
data sets:  {" ".join(_names("data"))}  (data=NAME)

clicktrainer COMMAND --help    options and examples
clicktrainer --version
clicktrainer --completion bash    a script for bash: source <(clicktrainer --completion bash)

Documentation: README.md, docs/index.md; every configuration key: docs/keys.md"""


def _names(group: str) -> list[str]:
    return sorted(file.name.removesuffix(".yaml") for file in (files("conf") / group).iterdir())


def _print_completion(rest: Sequence[str]) -> int:
    if rest != ["bash"]:
        print("error: --completion takes the name of a shell, bash", file=sys.stderr)
        return USER_ERROR
    print(completion.BASH)
    return 0


def _mistaken(first: str, rest: Sequence[str]) -> str:
    if not first:
        return "no command is given; clicktrainer --help lists them"
    if "=" in first or first.startswith(("-", "~")):
        return "no command is given: to train, write clicktrainer train key=value …; clicktrainer --help lists all commands"
    near = get_close_matches(first, COMMANDS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{first} is not a command{meant} (clicktrainer --help lists them)"
