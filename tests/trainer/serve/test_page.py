"""The server's page in a real browser (skipped without Chromium): form, ranked answer, mistakes, colours, a narrow screen."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.helpers import warm
from tests.helpers.exported import export, serving, train
from trainer.serve import app
from trainer.serve.versions import current

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGE = app.PAGE.read_text()
SCHEMES = {"dark": 0, "light": 1}
LONG = 2**53 + 1  # which a JavaScript number cannot hold
CONTEXT = {"clicked_items": [1, 5], "clicked_categories": [2, 3]}
CANDIDATES = {"item_id": [3, 4, 5], "age": [31.0, 31.0, 31.0], "price": [None, 2.0, 3.5]}
FIELDS = {name: json.dumps(value) for name, value in (CONTEXT | CANDIDATES).items()}
# Fills the form, scores, sends a mistake, moves a column, and says what was seen.
PROBE = """<script>
const wait = async done => { for (let n = 0; n < 200 && !done(); n++) await new Promise(next => setTimeout(next, 20)); };
const input = name => document.querySelector(`[name="${name}"]`);
const rgb = color => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
(async () => {
  await wait(() => input("item_id") && document.querySelector("#about").textContent);
  for (const [name, value] of Object.entries(FIELDS)) input(name).value = value;
  element("form").requestSubmit();
  await wait(() => !element("answer").hidden);
  const seen = { context: [...document.querySelectorAll("#context input")].map(one => one.name) };
  seen.titles = [...element("answer").tHead.rows[0].cells].slice(0, -1).map(cell => cell.textContent);
  seen.rows = [...element("answer").tBodies[0].rows].map(row => [...row.cells].slice(0, -1).map(cell => cell.textContent));
  seen.bars = [...document.querySelectorAll(".bar div")].map(bar => bar.style.width);
  seen.wide = document.documentElement.scrollWidth > window.innerWidth;
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.colors = ["color", "background-color"].map(kind => {
    const probe = Object.assign(document.createElement("p"), { style: "color: CanvasText; background-color: Canvas" });
    document.body.append(probe); const found = rgb(getComputedStyle(probe)[kind === "color" ? "color" : "backgroundColor"]);
    probe.remove(); return found;
  });
  seen.colors.push(rgb(getComputedStyle(element("error")).color));
  seen.long = read("[LONG, 2]", columns.item_id, "candidates");
  seen.text = [read("12", { type: ["string", "null"] }, "context"), read("null", { type: ["string", "null"] }, "context")];
  seen.unnamed = [...document.querySelectorAll("input, button")].filter(
    one => one.tabIndex < 0 || !(one.labels?.length || one.getAttribute("aria-label") || one.type === "submit")).length;
  input("item_id").value = '[3, "x", 5]';
  element("form").requestSubmit();
  await wait(() => element("error").textContent);
  seen.error = [element("error").textContent, element("answer").hidden];
  input("price").parentElement.querySelector("button").click();
  seen.moved = [input("price").closest("#context") !== null, document.activeElement.getAttribute("aria-label")];
  const asked = performance.getEntriesByType("resource").map(one => one.name);
  seen.outside = asked.filter(name => !name.startsWith(top.location.origin));
  parent.document.body.setAttribute("data-seen", JSON.stringify(seen));
})();
</script>""".replace("FIELDS", json.dumps(FIELDS), 1).replace("LONG", str(LONG))


@pytest.fixture(scope="module")
def browser():
    return next(filter(None, map(shutil.which, BROWSERS)), None) or pytest.skip("no browser is installed")


@pytest.fixture(scope="module")
def server(browser, click_log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = train(click_log, folder / "din", "model=din")
    with serving(current(export(run, folder / "exports"))) as running:
        yield running


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 320)])
def test_a_browser_scores_by_the_form(server, browser, scheme, width, tmp_path, monkeypatch):
    text = PAGE.replace("</html>", PROBE + "</html>")
    if width < 500:  # Chromium makes no window narrower than that
        text = f'<body><iframe width={width} height=1200 srcdoc="{html.escape(text)}"></iframe></body>'
    monkeypatch.setattr(app, "PAGE", tmp_path / "page.html")
    app.PAGE.write_text(text)
    seen = see(browser, server.port, scheme, tmp_path / "profile")
    scores = server.batcher.scorer.score(CONTEXT, CANDIDATES)
    best = sorted(range(3), key=lambda place: -scores[place])
    assert set(CONTEXT) == set(seen["context"])
    rows = [dict(zip(seen["titles"], row, strict=True)) for row in seen["rows"]]
    assert [(row["#"], row["item_id"]) for row in rows] == [
        (str(n + 1), str(3 + place)) for n, place in enumerate(best)
    ]
    assert [float(row["probability"]) for row in rows] == pytest.approx([scores[place] for place in best], abs=5e-6)
    widths = [float(bar.removesuffix("%")) for bar in seen["bars"]]
    assert widths == pytest.approx([100 * scores[place] / scores[best[0]] for place in best], rel=1e-3)
    message, hidden = seen["error"]
    assert "candidates.item_id, row 1: 'x' is not an integer" in message and hidden
    assert seen["long"] == [str(LONG), 2] and seen["text"] == ["12", None]
    assert seen["moved"] == [True, "price among the candidates"] and seen["unnamed"] == 0
    assert not seen["wide"] and seen["outside"] == [] and seen["dark"] == (scheme == "dark")
    ink, paper, error = map(luminance, seen["colors"])
    assert contrast(ink, paper) >= 7 and contrast(error, paper) >= 4.5


def see(browser, port, scheme, profile):
    """What ``PROBE`` tells; every other host's name fails."""
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--no-first-run",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1200,1200"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=15000"]
    command += ["--dump-dom", f"http://127.0.0.1:{port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=warm.PATIENCE, stdin=subprocess.DEVNULL)
    told = re.search(r'data-seen="(.*?)"', done.stdout)
    assert told, done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads(html.unescape(told.group(1)))


def luminance(color):
    """Relative luminance (WCAG 2.2) of 8-bit sRGB."""
    parts = [value / 255 for value in color]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
