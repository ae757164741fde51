"""Rows as they are stored, and lookups that stand in for TorchRec's: every model scores as it does with its own tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

import conf
from data_loaders.schema import Layout
from tests.helpers.samples import keyed_jagged, make_batch, one_dim_schema, pooled_bag, random_rows, randomize
from trainer.models.construct import build_model
from trainer.modules.attention import TargetAttention
from trainer.modules.embeddings import is_wide_table
from trainer.modules.requests import RequestJagged
from trainer.serve.tables import MappedTable, RequestIds, pool, replace_lookups, stored

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("wide", [False, True])
def test_rows_come_back_within_the_precision_of_their_form(form, wide):
    rows = torch.randn(50, 4 if wide else 16, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([3, 3, 49, 0])
    kept = MappedTable(stored(rows, form, wide=wide), wide=wide)
    found, expected = kept(ids), rows[ids]
    if wide:  # the optimizer's slots are not stored
        expected = torch.nn.functional.pad(expected[:, :1], (0, 3))
    assert found.dtype == torch.float32 and found.shape == expected.shape
    if form == "fp32":
        assert torch.equal(found, expected)
    elif form == "fp16" or wide:
        assert torch.equal(found, expected.half().float())
    else:  # 255 steps from the row's least to its largest value; half a step, and fp32's own rounding
        step = (expected.max(1).values - expected.min(1).values) / 255
        assert ((found - expected).abs().max(1).values <= step * 0.501).all()
        assert kept.nbytes == 50 * (16 + 8)


@pytest.mark.parametrize("mean", [False, True])
def test_pooled_bags(mean):
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    bags = [[1, 2, 2], [], [8], [0, 3]]
    ids = JaggedTensor.from_dense([torch.tensor(bag, dtype=torch.int64) for bag in bags])
    found = pool(torch.from_numpy(table)[ids.values()], ids, mean=mean)
    expected = np.stack([pooled_bag(table, bag, "mean" if mean else "sum") for bag in bags])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=4 * 2**-24 * np.abs(table).max())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_scores_as_with_its_own_tables(name):
    """Rows that stand alone; and rows of requests, whose contexts are looked up once."""
    schema = one_dim_schema()
    model, mapped = (build_model({"name": name}, schema, seed=1) for _ in range(2))
    model.to_empty(device="cpu")
    randomize(model)
    tables, dense = parts_of(model)
    replace_lookups(mapped, tables)
    mapped.load_state_dict(dense)
    model.eval(), mapped.eval()
    layout = model.layout
    contexts, candidates = random_rows(schema, 3), random_rows(schema, 12, seed=1)
    request = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 1])
    shared = [key for key in (*layout.pooled, *layout.unpooled) if key in (*schema.sequences, "user.id", "tags")]
    rows = [{**row, **{k: contexts[r][k] for k in shared}} for row, r in zip(candidates, request.tolist())]
    batch = make_batch(schema, layout, rows)
    with torch.no_grad():
        expected = model(batch)
        alone = mapped(batch_of(batch, layout, [], contexts, rows, torch.arange(12)))
        together = mapped(batch_of(batch, layout, shared, contexts, candidates, request))
    largest = float(expected.abs().max())
    # As many roundings as the widest sum has terms; the two differ in nothing but the order of a bag's few ids.
    torch.testing.assert_close(alone, expected, rtol=0, atol=64 * 2**-24 * max(largest, 1))
    torch.testing.assert_close(together, expected, rtol=0, atol=64 * 2**-24 * max(largest, 1))


def parts_of(model):
    """A model's tables, and the state of the rest."""
    weights, dense = {}, {}
    for name, value in model.state_dict().items():
        collection, _, table = name.removesuffix(".weight").rpartition(".")
        if collection.endswith(("embedding_bags", "embeddings")):
            weights[table] = value
        else:
            dense[name] = value
    tables = {
        name: MappedTable(stored(value, "fp32", wide=is_wide_table(name)), wide=is_wide_table(name))
        for name, value in weights.items()
    }
    return tables, dense


def batch_of(batch, layout: Layout, shared, contexts, candidates, request):
    def ids(keys):
        return RequestIds(
            keyed_jagged([key for key in keys if key in shared], contexts),
            keyed_jagged([key for key in keys if key not in shared], candidates),
            request,
        )

    return replace(batch, sparse=ids(layout.pooled), sequence=ids(layout.unpooled) if layout.unpooled else None)


def test_a_shared_history_is_that_of_each_row():
    vectors = torch.arange(10.0).view(5, 2)
    history = RequestJagged(vectors, torch.tensor([3, 0, 2]), torch.tensor([2, 0, 0, 1]))
    assert history.lengths().tolist() == [2, 3, 3, 0]
    assert torch.equal(history.values(), vectors[[3, 4, 0, 1, 2, 0, 1, 2]])
    assert history.offsets().tolist() == [0, 2, 5, 8, 8]
    empty = RequestJagged(vectors[:0], torch.tensor([0]), torch.tensor([0, 0]))
    assert empty.values().shape == (0, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softmax": True, "activation": "prelu"},
        {"positions": 4, "activation": "relu"},
        {"cosine": True, "intensity": True},
    ],
)
@pytest.mark.parametrize("lengths", [[0, 1, 50], [50], [0], [0, 0, 3]])
def test_attention_over_a_shared_history_is_that_of_each_row(settings, lengths):
    """Empty, one event, the longest; rows of the requests in any order, and a request without rows."""
    draw = torch.Generator().manual_seed(3)
    unit = TargetAttention(8, [16, 8], **{"activation": "dice", **settings}).eval()
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    request = torch.randint(0, max(len(lengths) - 1, 1), (23,), generator=draw)
    vectors, query = torch.randn(sum(lengths), 8, generator=draw), torch.randn(23, 8, generator=draw)
    history = RequestJagged(vectors, torch.tensor(lengths), request)
    with torch.no_grad():
        expected = unit(query, history.values(), history.offsets())
        found = unit.of_requests(query, vectors, history)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
