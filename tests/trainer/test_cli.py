"""The program clicktrainer: its commands, help, completion, and what it costs to ask."""

import os
import subprocess
import sys

import pytest

from tests.helpers import warm
from tests.helpers.tiny import REPOSITORY
from trainer import cli

LOADED = """
import sys
from trainer.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded", sorted({"torch", "duckdb"} & set(sys.modules)), file=sys.stderr)
"""
COMPLETED = """
eval "$(clicktrainer --completion bash)"
COMP_WORDS=(clicktrainer "$@") COMP_CWORD=$#
_clicktrainer clicktrainer
echo "${COMPREPLY[*]}"
"""


def run(*words):
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=warm.PATIENCE)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["prepare", "--help"], ["sweep", "--help"]])
def test_what_is_asked_of_it_is_answered_without_pytorch(words):
    code, said, error = run(sys.executable, "-c", LOADED, *words)
    assert (code, error) == (0, "loaded []\n") and said


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_a_parser_with_examples_and_a_function(name):
    assert f"  clicktrainer {name}" in cli.parser_of(name).format_help()
    module, _, function = cli.COMMANDS[name].work.partition(":")
    path = REPOSITORY / f"{module.replace('.', '/')}.py"
    assert f"def {function}(" in path.read_text()


def test_help_names_commands_models_and_data_sets(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert (
        all(f"  {name} " in said for name in cli.COMMANDS) and "deepfm" in said and "ml1m" in said and "docs/" in said
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian is not a command; did you mean train?"),
        (["model=din"], "write clicktrainer train key=value"),
        ([], "no command is given"),
        (["--completion", "fish"], "--completion takes the name of a shell, bash"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_overrides_and_options_mix():
    given = cli.parser_of("train").parse_intermixed_args(
        ["model=din", "--config-dir", "a", "~experiment", "--nproc-per-node=3", "+x=1", "--config-dir=b"]
    )
    assert given.overrides == ["model=din", "~experiment", "+x=1"]
    assert (given.config_dir, given.nproc_per_node) == (["a", "b"], "3")


@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["tr"], "train"),
        (["train", "model", "=", "dee"], "deepfm"),
        (["train", "--config-d"], "--config-dir"),
        (["sweep", "sw"], "sweep="),
        (["evaluate", "runs/din", "--spl"], "--split"),
    ],
)
def test_completion_in_bash(words, replies, tmp_path):
    program = tmp_path / "clicktrainer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPOSITORY}/launch/rank.py" trainer "$@"\n')
    program.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", COMPLETED, "bash", *words], env=path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{replies}\n"), done.stderr
