"""A package that is missing, of another version, or broken: one line with the remedy, from every program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_loaders import packages

REPOSITORY = Path(__file__).resolve().parents[2]
HIDE = """
import os, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == os.environ["HIDDEN"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def raised(statement, name="program.py"):
    try:
        exec(compile(statement, name, "exec"), {})
    except Exception as error:  # noqa: BLE001 - what is looked at
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("package", "shown", "module", "arguments"),
    [
        ("numpy", "numpy", "trainer.train", ["model=lr"]),
        ("torch", "torch", "launch.run", ["model=lr"]),
        ("fbgemm_gpu", "fbgemm-gpu", "trainer.evaluate", ["runs/x"]),
        ("omegaconf", "omegaconf", "data_loaders.prepare", ["recipe=x"]),
        ("yaml", "PyYAML", "trainer.predict", ["runs/x"]),
    ],
)
def test_a_missing_package_is_one_line_and_exit_code_2(tmp_path, package, shown, module, arguments):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "HIDDEN": package, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: the package {shown} is not installed (") and "needs it): " in line


def test_the_remedy_is_that_of_the_place_it_runs_from(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "ROOT", tmp_path)  # no checkout: installed by pip
    assert packages.remedy("numpy") == "pip install numpy"
    assert packages.remedy("torchrec").startswith("pip install '.[cuda]'")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "install.py").touch()
    (tmp_path / "requirements" / "common.txt").write_text("NumPy==2.2  # arrays\n")
    assert packages.remedy("numpy") == "run `make setup`"
    assert packages.remedy("nothing_of_ours") == f"{sys.executable} -m pip install nothing_of_ours"
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f"start it by {python}" in packages.remedy("numpy")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import nothing_like_it", "the package nothing_like_it is not installed (program.py needs it)"),
        ("import numpy.nothing_like_it", "the package numpy is here, but not its module numpy.nothing_like_it"),
        ("from numpy import nothing_like_it", "the package numpy does not load (cannot import name"),
        ("raise ImportError('x.so: undefined symbol: y', name='torchrec')", "torchrec does not load (x.so: undefined"),
        (
            "raise OSError('libnvidia-ml.so.1: cannot open shared object file')",
            "does not load without an NVIDIA driver",
        ),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "does not load (libcudart.so.13"),
        ("raise ModuleNotFoundError(\"No module named '_lzma'\", name='_lzma')", "lacks its own module _lzma"),
    ],
)
def test_what_does_not_load_is_told_apart(statement, expected):
    assert expected in packages.explanation(raised(statement))


@pytest.mark.parametrize(
    "statement",
    ["import trainer.nothing", "from trainer.config.job import nothing", "1 / 0", "open('/nothing/at/all')"],
)
def test_bugs_and_other_errors_keep_their_tracebacks(statement):
    assert packages.explanation(raised(statement)) is None
