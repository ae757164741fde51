"""``report.html`` of a real run on two ranks, seen by a real browser (skipped without Chromium); and of one stopped."""

import html
import json
import re
import shutil
import signal
import subprocess

import pytest

from tests.helpers import tiny, warm
from tests.helpers.faulty import SLOWLY, Job
from trainer.report.run_record import RunRecord

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SMALL = ("model.hidden_units=[8]", "log_every_steps=2")
# Written into the page once Bokeh is idle: how many figures there are, how many of them have painted something, and whether the
# page, or the table of results, is wider than its place.
PROBE = """<script>
function painted(canvas) {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
  return data.some((value) => value != 0)
}
function canvases(root) {
  const found = [...root.querySelectorAll('canvas')]
  for (const part of root.querySelectorAll('*')) if (part.shadowRoot) found.push(...canvases(part.shadowRoot))
  return found
}
function tell() {
  const figures = [...document.querySelectorAll('figure')]
  const drawn = figures.filter((one) => canvases(one).some((canvas) => canvas.width > 100 && painted(canvas)))
  const results = document.querySelector('#results .scroll')
  const wide = document.documentElement.scrollWidth > window.innerWidth || results.scrollWidth > results.clientWidth
  parent.document.body.setAttribute('data-seen', JSON.stringify([figures.length, drawn.length, wide]))
}
setTimeout(tell, 9000)
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}): apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def run(click_log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "din"
    slices = ("evaluation.slices=[hour,category_id]", "evaluation.group_by=user_id", "evaluation.every_steps=5")
    done = tiny.train(2, click_log, folder, "model=din", "sharding.types=[row_wise]", *SMALL, *slices, "report=true")
    assert done.returncode == 0, done.stderr
    return folder


def see(browser, page, profile, width):
    """(figures, drawn figures, whether the page is wider than the window), and what the console said."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},1200"]
    command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=15000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=warm.PATIENCE, stdin=subprocess.DEVNULL)
    (told,) = re.findall(r'data-seen="\[(.*?)\]"', done.stdout) or [done.stderr[-2000:]]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and ":INFO:CONSOLE" not in line]
    errors = [
        line for line in done.stderr.splitlines() if "CONSOLE" in line and re.search("error|exception", line, re.I)
    ]
    return json.loads(f"[{told}]"), console + errors


@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_draws_every_figure_of_a_run(run, browser, width, tmp_path):
    page, text = tmp_path / "report.html", (run / "report.html").read_text().replace("</body>", PROBE + "</body>")
    if width < 500:  # Chromium makes no window narrower than that
        text = f'<body><iframe width={width} height=1200 srcdoc="{html.escape(text)}"></iframe></body>'
    page.write_text(text)
    (figures, drawn, too_wide), errors = see(browser, page, tmp_path / "profile", width)
    assert errors == []
    assert figures == drawn == 7 + 3 + 2 + 2 + 1, "curves, scores, slices, tables, the plan"
    assert not too_wide


def test_the_probe_sees_a_figure_that_is_not_drawn(run, browser, tmp_path):
    text = (run / "report.html").read_text()
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", f"<figure><canvas width=300></canvas></figure>{PROBE}</body>"))
    (figures, drawn, _), _ = see(browser, page, tmp_path / "profile", 1400)
    assert figures == drawn + 1


def test_the_files_behind_the_report_agree_with_the_metrics(run):
    final, found = json.loads((run / "metrics.json").read_text()), RunRecord(run)
    assert set(found.scores) == {"valid", "test"} and found.tables["step"] == 13 == found.scores["test"]["step"]
    for split in ("valid", "test"):
        scores, bins = found.scores[split]["scores"], found.scores[split]["calibration"]
        assert sum(scores["clicks"]) + sum(scores["others"]) == final[split]["rows"]
        assert sum(part["weight"] for part in bins) == final[split]["rows"]
        assert sum(part["weight"] * part["observed"] for part in bins) == pytest.approx(sum(scores["clicks"]))
        gap = sum(part["weight"] * abs(part["observed"] - part["predicted"]) for part in bins)
        assert gap / final[split]["rows"] == pytest.approx(final[split]["ece_equal_mass"], rel=1e-9)
    assert "distribution" not in final["valid"] and "torch" in found.environment
    assert all(0 < table["trained"] <= 1 for table in found.tables["tables"])


def test_a_run_that_is_stopped_leaves_a_report_and_none_where_none_is_wanted(click_log, tmp_path):
    job = Job(click_log, tmp_path / "run")
    process = job.start("report=true", faults=SLOWLY)
    job.reach(3, process)
    process.send_signal(signal.SIGTERM)
    end = job.end(process)
    assert end.status["state"] == "preempted", end.stderr
    text = (job.run / "report.html").read_text()
    assert f"stopped at step {end.status['step']}: SIGTERM" in text and "<figure" in text
    (job.run / "report.html").unlink()
    assert job.launch("report=false").code == 0
    assert not (job.run / "report.html").exists() and not (job.run / "tables.json").exists()
