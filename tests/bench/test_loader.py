"""That the bench's numbers mean what they say: checks, cut-off passes and the measures of a shuffle."""

from dataclasses import dataclass

import numpy as np
import pytest

from bench import loader, loader_data, loader_peers
from data_loaders.schema import Layout


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    table = loader_data.with_nulls(loader_data.criteo_table(rng, 20_000), rng)
    for number, (start, rows) in enumerate(((0, 12_000), (12_000, 8_000))):
        loader_data.write(table.slice(start, rows), tmp_path / f"part-{number}.parquet", row_group_size=5000)
    return loader_data.Data(tmp_path, loader_data.criteo_schema(fill=0.0), Layout(loader_data.IDS))


def test_what_the_loader_delivers_is_what_pyarrow_finds(data):
    assert loader.check(data).startswith("20,000 rows")


def test_a_loader_that_leaves_rows_out_is_caught(data):
    class Longer(loader_data.Data):
        """More files than the loader is given."""

        @property
        def files(self):
            return [*super().files, super().files[0]]

    with pytest.raises(RuntimeError, match="rows=32000.*rows=20000"):
        loader.check(Longer(data.folder, data.schema, data.layout))


def test_rows_torn_apart_are_caught(data):
    batch = next(data.loader().epoch(0))
    before = loader.Sums.of_batches([batch])
    batch.labels[:8192] = batch.labels[:8192].roll(1)
    after = loader.Sums.of_batches([batch])
    assert before.labels == after.labels and before.labeled_ids != after.labeled_ids


def test_quality_of_no_shuffle():
    found = loader.Quality.of(np.arange(8 * loader_data.SMALL_ROW_GROUP))
    assert found.rank_correlation == pytest.approx(1)
    assert found.displacement == 0
    assert found.batches == 1 / 8
    assert found.spread == pytest.approx(loader_data.SMALL_ROW_GROUP / 12**0.5, rel=1e-3)
    assert found.neighbours == pytest.approx(1 - 1 / loader.SMALL_BATCH, rel=1e-3)


def test_quality_of_a_full_permutation():
    size = 8 * loader_data.SMALL_ROW_GROUP
    found = loader.mean_quality(np.random.default_rng(seed).permutation(size) for seed in range(3))
    assert found.rank_correlation < 0.02
    assert found.displacement == pytest.approx(size / 3, rel=0.02)
    assert found.batches == 1
    assert found.spread == pytest.approx(size / 12**0.5, rel=0.02)
    assert found.neighbours == pytest.approx(loader.SMALL_BATCH / size, rel=0.1)


def test_neighbours_of_the_file_are_sought_in_training():
    rows = np.arange(8 * loader_data.SMALL_ROW_GROUP)
    even_then_odd = np.concatenate([rows[::2], rows[1::2]])
    assert loader.Quality.of(even_then_odd).neighbours == 0


def test_the_loader_shuffles_numbered_rows(tmp_path):
    data = loader_data.numbered_data(tmp_path, 8)
    found = loader.mean_quality(loader.training_orders(data, {"batch_size": loader.SMALL_BATCH}))
    assert found.rank_correlation < 0.05 and found.batches == 1


def test_zipf_has_every_rank_in_its_place():
    ids = loader_data.zipf(np.random.default_rng(0), 200_000, 100)
    shares = np.sort(np.bincount(ids, minlength=100))[::-1] / len(ids)
    expected = np.log1p(1 / np.arange(1, 101)) / np.log(100)  # the k-th: log(1 + 1/k) / log(cardinality)
    np.testing.assert_allclose(shares[:10], expected[:10], rtol=0.05)
    assert ids.min() >= 0 and ids.max() < 100


@dataclass
class FakeLoader:
    batches: int

    def __iter__(self):
        return iter([{"label": range(10)}] * self.batches)


def test_a_pass_counts_a_whole_epoch():
    found = loader_peers.one_pass(FakeLoader(5), limit=1000)
    assert (found["rows"], found["whole"]) == (50, True)


def test_a_pass_cut_off_leaves_its_first_batch_out():
    found = loader_peers.one_pass(FakeLoader(50), limit=0)
    assert (found["rows"], found["whole"]) == (20, False)
