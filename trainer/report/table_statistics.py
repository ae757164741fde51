"""How much of each embedding table was trained, and how long its rows are: one pass over all shards, where they lie.

A row was trained where its optimizer has state for it: AdaGrad's and row-wise AdaGrad's ``sum``, Adam's ``exp_avg_sq``, FTRL's n
are above 0 once a gradient other than 0 came (of squares below 1e-38 nothing is left, so that such a row does not count). State
that a warm start took over counts. Plain SGD keeps none, and the decay of all rows of a data-parallel table leaves state in every
row: there it is unknown which rows were trained.

A table of more than ``MOST_ROWS`` rows is sampled: one row of each of as many blocks of equal length, the same ones in every
run. A share is then right to 0.1 % (two standard errors). The lengths of rows that are cut by columns add up over ranks; so
each rank puts what it has of the sampled rows into a vector, and these are summed, table by table: 8 MB a table at most.

Letters: R rows of a table, S of them sampled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.schema import Schema
from trainer.checkpoint.piece import Piece
from trainer.modules.embeddings import WIDE_WEIGHT_SLOT
from trainer.monitoring.sparsity import SQUARES_SLOT
from trainer.runtime.distributed import Ranks, all_reduce_sum
from trainer.sharding.table_plan import TablePlan

MOST_ROWS = 1 << 20  # S
CHUNK = 1 << 22  # numbers that are looked at at a time
SEED = 7  # of the rows that are sampled
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
STATE = {"adagrad": "sum", "rowwise_adagrad": "sum", "adam": "exp_avg_sq"}

Measure = Callable[[Tensor], Tensor]  # of rows [C, columns]: a number each [C]


@torch.no_grad()
def table_statistics(
    tables: Sequence[TablePlan],
    pieces: Sequence[Piece],
    schema: Schema,
    ranks: Ranks,
    most_rows: int = MOST_ROWS,
) -> list[dict[str, Any]]:
    """Of each table, the largest first: ``rows``, ``sampled`` of them, ``dim`` (1 of the linear part), ``optimizer``, ``trained``
    (a share; None: unknown), ``missing_row`` (what null ids are looked up in; None: there is none) and whether it was trained,
    and the ``norms`` of rows, ``trained`` and ``never_trained`` ones apart where that is known, else of ``all``: mean and
    ``QUANTILES``. ``pieces``: of the model and its optimizers. All ranks together; only rank 0 has the values."""
    found = []
    for table in sorted(tables, key=lambda table: (-table.rows * table.dim, table.name)):
        sampled = sampled_rows(table.rows, most_rows).to(ranks.device)
        sums = torch.zeros(2, len(sampled), device=ranks.device)  # squared length, state
        state = _state_of(table)
        for piece in pieces:
            if piece.written and piece.name == f"tables/{table.name}/weight":
                _add(sums[0], piece, sampled, _weight if table.wide else _squares)
            if piece.written and state is not None and piece.name == f"tables/{table.name}/{state[0]}":
                _add(sums[1], piece, sampled, state[1])
        all_reduce_sum(sums)
        if ranks.is_first:
            squares, touched = sums.cpu().numpy()
            trained = touched > 0 if state is not None else None
            rows = sampled.cpu().numpy()
            found.append(_facts(table, schema) | _numbers(rows, np.sqrt(squares), trained, schema, table))
    return found


def sampled_rows(rows: int, most: int = MOST_ROWS) -> Tensor:
    """int64 [S], ascending, 0 among them: all of ``rows``, or where these are more than ``most`` one of each block, at a place
    drawn by a fixed seed."""
    block = -(-rows // most)
    firsts = torch.arange(0, rows, block)
    if block == 1:
        return firsts
    places = (torch.rand(len(firsts), generator=torch.Generator().manual_seed(SEED)) * block).long()
    places[0] = 0  # the missing id's row
    return (firsts + places).clamp_(max=rows - 1)


def _state_of(table: TablePlan) -> tuple[str, Measure] | None:
    """The piece, and the number of a row in it, that is above 0 of trained rows."""
    config = table.optimizer
    if config.name == "ftrl":
        return "weight", lambda rows: rows[:, SQUARES_SLOT]
    if config.name not in STATE or (table.data_parallel and config.weight_decay):
        return None
    return STATE[config.name], lambda rows: rows.sum(1)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


def _weight(rows: Tensor) -> Tensor:
    """Of the linear part, whose rows hold its optimizer's state, too."""
    return rows[:, WIDE_WEIGHT_SLOT].square()


def _add(sums: Tensor, piece: Piece, sampled: Tensor, measure: Measure) -> None:
    """Adds the piece's part of the ``sampled`` rows to ``sums`` [S]."""
    first, (height, width) = piece.offset[0], piece.tensor.shape
    ends = torch.tensor([first, first + height], device=sampled.device)
    begin, end = torch.searchsorted(sampled, ends).tolist()
    step = max(1, CHUNK // max(width, 1))
    for low in range(begin, end, step):
        high = min(low + step, end)
        rows = piece.tensor[(sampled[low:high] - first).to(piece.tensor.device)].float()
        sums[low:high] += measure(rows).to(sums.device)


def _facts(table: TablePlan, schema: Schema) -> dict[str, Any]:
    return {
        "table": table.name,
        "rows": table.rows,
        "dim": 1 if table.wide else table.dim,
        "optimizer": table.optimizer.name,
        "missing_row": _missing_row(table, schema),
    }


def _missing_row(table: TablePlan, schema: Schema) -> int | None:
    """Of its features' the first; in a table of hashed ones row 0, which no value is hashed to."""
    rows = [0 if name in schema.crosses else schema.missing_id(name) for name in table.features]
    return next((row for row in rows if row is not None), None)


def _numbers(
    rows: NDArray[np.int64],
    norms: NDArray[np.float32],
    trained: NDArray[np.bool_] | None,
    schema: Schema,
    table: TablePlan,
) -> dict[str, Any]:
    if trained is None:
        return {"sampled": len(rows), "trained": None, "missing_row_trained": None, "norms": {"all": _spread(norms)}}
    missing = (rows == _missing_row(table, schema)).nonzero()[0]
    parts = {"trained": norms[trained], "never_trained": norms[~trained]}
    return {
        "sampled": len(rows),
        "trained": float(trained.mean()),
        "missing_row_trained": bool(trained[missing[0]]) if len(missing) else None,
        "norms": {name: _spread(part) for name, part in parts.items() if len(part)},
    }


def _spread(norms: NDArray[np.float32]) -> dict[str, Any]:
    values = norms.astype(np.float64)
    return {"mean": float(values.mean()), "quantiles": np.quantile(values, QUANTILES).tolist()}
