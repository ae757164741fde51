"""The guide builds without a warning, its links lead somewhere, and a reader's browser asks no other host for anything."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers import warm
from trainer import cli

REPOSITORY = Path(__file__).resolve().parents[2]
ELSEWHERE = re.compile(r"^(https?:)?//")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:trainer|data_loaders|launch|bench|conf|requirements)/[\w/.-]*)`")
COMMAND = re.compile(r"(?:^|`|/)clicktrainer ([a-z]+)", re.MULTILINE)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOW_RESULTS = """<script>setTimeout(() => document.body.dataset.found =
  document.querySelector(".md-search-result__meta").textContent, 8000)</script></body>"""


class Fetched(HTMLParser):
    """What a browser fetches to show a page: ``addresses``."""

    def __init__(self, text):
        super().__init__()
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.addresses.append(found.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.addresses += [found[name] for name in ("src", "srcset") if found.get(name)]


def broken(text, folder):
    """The relative links of a Markdown text in ``folder`` that lead nowhere, headings of other Markdown files included."""
    from markdown.extensions.toc import slugify

    found = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = folder / path
        if ELSEWHERE.match(link) or not path:
            continue
        headings = (
            re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if target.suffix == ".md" and anchor else []
        )
        if not target.exists() or (anchor and anchor not in [slugify(heading, "-") for heading in headings]):
            found.append(link)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],  # --quiet would not be strict
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    pages = {path.stem for path in (REPOSITORY / "docs").glob("*.md")}
    assert {path.stem for path in site.glob("*.html")} == {*pages, "404"}
    assert not list(site.glob("**/*.py")) and not list(site.glob("**/__pycache__"))
    assert "cannot share data.stream.shards" in (site / "search" / "search_index.json").read_text()


def test_nothing_is_fetched_from_another_host(site):
    pages = [*site.glob("*.html")]
    fetched = {address for page in pages for address in Fetched(page.read_text()).addresses}
    assert any(address.endswith(".js") for address in fetched) and any(".css" in address for address in fetched)
    assert [address for address in fetched if ELSEWHERE.match(address)] == []
    for path in site.rglob("*.css"):
        styles = path.read_text()
        asked = re.findall(r"url\(\s*['\"]?([^'\")]+)", styles) + re.findall(r"@import\s+['\"]([^'\"]+)", styles)
        assert [address for address in asked if ELSEWHERE.match(address)] == [], path.name
    assert [path.name for path in site.rglob("*.js") if "unpkg" in path.read_text()] == []


@pytest.mark.browser
def test_the_search_works_from_disk(site, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None) or pytest.skip("no browser is installed")
    page = site / "probe.html"
    page.write_text((site / "index.html").read_text().replace("</body>", SHOW_RESULTS))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=15000", "--dump-dom", f"{page.as_uri()}?q=rendezvous"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=warm.PATIENCE, stdin=subprocess.DEVNULL)
    page.unlink()
    assert re.search(r'data-found="\s*\d+ matching documents', done.stdout), done.stderr[-2000:]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(page):
    """Those into the source, too, which MkDocs does not see."""
    pytest.importorskip("markdown")
    path = REPOSITORY / page
    text = path.read_text()
    assert len(LINK.findall(text)) > 1 and broken(text, path.parent) == []


def test_files_named_on_the_pages_exist():
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {(page.name, name) for page in pages for name in FILE.findall(page.read_text())}
    assert len(named) > 20 and [pair for pair in sorted(named) if not (REPOSITORY / pair[1]).exists()] == []


def test_commands_on_the_pages_exist():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {(page.name, name) for page in pages for name in COMMAND.findall(page.read_text())}
    assert len(named) > 20 and [pair for pair in sorted(named) if pair[1] not in cli.COMMANDS] == []


def test_pages_named_in_the_source_exist():
    paths = [path for top in ("trainer", "data_loaders", "launch", "conf") for path in (REPOSITORY / top).rglob("*")]
    texts = {path: path.read_text() for path in paths if path.suffix in (".py", ".yaml")}
    named = {(path.name, page) for path, text in texts.items() for page in re.findall(r"\bdocs/[\w-]+\.md\b", text)}
    assert named and [pair for pair in named if not (REPOSITORY / pair[1]).exists()] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    pytest.importorskip("markdown")
    (tmp_path / "a.md").write_text("# One `two.three`\n")
    text = "[a](a.md) [b](a.md#one-twothree) [c](a.md#four) [d](b.md) [e](https://host/x) [f](b.md#one)"
    assert broken(text.replace("[f](b.md#one)", ""), tmp_path) == ["a.md#four", "b.md"]


def test_an_address_elsewhere_is_seen():
    page = (
        '<link rel="stylesheet" href="https://a/b.css"><link rel="canonical" href="https://c"><script src="//d/e.js">'
    )
    assert Fetched(page).addresses == ["https://a/b.css", "//d/e.js"]
