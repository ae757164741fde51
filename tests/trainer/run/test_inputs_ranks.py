"""Inputs beyond ids and numbers in whole jobs: sharded on two ranks as unsharded, saved and restored, exported."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders import synthetic
from tests.helpers import tiny
from tests.helpers.exported import export
from tests.helpers.jobs import check_against_unsharded, check_round_trip
from tests.helpers.ranks import run_distributed
from trainer import Run, train
from trainer.run.resume import LATER, job_identity
from trainer.serve.scorer import Scorer, probabilities

VECTORS = (
    "+data.schema.features={image: {kind: vector, dim: 5, project: 3, normalize: l2, fill: 0}, "
    "text: {kind: vector, dim: 4}}",
)
WEIGHTS = (
    "+data.schema.features={interests: {kind: sparse, table: interest, ids: hash, max_length: 5, weights: shares}, "
    "words: {kind: sequence, table: word, max_length: 4, weights: counts}, word: {kind: sparse, table: word}}",
    "+data.schema.tables={interest: {num_embeddings: 60}, word: {num_embeddings: 30, pooling: sum}}",
)
INPUTS = {"vectors": VECTORS, "weights": WEIGHTS}
MODELS = ("din", "deepfm")  # inputs as they are, and as fields


@pytest.fixture(scope="module", params=INPUTS)
def log(request, tmp_path_factory):
    """A log with such inputs, and what declares them."""
    root, overrides = tmp_path_factory.mktemp(request.param), INPUTS[request.param]
    config = tiny.job(root, *overrides).config
    options = {"seed": 3, "probability": "click_probability", "rows_per_file": 1100, "row_group_size": 250}
    synthetic.write(config.data.schema, root, rows=tiny.ROWS, **options)
    if overrides is WEIGHTS:
        add_weights(root, {"shares": "interests", "counts": "words"})
    return root, overrides


def add_weights(root, columns):
    rng = np.random.default_rng(0)
    for path in root.glob("*/*.parquet"):
        table = pq.read_table(path)
        for name, of in columns.items():
            lists = table[of].combine_chunks()
            weights = pa.array(rng.integers(0, 4, len(lists.flatten())).astype(np.float32))
            table = table.append_column(name, pa.ListArray.from_arrays(lists.offsets, weights))
        pq.write_table(table, path, row_group_size=250)


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_compute_what_an_unsharded_model_does(log, model):
    root, overrides = log
    run_distributed(check_against_unsharded, 2, root, [f"model={model}", *overrides])


def test_it_resumes_bit_by_bit(log, tmp_path):
    root, overrides = log
    run_distributed(check_round_trip, 2, root, ["model=deepfm", *overrides], tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_the_export_scores_as_the_run_predicts(log, model, tmp_path):
    root, overrides = log
    options = [f"model={model}", f"run.dir={tmp_path / 'run'}", "steps=4", *overrides]
    train(tiny.job(root, *options))
    run = Run.load(tmp_path / "run")
    scorer = Scorer.load(export(run.path, tmp_path / "export"))
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((root / "test").glob("*.parquet")))
    found = probabilities(scorer.logits_of_rows(rows))
    np.testing.assert_allclose(found, run.predict(rows), rtol=0, atol=1e-6)  # blocks of another size
    names = [name for name in scorer.types if name in rows.column_names]
    part = rows.select(names).slice(0, 4)
    history = [name for name in names if name.startswith("clicked")]
    context = {name: part[name][0].as_py() for name in (*history, "hour", *[n for n in names if n == "text"])}
    candidates = {name: part[name].to_pylist() for name in names if name not in context}
    whole = candidates | {name: [value] * 4 for name, value in context.items()}
    expected = scorer.logits_of_rows(pa.table({name: pa.array(v, scorer.types[name]) for name, v in whole.items()}))
    np.testing.assert_allclose(scorer.logits([scorer.request(context, candidates)])[0], expected, rtol=0, atol=1e-5)


def test_keys_at_their_defaults_leave_older_checkpoints_their_job(tmp_path):
    composed = tiny.job(tmp_path, *VECTORS)
    schema = job_identity(composed.config, composed.tree)["schema"]
    assert not set(LATER) & set(schema["features"]["price"]) and schema["features"]["price"]["fill"] == 0.0
    assert schema["features"]["image"]["dim"] == 5 and "project" not in schema["features"]["text"]
