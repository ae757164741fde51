"""The tutorial's commands run as they stand on the page, on a smaller log.

Fenced ``yaml`` and ``python`` blocks are files, whose name is in their first line; ``bash`` blocks are run in their order, but
for those behind a comment ``<!-- not in the test: why -->`` (the first one, TensorBoard, and two more days).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_loaders import example_log
from tests.helpers import warm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
SESSIONS = 150  # a day
BLOCK = re.compile(r"(?:<!-- (not in the test): [^>]+ -->\n)?```(bash|yaml|python)\n(.*?)```", re.DOTALL)
LEFT_OUT = 3


def test_the_page_has_the_blocks_that_the_test_takes():
    found = BLOCK.findall(PAGE)
    assert len(found) == PAGE.count("```bash") + PAGE.count("```yaml") + PAGE.count("```python")
    assert sum(bool(left_out) for left_out, _, _ in found) == PAGE.count("<!-- not in the test") == LEFT_OUT


@pytest.mark.slow
def test_every_command_of_the_page_does_what_it_says(tmp_path):
    example_log.write(tmp_path / "raw", sessions=SESSIONS)
    install(tmp_path / "bin")
    printed = {}
    for left_out, language, text in BLOCK.findall(PAGE):
        if language != "bash":
            name = re.match(r"# (\S+)\n", text).group(1)
            (tmp_path / name).write_text(text)
        elif not left_out:
            printed[text] = run(text, tmp_path)
    check(tmp_path, "\n".join(printed.values()))


def install(folder: Path) -> None:
    """``clicktrainer``, as `make setup` installs it."""
    folder.mkdir()
    program = folder / "clicktrainer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trainer "$@"\n')
    program.chmod(0o755)


def run(commands: str, folder: Path) -> str:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def check(folder: Path, printed: str) -> None:
    import pyarrow.parquet as pq

    for words in (
        "clickout item",
        "--config-dir data/hotels data=hotels",
        "test GAUC",
        "model.cosine",
        "Warm start from",
    ):
        assert words in printed, words
    result = json.loads((folder / "test.json").read_text())["test"]
    assert {one["value"] for one in result["slices"]["device_name"]} <= {"mobile", "desktop", "tablet"}
    assert "hit_rate@1" in result and "gauc" in result
    assert pq.read_table(folder / "scores.parquet").num_rows == result["rows"]
    assert pq.read_table(folder / "new_scores.parquet").column_names == ["session_id", "hotel", "prediction"]
    days = json.loads((folder / "daily" / "report.json").read_text())
    assert [day["day"] for day in days] == ["2026-11-01", "2026-11-02"]
    assert days[1]["ids"]["added"] > 0
