"""What BARS publishes, and the verdict on made-up runs."""

import hashlib
import json

import pytest
import yaml

from bench import bars

RESULTS = bars.known()["results"]
DATA = bars.known()["data"]


def fake_run(folder, name="din_amazon_electronics_x1", change=None, **test):
    """A run folder whose metrics and data are the published ones, but for ``test``; ``change(config, metrics)``."""
    model, data = name.split("_", 1) if not name.startswith("wide_deep") else ("wide_deep", name[10:])
    facts = DATA[data]
    published = {metric: figures.mean for metric, figures in bars.metrics_of(RESULTS[name]).items()}
    metrics = {"test": {"rows": facts["rows"]["test"], **published, **test}}
    if "valid" in facts["rows"]:
        metrics["valid"] = {"rows": facts["rows"]["valid"]}
    values = facts["values"]
    tables = values if "all" not in values else {"a": 100, "b": values["all"] - 100}
    schema = {"tables": {table: {"num_embeddings": count + 2} for table, count in tables.items()}}
    config = {"model": {"name": model}, "data": {"name": data, "schema": schema}}
    if change:
        change(config, metrics)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_the_published_figures_of_the_issue_are_listed(capsys):
    assert bars.main(["list"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(shown) == {"experiment", *(f"bars/{name}" for name in RESULTS)}
    for name, figure in (
        ("wide_deep_criteo_x4", "0.8142"),
        ("deepfm_criteo_x4", "0.8143"),
        ("din_amazon_electronics_x1", "0.8835"),
        ("din_taobao_ad_x1", "0.5765"),
    ):
        first = RESULTS[name].get("gauc", RESULTS[name]["auc"])[0]
        assert f"{first:.4f}" == figure and f"{first:.6f}" in shown[f"bars/{name}"]
    assert [f"{RESULTS[f'{model}_avazu_x1']['auc'][0]:.4f}" for model in ("wide_deep", "deepfm")] == [
        "0.7649",
        "0.7648",
    ]


def test_mean_and_deviation_of_several_runs_are_those_that_bars_prints():
    auc = bars.metrics_of(RESULTS["wide_deep_avazu_x1"])["auc"]
    assert str(auc) == "0.764638 ± 0.000542"
    assert auc.tolerance == pytest.approx(3 * 0.00054167, abs=1e-7)
    assert bars.metrics_of(RESULTS["deepfm_criteo_x1"])["auc"].tolerance == 0.001
    assert bars.Published((0.5,)).tolerance == 0.001 and bars.Published((0.5,)).deviation is None


@pytest.mark.parametrize("name", RESULTS)
def test_a_run_with_the_published_figures_reproduces(tmp_path, capsys, name):
    assert bars.main(["check", fake_run(tmp_path / "run", name)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("\nreproduced\n") and "NOT" not in said and RESULTS[name]["source"] in said


@pytest.mark.parametrize(
    ("difference", "code", "said"),
    [
        (0.0009, 0, "+0.000900: within 0.0010 (the smallest: 0.001)"),
        (-0.00015, 0, "-0.000150: within 0.0010 (the smallest: 0.0002)"),
        (-0.0041, 1, "-0.004100: NOT within 0.0010 (the smallest: 0.005)"),
        (0.0041, 1, "+0.004100: NOT within 0.0010 (the smallest: 0.005)"),
        (-0.2, 1, "-0.200000: NOT within 0.0010 (more than 0.05 off)"),
    ],
)
def test_the_verdict_names_the_difference_and_the_finest_tolerance_that_would_do(
    tmp_path, capsys, difference, code, said
):
    run = fake_run(tmp_path / "run", gauc=0.883526 + difference)
    assert bars.main(["check", run]) == code
    lines = capsys.readouterr().out.splitlines()
    assert said in next(line for line in lines if line.startswith("gauc"))
    assert lines[-1] == ("reproduced" if code == 0 else "not reproduced")


def test_other_rows_or_another_vocabulary_are_no_reproduction(tmp_path, capsys):
    def fewer_rows(config, metrics):
        metrics["test"]["rows"] -= 1

    def another_table(config, metrics):
        config["data"]["schema"]["tables"]["b"]["num_embeddings"] += 1

    for change, row in ((fewer_rows, "rows of test"), (another_table, "values of all")):
        assert bars.main(["check", fake_run(tmp_path / "run", "deepfm_criteo_x4", change)]) == 1
        wrong = [line for line in capsys.readouterr().out.splitlines() if "NOT as published" in line]
        assert len(wrong) == 1 and wrong[0].startswith(row)


def test_raw_files_are_compared_by_md5(tmp_path, capsys, monkeypatch):
    (tmp_path / "train.csv").write_text("label\n1\n")
    (tmp_path / "test.csv").write_text("label\n0\n")
    facts = bars.known()
    expected = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in ("train.csv", "test.csv")}
    facts["data"]["amazon_electronics_x1"]["md5"] = expected
    monkeypatch.setattr(bars, "known", lambda: facts)
    run = fake_run(tmp_path / "run")
    assert bars.main(["check", run, f"data={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("md5 of") == 2
    (tmp_path / "test.csv").write_text("label\n1\n")
    assert bars.main(["check", run, f"data={tmp_path}"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "NOT" in line]
    assert len(wrong) == 1 and wrong[0].startswith("md5 of test.csv")


def without(part, key):
    def change(config, metrics):
        (config if part == "config" else metrics["test"]).pop(key)

    return change


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda f: [str(f / "absent")], "absent has no config.yaml: give the folder of a run"),
        (lambda f: [fake_run(f / "r"), f"folder={f}"], "give the raw files' folder as data=DIR"),
        (lambda f: [fake_run(f / "r"), f"data={f}/none"], "No such file or directory"),
        (lambda f: [fake_run(f / "r", change=without("test", "gauc"))], "no gauc of test: set evaluation.group_by"),
        (lambda f: [fake_run(f / "r", change=lambda c, _: c["model"].update(name="fm"))], "nothing is published"),
        (lambda f: [fake_run(f / "r", change=lambda c, _: c["data"]["schema"].update(tables={}))], "no table item_id"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, said):
    assert bars.main(["check", *arguments(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    assert said in streams.err
