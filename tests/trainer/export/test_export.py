"""A trained run as files to serve: the same logits as the run's own, in every shape of a request; whole, or not there."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.errors import UserError
from tests.helpers import tiny, warm
from tests.helpers.exported import export, train
from trainer.checkpoint import Reader, newest
from trainer.checkpoint.tensor_file import TensorFile
from trainer.config import arguments
from trainer.export.parity import Parity
from trainer.serve import score
from trainer.serve.artifact import GOLDEN, LOGIT, MANIFEST, SERVING, Artifact
from trainer.serve.scorer import Scorer, order, probabilities
from trainer.serve.versions import CURRENT, current

CONTEXT = ("user_id", "hour", "age", "clicked_items", "clicked_categories")
MODELS = ("din", "wide_deep")  # jagged and pooled lookups; crosses, FTRL's rows


@pytest.fixture(scope="module")
def runs(click_log, tmp_path_factory):
    """{model: run folder}."""
    folder = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        average = ["optim.dense.ema_decay=0.9"] if model == "din" else []
        train(click_log, folder / model, f"model={model}", *average)
    return {model: folder / model for model in MODELS}


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for model, run in runs.items():
        export(run, folder / model)
    return {model: folder / model for model in MODELS}


@pytest.fixture(scope="module")
def rows(click_log):
    return pa.concat_tables(pq.read_table(path) for path in sorted((click_log / "test").glob("*.parquet")))


@pytest.mark.parametrize("model", MODELS)
def test_it_scores_as_the_run_predicts(model, runs, exports, rows, click_log, tmp_path):
    pq.write_table(rows, tmp_path / "in.parquet")
    given = [runs[model], "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet"]
    done = warm.run(0, "trainer.predict", [str(each) for each in given])
    assert done.returncode == 0, done.stderr
    expected = pq.read_table(tmp_path / "out.parquet")["prediction"].to_numpy()
    found = probabilities(Scorer.load(exports[model]).logits_of_rows(rows))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # blocks of another size, so other kernels


def offline(export_folder, output, *given):
    score.run(
        arguments.serve_score().parse_intermixed_args([str(export_folder), "--output", str(output), *map(str, given)])
    )
    return pq.read_table(output)


@pytest.mark.parametrize("model", MODELS)
def test_files_are_scored_as_rows_are_with_their_keys(model, exports, rows, tmp_path, monkeypatch):
    """Two files, row groups of other sizes than the blocks, integers of another width and strings as dictionaries."""
    monkeypatch.setattr(score, "BLOCK", 64)
    given = rows.append_column("key", pa.array([f"é{i}" for i in range(len(rows))]).dictionary_encode())
    narrow = given.set_column(given.column_names.index("item_id"), "item_id", given["item_id"].cast(pa.int16()))
    pq.write_table(given.slice(0, 101), tmp_path / "a.parquet", row_group_size=37)
    pq.write_table(narrow.slice(101), tmp_path / "b.parquet", row_group_size=150)
    inputs = ["--input", tmp_path / "a.parquet", tmp_path / "b.parquet", "--keep", "key", "item_id"]
    found = offline(exports[model], tmp_path / "scores" / "s.parquet", *inputs)
    assert found.column_names == ["key", "item_id", "prediction"]
    assert found["key"].to_pylist() == [f"é{i}" for i in range(len(rows))]
    assert found["item_id"].to_pylist() == rows["item_id"].to_pylist()
    expected = probabilities(Scorer.load(exports[model]).logits_of_rows(rows))
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected, rtol=0, atol=1e-6)  # blocks of another size
    assert offline(exports[model], tmp_path / "scores" / "s.parquet", *inputs).equals(found)  # replaces its own
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["s.parquet"]


def test_mistakes_in_files_to_score_are_named_and_leave_the_output_as_it_was(exports, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "BLOCK", 8)
    din, output = exports["din"], tmp_path / "s.parquet"
    rows = rows.slice(0, 40)

    def changed(name, values):
        pq.write_table(
            rows.set_column(rows.column_names.index(name), name, values), tmp_path / "in.parquet", row_group_size=20
        )

    changed("hour", rows["hour"])
    before = offline(din, output, "--input", tmp_path / "in.parquet")
    ages = rows["age"].to_pylist()
    changed("age", pa.array([*ages[:33], None, *ages[34:]], rows["age"].type))
    with pytest.raises(
        UserError, match=r"in.parquet', row group 1, row 13: .*'age' .* is null: give schema.features.age.fill"
    ):
        offline(din, output, "--input", tmp_path / "in.parquet")
    changed("hour", pa.array([f"h{i}" for i in range(40)]))
    with pytest.raises(UserError, match=r"in.parquet.hour has type string, the training data "):
        offline(din, output, "--input", tmp_path / "in.parquet")
    pq.write_table(rows.drop_columns(["age"]), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="age"):
        offline(din, output, "--input", tmp_path / "in.parquet")
    assert pq.read_table(output).equals(before) and {path.name for path in tmp_path.iterdir()} == {
        "in.parquet",
        "s.parquet",
    }
    with pytest.raises(UserError, match="lies in the export"):
        offline(din, din / "s.parquet", "--input", tmp_path / "in.parquet")
    with pytest.raises(UserError, match="is among the files of --input|is not what this command writes"):
        offline(din, tmp_path / "in.parquet", "--input", tmp_path / "in.parquet")


@pytest.mark.parametrize("model", MODELS)
def test_a_request_scores_as_its_rows(model, exports, rows):
    """The context once, JSON's values; histories that are empty, short and longer than max_length."""
    scorer = Scorer.load(exports[model])
    names = list(scorer.types)
    table = rows.select([name for name in names if name in rows.column_names])
    expected = []
    requests = []
    for start in range(0, 60, 6):
        part = table.slice(start, 6)
        context = {name: part.column(name)[0].as_py() for name in CONTEXT}
        if start == 6:
            context |= {"clicked_items": [], "clicked_categories": []}
        if start == 12:
            context |= {"clicked_items": list(range(1, 12)), "clicked_categories": [i % 20 for i in range(1, 12)]}
        candidates = {name: part.column(name).to_pylist() for name in names if name not in CONTEXT}
        whole = {**candidates, **{name: [value] * 6 for name, value in context.items()}}
        expected.append(scorer.logits_of_rows(pa.table({n: pa.array(v, scorer.types[n]) for n, v in whole.items()})))
        requests.append(scorer.request(context, candidates))
    for request, logits in zip(requests, expected):
        np.testing.assert_allclose(scorer.logits([request])[0], logits, rtol=0, atol=1e-5)
    for found, logits in zip(scorer.logits(requests), expected):  # merged
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)


