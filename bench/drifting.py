"""Synthetic clicks whose truth moves from day to day, as raw Parquet with a recipe: what incremental training is for.

A day shows items to users at random. The click probability is ``sigmoid(BIAS + b_item + SCALE * <u, v_item>)``: the users'
vectors stay, the items' walk (each day ``v' = RHO v + sqrt(1 - RHO^2) noise``, so that their spread stays the same), and each
day ``RENEWED`` of the items make room for new ones. Each row has its true probability, so the best AUC is known.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

USERS, ITEMS, DIM = 2_000, 500, 4
BIAS, SCALE = -1.0, 1.0
RHO, RENEWED = 0.9, 0.05
ROWS = 100_000  # a day

RECIPE = """\
name: drifting
sources:
  shown: {files: ['*.parquet']}
examples: {start: shown}
order: {shuffle: true}
schema:
  label: label
  embedding_dim: 16
  tables:
    user: {vocabulary: {}}
    item: {vocabulary: {}}
  features:
    user: {kind: sparse, table: user}
    item: {kind: sparse, table: item}
"""


def make_days(folder: Path, days: int, seed: int = 1) -> tuple[list[Path], list[float]]:
    """A folder a day, and each day's best possible AUC."""
    generator = np.random.default_rng(seed)
    users = generator.standard_normal((USERS, DIM))
    vectors, biases = generator.standard_normal((ITEMS, DIM)), generator.standard_normal(ITEMS) / 2
    names = np.arange(ITEMS)
    paths, best = [], []
    for number in range(1, days + 1):
        table = _day(generator, users, vectors, biases, names)
        path = folder / f"day-{number:02}"
        path.mkdir(parents=True)
        pq.write_table(table, path / "shown.parquet")
        paths.append(path)
        best.append(float(roc_auc_score(table["label"].to_numpy(), table["probability"].to_numpy())))
        _move(generator, vectors, biases, names)
    return paths, best


def _day(
    generator: np.random.Generator, users: np.ndarray, vectors: np.ndarray, biases: np.ndarray, names: np.ndarray
) -> pa.Table:
    user, item = generator.integers(USERS, size=ROWS), generator.integers(ITEMS, size=ROWS)
    logits = BIAS + biases[item] + SCALE * (users[user] * vectors[item]).sum(1)
    probability = 1 / (1 + np.exp(-logits))
    label = (generator.random(ROWS) < probability).astype(np.int8)
    return pa.table({"user": user, "item": names[item], "label": label, "probability": probability})


def _move(generator: np.random.Generator, vectors: np.ndarray, biases: np.ndarray, names: np.ndarray) -> None:
    """The night: in place."""
    noise = np.sqrt(1 - RHO**2)
    vectors[:] = RHO * vectors + noise * generator.standard_normal(vectors.shape)
    biases[:] = RHO * biases + noise * generator.standard_normal(len(biases)) / 2
    gone = generator.random(ITEMS) < RENEWED
    names[gone] = names.max() + 1 + np.arange(gone.sum())
    vectors[gone] = generator.standard_normal((gone.sum(), DIM))
