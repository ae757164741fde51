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

from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.checkpoint.piece import Piece, empty_piece, in_order, whole_piece, written_once
from trainer.sharding.table_plan import TablePlan


def model_pieces(model: DistributedModelParallel, tables: Sequence[TablePlan]) -> list[Piece]:
    """Weights of tables, dense parameters and buffers of a sharded model: the same names in the same order on every rank.

    A buffer must be alike on all ranks, as Dice's statistics are: what one rank holds is saved.
    """
    by_parameter = {table.parameter: table for table in tables}
    sharded: list[Piece] = []
    replicated: list[Piece] = []
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            sharded += _weight_pieces(by_parameter[name], value)
        elif name in by_parameter:  # data-parallel
            replicated.append(whole_piece(f"tables/{by_parameter[name].name}/weight", value))
        else:
            replicated.append(whole_piece(f"dense/{name}", value))
    return in_order([*sharded, *written_once(replicated)])


def _weight_pieces(table: TablePlan, weight: ShardedTensor) -> list[Piece]:
    name, shape = f"tables/{table.name}/weight", (table.rows, table.dim)
    found = [
        Piece(name, shape, tuple(shard.metadata.shard_offsets), shard.tensor.detach())
        for shard in weight.local_shards()
    ]
    return found or [empty_piece(name, shape, weight.metadata().tensor_properties.dtype)]
