"""Ranks find our packages whatever lies where a run is started, and a user's own model as documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import rank

REPOSITORY = Path(__file__).resolve().parents[2]
SHOW = "import sys, trainer.runtime.gpus, data_loaders.packages, conf, mine; print(trainer.__file__, mine.__file__, sys.argv)"


@pytest.fixture
def folder(tmp_path):
    """A folder with packages of our names, and a module of a user's own that is to be run."""
    for name in ("trainer", "data_loaders", "conf", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('the wrong one')")
    (tmp_path / "mine.py").touch()
    (tmp_path / "show.py").write_text(SHOW)
    return tmp_path


def run(words, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": "", **variables}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("where", ["current folder", "PYTHONPATH"])
def test_a_folder_of_our_name_takes_no_place(folder, tmp_path_factory, where):
    start, path = (folder, "") if where == "current folder" else (tmp_path_factory.mktemp("start"), str(folder))
    done = run(rank.command("show", ["a=b c", "$x"]), start, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [str(REPOSITORY / "trainer" / "__init__.py"), str(folder / "mine.py")]
    assert done.stdout.rstrip().endswith(f"['{folder / 'show.py'}', 'a=b c', '$x']")


def test_the_launcher_and_its_ranks_are_ours_beside_a_trainer_of_the_users(folder, tmp_path_factory):
    """As the command `clicktrainer` starts it; what a rank runs prints the configuration."""
    script = tmp_path_factory.mktemp("bin") / "clicktrainer"
    script.write_text(
        f"import sys; sys.path.append({str(REPOSITORY)!r})\nfrom trainer.cli import main\nsys.exit(main())\n"
    )
    done = run([sys.executable, str(script), "train", "model=lr", "--print-config"], folder)
    assert done.returncode == 0 and "name: lr" in done.stdout, done.stderr


def test_a_module_that_is_not_there_is_said_by_python_itself(folder):
    done = run(rank.command("nothing.here", []), folder)
    assert done.returncode != 0 and "nothing" in done.stderr
