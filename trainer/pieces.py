"""Pieces of named tensors: how a sharded model's state is named and cut, whatever the plan.

A checkpoint knows tensors by canonical names that no plan changes, each of one shape:

* ``tables/<table>/weight`` [rows, dim], ``tables/<table>/<state>`` for each state of its optimizer: AdaGrad's ``sum`` and
  Adam's ``exp_avg`` and ``exp_avg_sq`` [rows, dim]; row-wise AdaGrad's ``sum`` [rows, parts]
* ``counts/<table>`` [rows, 1]: how often the id of a row occurs in the training data, where its optimizer wants to know
* ``dense/<parameter or buffer>``, named as in the task's ``state_dict``
* ``optimizer/<parameter>/<state>`` of dense parameters

Row-wise AdaGrad keeps one number a row; in a table cut by columns, one for each part of a row. Such a tensor has
``widths``, the columns of each part, and parts of other widths are converted when they are read
(``trainer.checkpoint.format``).

A rank holds rectangular pieces of a tensor, or, so that every rank names the same tensors, an empty one. What all ranks
hold alike is written by one of them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.checkpoint.piece import Piece
from trainer.optim.tables import EmbeddingTable, embedding_tables


def model_pieces(model: DistributedModelParallel) -> list[Piece]:
    """Weights of tables, dense parameters and buffers of a sharded model: the same names in the same order on every rank.

    A buffer must be alike on all ranks, as Dice's statistics are: what one rank holds is saved.
    """
    tables = {table.parameter: table for table in embedding_tables(model)}
    sharded: list[Piece] = []
    replicated: list[Piece] = []
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            sharded += _weight_pieces(tables[name], value)
        elif name in tables:  # data-parallel
            replicated.append(whole_piece(f"tables/{tables[name].name}/weight", value))
        else:
            replicated.append(whole_piece(f"dense/{name}", value))
    return in_order([*sharded, *written_once(replicated)])


def whole_piece(name: str, tensor: Tensor, widths: tuple[int, ...] | None = None) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach(), widths=widths)


def empty_piece(name: str, shape: tuple[int, ...], dtype: torch.dtype, widths: tuple[int, ...] | None = None) -> Piece:
    """On a rank that holds nothing of a tensor [rows, columns]."""
    return Piece(name, shape, (0, 0), torch.empty(0, shape[1], dtype=dtype), written=False, widths=widths)


def written_once(replicated: Sequence[Piece]) -> list[Piece]:
    """Pieces that all ranks hold alike, each marked to be written by one rank: from the largest on, by the one that has
    the fewest bytes to write until then. The same choice on all ranks, without asking."""
    loads = [0] * dist.get_world_size()
    found = []
    for piece in sorted(replicated, key=lambda piece: (-piece.tensor.nbytes, piece.name)):
        writer = loads.index(min(loads))
        loads[writer] += piece.tensor.nbytes
        found.append(replace(piece, written=writer == dist.get_rank()))
    return found


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: (piece.name, piece.offset))


def _weight_pieces(table: EmbeddingTable, weight: ShardedTensor) -> list[Piece]:
    name, shape = f"tables/{table.name}/weight", (table.rows, table.dim)
    found = [
        Piece(name, shape, tuple(shard.metadata.shard_offsets), shard.tensor.detach())
        for shard in weight.local_shards()
    ]
    return found or [empty_piece(name, shape, weight.metadata().tensor_properties.dtype)]
