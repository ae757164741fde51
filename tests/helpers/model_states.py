"""The state of a sharded model, put together and loaded again."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.helpers.tables import CPU
from trainer.checkpoint.piece import Piece
from trainer.config.sharding import ShardingConfig
from trainer.optim.combined import CombinedOptimizer

Whole = tuple[Tensor, tuple[int, ...] | None]  # a tensor and its widths


def layout(kind: str, **by_table: str) -> ShardingConfig:
    """The wide tables' rows of 4 columns cannot be cut."""
    return ShardingConfig([kind], {"wide_user": "table_wise", "wide_item": "row_wise", **by_table})


LAYOUTS = {  # an EmbeddingCollection has not all of them, and a mean no grid
    "table_wise": layout("table_wise", wide_item="table_wise"),
    "row_wise": layout("row_wise"),
    "column_wise": layout("column_wise"),
    "table_row_wise": layout("table_row_wise", clicked="row_wise"),
    "grid_shard": layout("grid_shard", item="column_wise", clicked="table_wise"),
    "data_parallel": layout("data_parallel", clicked="row_wise"),
    "mixed": layout("row_wise", item="data_parallel", user="column_wise", wide_user="row_wise", clicked="table_wise"),
}


def train(model: DistributedModelParallel, optimizer: CombinedOptimizer, batches: list) -> list[Tensor]:
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
    model.train()
    data = iter(batches)
    found = [pipeline.progress(data).detach().clone() for _ in batches]
    pipeline.detach()
    return found


def assembled(pieces: Sequence[Piece]) -> dict[str, Whole]:
    """The whole tensors on every rank, from the written pieces: each entry exactly one. All ranks name the same tensors
    of the same shapes, and what a rank holds without writing it equals what another one writes."""
    ranks: list = [None] * dist.get_world_size()
    mine = [(p.name, p.shape, p.widths, p.offset, p.written, p.tensor.clone()) for p in pieces]
    dist.all_gather_object(ranks, mine)
    assert all(_tensors(rank) == _tensors(mine) for rank in ranks)
    found = {name: (torch.empty(shape, dtype=dtype), widths) for name, shape, widths, dtype in _tensors(mine)}
    counts = {name: torch.zeros(whole.shape, dtype=torch.int64) for name, (whole, _) in found.items()}
    every = [(name, _place(offset, part), written, part) for rank in ranks for name, *_, offset, written, part in rank]
    for name, place, written, part in every:
        if written:
            found[name][0][place] = part
            counts[name][place] += 1
    for name, count in counts.items():
        assert bool((count == 1).all()), (name, count)
    for name, place, _, part in every:
        assert torch.equal(found[name][0][place], part), f"{name} differs between ranks"
    return found


def _tensors(pieces: list) -> list[tuple]:
    return sorted({(name, shape, widths, tensor.dtype) for name, shape, widths, _, _, tensor in pieces}, key=str)


def _place(offset: tuple[int, ...], tensor: Tensor) -> tuple[slice, ...]:
    assert len(offset) == tensor.ndim
    return tuple(slice(first, first + size) for first, size in zip(offset, tensor.shape, strict=True))


def load(pieces: Sequence[Piece], saved: dict[str, Whole]) -> None:
    assert {piece.name for piece in pieces} == set(saved)
    for piece in pieces:
        whole = in_widths(saved[piece.name], piece.widths)
        assert whole.shape == piece.shape and whole.dtype == piece.tensor.dtype, piece
        piece.tensor.copy_(whole[_place(piece.offset, piece.tensor)])


def in_widths(saved: Whole, wanted: tuple[int, ...] | None) -> Tensor:
    """Each part's number is the mean over its columns."""
    values, widths = saved
    if widths == wanted:
        return values
    columns = values.repeat_interleave(torch.tensor(widths), dim=1).split(list(wanted), dim=1)
    return torch.stack([part.mean(1) for part in columns], dim=1)


def assert_equal(found: dict[str, Whole], expected: dict[str, Whole]) -> None:
    assert set(found) == set(expected)
    for name, (values, widths) in found.items():
        assert torch.equal(values, in_widths(expected[name], widths)), name
