"""The page: drawn from files alone, whatever is there; in one file; small; and it shows text as text."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from launch.sweep import trials
from tests.helpers import warm
from trainer.report import compare, curves, page, texts
from trainer.report.drawing import draw_or_warn
from trainer.report.run_record import RunRecord

NASTY = "<script>alert(1)</script>"
MEGABYTE = 1e6
FETCHED = {"src", "srcset", "href", "data", "action", "poster", "background"}


class Fetched(HTMLParser):
    """Addresses that a browser would load, and the text of styles."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags, self.styles, self.inside = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        self.addresses += [value for name, value in attributes if name in FETCHED and tag != "a"]

    def handle_data(self, data):
        if self.inside == "style":
            self.styles.append(data)


def parsed(text):
    parser = Fetched()
    parser.feed(text)
    return parser


def line(split, step, **values):
    return {"step": step, "epoch": step // 50_000, "rows_trained": step * 256, "split": split, **values}


def figures(value):
    names = ("auc", "logloss", "ne", "calibration", "samples_per_second", "input_wait_fraction")
    return {name: value + place for place, name in enumerate(names)} | {"rows": 1000, "label_mean": 0.2}


def write(folder, lines, **files):
    """A run folder with these lines; ``files`` by name without ending."""
    folder.mkdir(exist_ok=True)
    config = {
        "model": {"name": "deepfm"},
        "data": {"name": "clicks", "schema": {"features": {NASTY: {"kind": "dense"}}}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(part) + "\n" for part in lines))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def nasty_run(folder):
    slices = [
        {"value": value, "rows": 50, "auc": 0.7, "logloss": 0.5, "calibration": 1.0, "label_mean": 0.3}
        for value in (NASTY, None)
    ]
    test = figures(0.5) | {"slices": {NASTY: [*slices, slices[0] | {"value": "$$x$$"}]}, "data": {f"{NASTY}.null": 3}}
    table = {"table": NASTY, "rows": 10, "sampled": 10, "dim": 4, "optimizer": "sgd", "trained": None}
    table |= {"missing_row": None, "missing_row_trained": None, "norms": {"all": {"mean": 1.0, "quantiles": [1.0] * 7}}}
    known = table | {
        "trained": 0.25,
        "norms": {"trained": table["norms"]["all"]},
        "missing_row": 0,
        "missing_row_trained": True,
    }
    scores = {"edges": [-1.0, 0.0, 1.0], "clicks": [1.0, 2.0], "others": [3.0, 0.0]}
    bins = [{"weight": 4.0, "predicted": 0.3, "observed": 0.25}, {"weight": 2.0, "predicted": 0.7, "observed": 1.0}]
    return write(
        folder,
        [line("train", 10, **figures(0.4)), line("valid", 10, **figures(0.3)), line("test", 10, **test)],
        metrics={
            "train": figures(0.4) | {"seconds": 5.0},
            "test": test,
            "alerts": [{"name": NASTY, "step": 3, "message": NASTY}],
        },
        status={"state": "finished", "step": 10, "reason": NASTY},
        plan=[{"table": NASTY, "sharding": NASTY, "bytes": {"0": 1000, "1": 500}, "rows": 10, "dim": 4}],
        tables={"step": 10, "tables": [table, known]},
        distributions={"test": {"step": 10, "scores": scores, "calibration": bins}},
        environment={"machine": NASTY},
    )


def test_what_comes_from_the_data_is_text(tmp_path):
    plain, nasty = (
        page.html(RunRecord(write(tmp_path / "plain", []))),
        page.html(RunRecord(nasty_run(tmp_path / "nasty"))),
    )
    assert NASTY not in nasty and "&lt;script&gt;alert(1)&lt;/script&gt;" in nasty
    tags = parsed(nasty).tags
    assert tags.count("script") == 3, "Bokeh, its log level, its documents"
    assert parsed(plain).tags.count("script") == 0, "nothing to draw"
    assert tags.count("figure") == 6 + 2 + 1 + 2 + 1
    # Bokeh would load MathJax from elsewhere for text that looks like TeX.
    documents = re.search(r"docs_json = '(.*?)';\n", nasty, re.S).group(1)
    assert "$$" not in documents and "$\\\\u200b$" in documents or "$\u200b$" in documents


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    found = parsed(page.html(RunRecord(nasty_run(tmp_path / "run"))))
    assert found.addresses == ["data:,"]
    assert not re.search(r"url\(|@import", "".join(found.styles))


def test_the_page_of_a_long_run_on_many_ranks_is_small(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.random((200_000, 6)).round(6)
    names = ("auc", "logloss", "ne", "calibration", "samples_per_second", "input_wait_fraction")
    lines = [line("train", step, **dict(zip(names, row.tolist()))) for step, row in enumerate(noise, 1)]
    lines += [line("valid", step, **figures(0.5)) for step in range(1, 200_000, 50)]
    lines[123_456] |= {"logloss": 77.125}
    kinds = {"sharding": "row_wise", "dim": 64, "rows": 10**7}
    plan = [kinds | {"table": f"t{n}", "bytes": {str(rank): 10**7 + n for rank in range(256)}} for n in range(500)]
    norms = {"trained": {"mean": 1.0, "quantiles": [1.0] * 7}}
    table = {"rows": 10**7, "sampled": 1 << 20, "dim": 64, "optimizer": "adagrad", "trained": 0.5, "norms": norms}
    table |= {"missing_row": 0, "missing_row_trained": True}
    tables = {"step": 5, "tables": [table | {"table": f"t{n}"} for n in range(500)]}
    write(tmp_path / "run", lines, plan=plan, tables=tables)
    run = RunRecord(tmp_path / "run")
    page.write(run.folder, tmp_path / "report.html")
    assert 1.2 * MEGABYTE < (tmp_path / "report.html").stat().st_size < 3 * MEGABYTE
    assert len(run.histories["train"].lines) == 200_000
    kept = curves.cards(run)[0].plot.renderers[0].data_source.data["value"]
    assert len(kept) <= 1000 and 77.125 in kept


def test_steps_that_were_trained_again_count_once_and_a_torn_line_not_at_all(tmp_path):
    steps = [("train", 10), ("train", 20), ("valid", 20), ("train", 30), ("valid", 30), ("train", 15), ("train", 20)]
    folder = write(tmp_path / "run", [line(split, step, auc=place) for place, (split, step) in enumerate(steps)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"broken\n{"step": 25, "split": "tra')
    run = RunRecord(folder)
    assert run.histories["train"].column("step").tolist() == [10, 15, 20]
    assert run.histories["train"].column("auc").tolist() == [0, 5, 6]
    assert run.histories["valid"].lines == [] and run.unreadable == 1
    assert "1 lines of metrics.jsonl could not be read." in texts.remarks(run)


def test_report_comparison_and_sweep_show_one_curve_of_a_run_that_was_resumed_from_an_earlier_step(tmp_path):
    steps = [("train", 10), ("valid", 10), ("train", 20), ("valid", 20), ("train", 30), ("valid", 30)]
    resumed = [("train", 20), ("valid", 20), ("train", 30)]  # from a checkpoint of step 15
    lines = [line(split, step, auc=place / 10) for place, (split, step) in enumerate([*steps, *resumed])]
    folder = write(tmp_path / "run", lines, status={"state": "running"})
    expected = {"valid": [(2560, 0.1), (5120, 0.7)], "train": [(2560, 0.0), (5120, 0.6), (7680, 0.8)]}
    (card,) = curves.cards(RunRecord(folder))
    drawn = {r.data_source.data["name"][0]: r.data_source.data for r in card.plot.renderers}
    for split, title in (("valid", "valid"), ("train", "training")):
        assert list(zip(drawn[title]["rows"], drawn[title]["value"])) == expected[split]
        runs = compare.read_all([folder])
        (renderer, *_) = curves.comparison(runs, f"{split}.auc").plot.renderers
        assert list(zip(renderer.data_source.data["rows"], renderer.data_source.data["value"])) == expected[split]
        shown = compare.curves(runs, f"{split}.auc")
        assert shown == {f"{rows:,}": [f"{value:.5f}"] for rows, value in expected[split]}
        assert trials.evaluations(folder, f"{split}.auc") == [value for _, value in expected[split]]


def test_a_run_that_goes_on_shows_its_last_lines_and_not_an_earlier_end(tmp_path):
    old = {"train": figures(0.9) | {"seconds": 1.0}, "valid": figures(0.9)}
    lines = [line("train", 10, **figures(0.1)), line("valid", 10, **figures(0.25))]
    folder = write(tmp_path / "run", lines, metrics=old, status={"state": "running"})
    tiles = dict(texts.tiles(RunRecord(folder)))
    assert tiles["valid AUC"] == "0.2500" and tiles["rows trained"] == "2,560" and "training time" not in tiles
    assert texts.state(RunRecord(folder)) == "running at step 10"
    (folder / "status.json").write_text('{"state": "finished", "step": 10}')
    assert dict(texts.tiles(RunRecord(folder)))["valid AUC"] == "0.9000"
    page.html(RunRecord(folder))


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    text = page.html(RunRecord(write(tmp_path / "run", [])))
    assert "deepfm on clicks" in text and "<figure" not in text
    one = [line("train", 1, auc=None, logloss=0.7)]  # a class is missing
    assert page.html(RunRecord(write(tmp_path / "run", one))).count("<figure") == 1


def test_the_command_draws_to_where_it_is_told_and_explains_a_mistake(tmp_path):
    run, output = nasty_run(tmp_path / "run"), tmp_path / "other.html"
    done = warm.run(0, "trainer.report", [run, "--output", output])
    assert done.returncode == 0 and done.stdout.split() == [str(output)] and output.exists(), done.stderr
    assert not (run / "report.html").exists()
    wrong = warm.run(0, "trainer.report", [tmp_path])
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: {tmp_path} has no config.yaml: give the folder of a run\n"


@pytest.mark.parametrize("content", [b"", b"[", b'{"step": "x", "tables": 5}', b'[{"table": 1}]'])
def test_a_damaged_file_costs_its_own_section_alone(tmp_path, capsys, content):
    run = nasty_run(tmp_path / "run")
    whole = page.html(RunRecord(run))
    assert capsys.readouterr().err == ""
    names = ("status", "metrics", "plan", "distributions", "tables", "environment")
    for name in names:
        (run / f"{name}.json").write_bytes(content)
    page.write(run, tmp_path / "report.html")
    assert "Configuration" in whole and "Configuration" in (tmp_path / "report.html").read_text()
    told = capsys.readouterr().err.splitlines()
    assert told and all(each.startswith("warning: ") and str(run) in each for each in told)


@pytest.mark.parametrize("reason", ["config", "bokeh"])
def test_a_report_that_cannot_be_drawn_is_a_warning(reason, tmp_path, capsys, monkeypatch):
    run = nasty_run(tmp_path / "run")
    if reason == "config":
        (run / "config.yaml").write_text("[")
    else:
        monkeypatch.setitem(sys.modules, "trainer.report.page", None)
        monkeypatch.delattr("trainer.report.page")
    draw_or_warn(run)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: {run}/report.html was not drawn (") and f"clicktrainer report {run}" in told
    assert not (run / "report.html").exists()