def test_missing_columns_follow_the_schemas_policy(exports, rows):
    scorer = Scorer.load(exports["din"])
    candidates = {
        "item_id": [3, 4],
        "category_id": [1, 1],
        "tags": [[1], []],
        "price": [None, 2.0],
        "age": [30.0, 30.0],
    }
    scores = scorer.score({"user_id": rows.column("user_id")[0].as_py()}, candidates)  # no hour, no history
    assert np.isfinite(scores).all()
    with pytest.raises(UserError, match="'age' .* is null: give schema.features.age.fill"):
        scorer.score({}, {key: value for key, value in candidates.items() if key != "age"})
    with pytest.raises(UserError, match="history 'clicked' has clicked_categories among the candidates"):
        scorer.score({"clicked_items": [1]}, {**candidates, "clicked_categories": [[1], [2]]})
    with pytest.raises(UserError, match="age: in the context and among the candidates"):
        scorer.score({"age": 3.0}, candidates)


def test_the_pages_example_of_python_runs_as_it_stands(exports, tmp_path, monkeypatch):
    """docs/serving.md, on a log that has its columns."""
    (example,) = re.findall(r"```python\n(.*?)```", (tiny.REPOSITORY / "docs" / "serving.md").read_text(), re.DOTALL)
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "shop").symlink_to(exports["din"])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    found = names["probabilities"]
    assert found.shape == (3,) and ((found > 0) & (found < 1)).all()
    assert names["best"].tolist() == order(found)[:2].tolist() and (names["of_best"] == found[names["best"]]).all()


def test_the_order_of_candidates_is_stable():
    scores = np.array([0.5, np.nan, 0.5, 0.9, 0.5], np.float32)
    assert order(scores).tolist() == [3, 0, 2, 4, 1]


def test_golden_rows_are_those_of_the_export(exports):
    artifact = Artifact(current(exports["din"]))
    golden = artifact.golden()
    assert golden.num_rows == 256
    found = Scorer.open(artifact).logits_of_rows(golden.drop_columns([LOGIT]))
    np.testing.assert_allclose(found, golden.column(LOGIT).to_numpy(), rtol=0, atol=artifact.serving["tolerance"])


