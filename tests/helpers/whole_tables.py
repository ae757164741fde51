"""Tables put together from the shards of all ranks."""

import torch
from torch import Tensor, nn

from trainer.runtime.distributed import on_ranks
from trainer.sharding.initialize import local_shards


def gather_table(model: nn.Module, name: str) -> Tensor:
    """The whole table [rows, D] on the CPU of every rank; all ranks together."""
    ends = tuple(f"{kind}.{name}.weight" for kind in ("embedding_bags", "embeddings"))
    weight = next(value for key, value in model.state_dict().items() if key.endswith(ends))
    shards = [(values.cpu().clone(), row, column) for values, row, column in local_shards(weight)]
    whole = torch.full(tuple(weight.size()), float("nan"))
    for values, row, column in (shard for part in on_ranks(shards) for shard in part):
        whole[row : row + values.shape[0], column : column + values.shape[1]] = values
    return whole
