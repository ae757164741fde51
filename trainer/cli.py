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
from data_loaders.messages import fail, note
from trainer import __version__
from trainer.config import completion


@dataclass(frozen=True)
class Command:
    """``work``: module:function that takes the arguments and returns the exit code. ``on_ranks``: the one in its place with
    ``--nproc-per-node``. ``parser``: the one that makes its argument parser, without PyTorch (default: the function of
    trainer.config.arguments called like the command)."""

    summary: str
    work: str
    on_ranks: str = ""
    parser: str = ""


COMMANDS = {
    "train": Command("train a model on this machine", "launch.train:main"),
    "evaluate": Command("metrics of a trained run on any data", "trainer.evaluate:main", "launch.scoring:evaluate"),
    "predict": Command("click probabilities for new rows", "trainer.predict:main", "launch.scoring:predict"),
    "export": Command("a trained run as files to serve", "trainer.export.__main__:main"),
    "serve": Command("an exported model over HTTP", "launch.serve:main"),
    "serve.score": Command(
        "scores of new rows by an exported model",
        "trainer.serve.score:main",
        parser="trainer.config.arguments:serve_score",
    ),
    "embeddings": Command("rows of a table, with their values", "trainer.embeddings:main"),
    "report": Command("draw the report of a run", "trainer.report.__main__:main"),
    "compare": Command("runs side by side", "trainer.report.compare:main"),
    "checkpoint": Command("inspect, verify, compare checkpoints", "trainer.checkpoint.__main__:main"),
    "prepare": Command(
        "raw logs to training-ready Parquet",
        "data_loaders.prepare.__main__:main",
        parser="data_loaders.prepare.arguments:prepare",
    ),
    "sweep": Command("many runs: a grid or a search", "launch.sweep.command:main"),
    "incremental": Command("train day after day", "launch.incremental:main"),
    "cluster": Command("train on many machines", "launch.cluster.command:main"),
    "plan": Command("whether a job fits on a cluster", "trainer.plan.__main__:main"),
    "doctor": Command("check this machine", "trainer.doctor.__main__:program"),
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
        print("\n".join(completion.candidates(rest, list(COMMANDS), lambda name: parser_of(name).format_help())))
        return 0
    if first not in COMMANDS:
        return fail(_mistaken(first, rest))
    return run(first, rest)


def run(name: str, argv: Sequence[str]) -> int:
    """Reads the arguments first: a mistake among them does not wait for PyTorch."""
    options, command = parser_of(name).parse_intermixed_args(argv), COMMANDS[name]
    on_ranks = command.on_ranks and options.nproc_per_node
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it is imported, Ctrl-C ends without a traceback
    work = find(command.on_ranks if on_ranks else command.work)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's model is found; after our own packages
    try:
        return work(argv) or 0
    except KeyboardInterrupt:
        note("interrupted")
        return 128 + signal.SIGINT


def parser_of(name: str) -> ArgumentParser:
    return find(COMMANDS[name].parser or f"trainer.config.arguments:{name}")()


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
        return fail("--completion takes the name of a shell, bash")
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
