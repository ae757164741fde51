"""A batch holds its chunks' rows in order, padded with rows that train nothing."""

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from data_loaders.batch import Cursor
from data_loaders.collate import Chunk, Collator
from data_loaders.columns import NO_ID, Bags, Columns
from data_loaders.decode import Slot
from data_loaders.schema import Layout

LAYOUT = Layout(("a", "bag", "b"), ("c", "past"))
SLOTS = {
    "a": Slot(False, 0),
    "bag": Slot(True, 0),
    "b": Slot(False, 1),
    "c": Slot(False, 2),
    "past": Slot(True, 1),
}


def random_columns(rng, rows, num_numbers=4, dtype=np.int32):
    def bags():
        lengths = rng.integers(0, 4, rows)
        return Bags(np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 9, lengths.sum()).astype(dtype))

    ids = rng.integers(0, 9, (3, rows)).astype(dtype)
    ids[1, rng.random(rows) < 0.3] = NO_ID
    return Columns(2, rng.random((num_numbers, rows), np.float32), ids, [bags(), bags()])


def collate(chunks, batch_size, layout=LAYOUT, normalizer=2.5):
    rows = sum(chunk.stop - chunk.start for chunk in chunks)
    return Collator(layout, SLOTS, batch_size)(chunks, normalizer, Cursor(1, 7, 99, rows))


def lists(kjt):
    """{key: list of the ids of each row}, from values and lengths alone."""
    lengths = kjt.lengths().view(len(kjt.keys()), -1)
    values = iter(kjt.values().tolist())
    return {key: [[next(values) for _ in range(n)] for n in line] for key, line in zip(kjt.keys(), lengths.tolist())}


def expected(chunks, key, batch_size):
    slot, rows = SLOTS[key], []
    for chunk in chunks:
        for row in range(chunk.start, chunk.stop):
            if slot.bag:
                bags = chunk.columns.bags[slot.index]
                rows.append(bags.values[bags.offsets[row] : bags.offsets[row + 1]].tolist())
            else:
                rows.append([i for i in [int(chunk.columns.ids[slot.index, row])] if i != NO_ID])
    return rows + [[]] * (batch_size - len(rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_come_in_order_and_are_padded(seed, padding, dtype):
    rng = np.random.default_rng(seed)
    shapes = ((10, 2, 7), (8, 0, 8), (4, 4, 4))
    chunks = [Chunk(random_columns(rng, rows, dtype=dtype), start, stop) for rows, start, stop in shapes]
    size = 13 + padding
    batch = collate(chunks, size)
    for kjt, keys in ((batch.sparse, LAYOUT.pooled), (batch.sequence, LAYOUT.unpooled)):
        assert tuple(kjt.keys()) == keys and kjt.stride() == size
        assert kjt.values().numpy().dtype == dtype and kjt.lengths().dtype == torch.int64
        assert lists(kjt) == {key: expected(chunks, key, size) for key in keys}
        given = kjt._length_per_key, kjt._offset_per_key  # computed by the loader, not by TorchRec
        assert given[0] == [sum(map(len, lists(kjt)[key])) for key in keys]
        assert given[1] == [0, *np.cumsum(given[0])]
    joined = np.concatenate([p.columns.numbers[:, p.start : p.stop] for p in chunks], axis=1)
    padded = np.pad(joined, [(0, 0), (0, padding)])
    assert batch.dense.shape == (size, 2) and batch.dense.is_contiguous()
    np.testing.assert_array_equal(batch.dense.numpy(), padded[:2].T)
    np.testing.assert_array_equal(batch.labels.numpy(), padded[2])
    np.testing.assert_array_equal(batch.weights.numpy(), padded[3])
    assert batch.normalizer.item() == 2.5 and batch.normalizer.shape == () and batch.cursor.local_rows == 13


def test_single_ids_alone_take_the_short_way():
    rng = np.random.default_rng(0)
    chunks = [Chunk(random_columns(rng, 5), 0, 5)]
    batch = collate(chunks, 7, Layout(("c",), ()))
    assert batch.sequence is None
    assert lists(batch.sparse) == {"c": expected(chunks, "c", 7)}
    chunks[0].columns.ids[1] = 4
    chunks[0].columns.complete = True
    batch = collate(chunks, 7, Layout(("a", "b"), ("c",)))
    assert lists(batch.sparse) == {key: expected(chunks, key, 7) for key in "ab"}
    assert lists(batch.sequence) == {"c": expected(chunks, "c", 7)}


def test_without_weights_labels_or_rows():
    rng = np.random.default_rng(0)
    batch = collate([Chunk(random_columns(rng, 5, 3), 1, 3)], 4)
    assert batch.weights.tolist() == [1, 1, 0, 0]
    batch = collate([Chunk(random_columns(rng, 5, 2), 1, 3)], 4)
    assert batch.labels.tolist() == [0] * 4 and batch.weights.tolist() == [1, 1, 0, 0]
    batch = collate([Chunk(random_columns(rng, 5), 5, 5)], 4)
    assert lists(batch.sparse) == {key: [[]] * 4 for key in LAYOUT.pooled}
    assert not batch.weights.any() and batch.dense.shape == (4, 2)
    batch = collate([Chunk(random_columns(rng, 5), 0, 4)], 4, Layout(()))
    assert batch.sparse.keys() == [] and batch.sparse.stride() == 4


def test_memory_is_not_shared_with_the_columns():
    columns = random_columns(np.random.default_rng(0), 6)
    batch = collate([Chunk(columns, 0, 6)], 6)
    tensors = (batch.dense, batch.labels, batch.weights, batch.sparse.values(), batch.sequence.values())
    before = [tensor.clone() for tensor in tensors]
    for array in (columns.numbers, columns.ids, columns.bags[0].values, columns.bags[1].values):
        array[:] = 0  # the loader decodes its next block here
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_torchrec_takes_it():
    rng = np.random.default_rng(1)
    chunks = [Chunk(random_columns(rng, 6), 0, 6)]
    batch = collate(chunks, 8)
    sizes = {"embedding_dim": 4, "num_embeddings": 9}
    configs = [EmbeddingBagConfig(name=f"t_{key}", feature_names=[key], **sizes) for key in LAYOUT.pooled]
    module = EmbeddingBagCollection(tables=configs)
    pooled = module(batch.sparse)
    for key in LAYOUT.pooled:
        weight = module.embedding_bags[f"t_{key}"].weight
        for row, ids in enumerate(expected(chunks, key, 8)):
            torch.testing.assert_close(pooled[key][row], weight[ids].sum(dim=0))