def test_averages_stand_in_the_parameters_place(runs, exports):
    reader = Reader(newest(runs["din"] / "checkpoints"))
    dense = TensorFile(current(exports["din"]) / "dense.safetensors")
    (name, *_) = [
        name for name in reader.names if name.startswith("average/") and name.endswith("deep.layers.0.weight")
    ]
    parameter = name.removeprefix("average/")
    assert (dense[parameter.removeprefix("model.")] == reader.read(name)).all()
    assert (reader.read(f"dense/{parameter}") != reader.read(name)).any()


def test_the_same_model_again_is_the_same_version_and_an_equal_table_is_shared(runs, exports, tmp_path):
    shutil.copytree(exports["din"], tmp_path / "e")
    before = current(tmp_path / "e")
    export(runs["din"], tmp_path / "e")
    assert current(tmp_path / "e") == before
    export(runs["din"], tmp_path / "e", "export.rows=100")
    after = current(tmp_path / "e")
    assert after != before and os.path.samefile(before / "table-0.safetensors", after / "table-0.safetensors")
    assert not [path for path in (tmp_path / "e").iterdir() if path.name.startswith(".tmp")]


def test_int8_is_smaller_and_refused_where_it_costs_too_much(runs, tmp_path, monkeypatch):
    export(runs["din"], tmp_path / "e", "export.tables=int8", "--no-publish")
    assert not (tmp_path / "e" / CURRENT).exists()
    (version,) = (tmp_path / "e").iterdir()
    assert (version / "table-0.safetensors").stat().st_size < 8192 + 500 * (8 + 8)
    serving = json.loads((version / SERVING).read_text())
    assert 0 < serving["metrics"]["export"]["largest"] < 0.1
    with monkeypatch.context() as patch:
        patch.setattr(Parity, "auc_loss", property(lambda self: 2e-4))
        with pytest.raises(
            UserError, match="tables as int8 cost 0.0002 AUC on 500 rows of valid, more than export.max_auc_loss"
        ):
            export(runs["din"], tmp_path / "f", "export.tables=int8")
    assert list((tmp_path / "f").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda v: (v / GOLDEN).unlink(), "golden.arrow is missing"),
        (lambda v: (v / MANIFEST).unlink(), "MANIFEST.json"),
        (lambda v: (v / "extra").write_text("x"), "extra is not in MANIFEST.json"),
        (lambda v: flip(v / "table-1.safetensors"), "table-1.safetensors differs from MANIFEST.json"),
        (lambda v: (v / SERVING).write_text("{}"), "serving.json has 2 bytes"),
    ],
)
def test_a_damaged_version_is_refused(exports, tmp_path, damage, expected):
    shutil.copytree(exports["din"], tmp_path / "e")
    version = current(tmp_path / "e")
    damage(version)
    with pytest.raises(UserError, match=expected):
        Artifact(version)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_folder_without_an_export_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="holds no exported model: write one with clicktrainer export RUN --output"):
        current(tmp_path)


def test_head_onnx_gives_the_run_s_logits_by_another_engine(runs, rows, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    version = current(export(runs["wide_deep"], tmp_path, "export.onnx=true"))
    assert "head.onnx" in capsys.readouterr().out
    artifact, scorer, seen = Artifact(version), Scorer.load(version), []
    with scorer.model.head.register_forward_pre_hook(lambda _, given: seen.append(given)):
        expected = scorer.logits_of_rows(rows.slice(0, 50))
    dense, pooled, _ = seen[0]
    session = runtime.InferenceSession(version / "head.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["dense", "pooled"]
    for count in (1, 7, 50):
        given = {"dense": dense[:count].numpy(), "pooled": pooled.values()[:count].numpy()}
        (found,) = session.run(["logit"], given)
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5)
    assert artifact.serving["metrics"]["onnx"]["largest"] < 1e-5


def test_a_head_over_histories_has_no_onnx_and_the_export_says_so(runs, tmp_path, capsys):
    version = current(export(runs["din"], tmp_path, "export.onnx=true"))
    assert "No head.onnx: its head takes more than numbers and pooled vectors" in capsys.readouterr().out
    assert not (version / "head.onnx").exists() and Artifact(version).serving["metrics"]["onnx"] is None
