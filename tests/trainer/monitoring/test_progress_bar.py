"""How far a run is: a bar on a terminal, lines in a log."""

import io

import pytest

from trainer.monitoring import progress_bar
from trainer.monitoring.progress_bar import ProgressBar
from trainer.runtime.progress import Progress

VALUES = {"samples_per_second": 12_345.6, "logloss": 0.45678, "auc": 0.71234, "input_wait_fraction": 0.034}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a log believes in, settable."""
    seconds = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_log_gets_a_line_now_and_then_and_at_the_end(clock):
    file = io.StringIO()
    line = ProgressBar(1000, quiet=False, file=file)
    for step, seconds in ((50, 100.0), (100, 105.0), (150, 111.0), (1000, 112.0)):
        clock[0] = seconds
        line.step(Progress(step=step, rows=step * 4096))
        line.report(Progress(step=step, rows=step * 4096), VALUES, 2.0)
    line.close()
    first, second, last = file.getvalue().splitlines()
    assert first == (
        "step 50 of 1,000 (5%): rows 204,800, samples/s 12,346, loss 0.4568, auc 0.7123, input wait 3%, 31:40 left"
    )
    assert second.startswith("step 150 of 1,000 (15%)") and last.startswith("step 1,000 of 1,000 (100%)")
    assert last.endswith("00:00 left") and "\r" not in file.getvalue()


def test_a_terminal_gets_a_bar_from_the_first_step_on():
    file = Terminal()
    line = ProgressBar(100, quiet=False, file=file)
    assert file.getvalue() == ""
    line.step(Progress(step=11))
    line.report(Progress(step=11, rows=500), {**VALUES, "auc": None, "logloss": None}, 1.0)
    line.step(Progress(step=12))
    line.close()
    drawn = file.getvalue()
    assert "| 12/100 [" in drawn and "rows=500" in drawn and "auc=–" in drawn and "loss=–" in drawn
    assert "input wait=3%" in drawn and "samples/s=12,346" in drawn and "step " not in drawn.split("\r")[0]


def test_other_ranks_are_quiet(clock):
    for file in (io.StringIO(), Terminal()):
        line = ProgressBar(100, quiet=True, file=file)
        line.step(Progress(step=1))
        line.report(Progress(step=100), VALUES, 1.0)
        line.close()
        assert file.getvalue() == ""
