"""What is no result goes to stderr, through one function."""

import ast
import io
import sys
from pathlib import Path

from tqdm import tqdm

from data_loaders import messages

REPOSITORY = Path(__file__).resolve().parents[2]
# Where results are printed, and a line that is drawn again.
PRINT = {
    "data_loaders/messages.py",
    "data_loaders/prepare/__main__.py",
    "data_loaders/prepare/progress.py",
    "launch/messages.py",
    "trainer/checkpoint/__main__.py",
    "trainer/api.py",
    "trainer/cli.py",
    "trainer/embeddings.py",
    "trainer/kernels/__main__.py",
    "trainer/monitoring/metrics_logger.py",
    "trainer/monitoring/progress_bar.py",
    "trainer/plan/__main__.py",
    "trainer/predict.py",
    "trainer/report/__main__.py",
    "trainer/report/compare.py",
    "trainer/serve/score.py",
    "trainer/training.py",
}


def prints(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_only_results_are_printed_elsewhere():
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for top in ("data_loaders", "launch", "trainer")
        for path in (REPOSITORY / top).rglob("*.py")
        if prints(path)
    }
    assert {path for path in found if not path.startswith("trainer/doctor/")} == PRINT


def test_a_line_is_printed_above_the_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal, ncols=40) as bar:
        messages.warn("rank 1 is slow")
        bar.update()
    shown = [line.rpartition("\r")[2].strip() for line in terminal.getvalue().split("\n")]
    assert shown[0] == "warning: rank 1 is slow" and shown[1].startswith("50%")


def test_a_command_is_named_as_this_shell_finds_it(tmp_path, monkeypatch):
    ours = tmp_path / "a folder" / ".venv" / "bin"
    ours.mkdir(parents=True)
    for place in (ours, tmp_path):
        (place / "clicktrainer").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(ours.parent))
    monkeypatch.chdir(tmp_path / "a folder")
    for path, expected in (
        (ours, "clicktrainer"),
        (tmp_path, ".venv/bin/clicktrainer"),
        ("", ".venv/bin/clicktrainer"),
    ):
        monkeypatch.setenv("PATH", str(path))
        assert messages.program() == expected
    monkeypatch.chdir(tmp_path)
    assert messages.program() == "'a folder/.venv/bin/clicktrainer'"
