"""The best that the data allow, against scikit-learn."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from data_loaders.manifest import Manifest
from trainer.run.evaluator import best_possible


def test_best_possible_over_several_files(tmp_path):
    rng = np.random.default_rng(3)
    probability = rng.random(3000).round(2) * 0.98 + 0.01  # many ties
    label = (rng.random(3000) < probability).astype(np.int8)
    for number, rows in enumerate((slice(0, 1000), slice(1000, 3000))):
        pq.write_table(
            pa.table({"y": label[rows], "p": probability[rows]}), tmp_path / f"{number}.parquet", row_group_size=300
        )
    best = best_possible(Manifest.scan(["*.parquet"], str(tmp_path), ["y", "p"]), "y", "p")
    assert best["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
    assert best["logloss"] == pytest.approx(log_loss(label, probability), abs=1e-9)
