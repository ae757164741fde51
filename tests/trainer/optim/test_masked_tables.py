"""Tables under Adam, which FBGEMM has on a GPU only: a stand-in for its kernel shows that a masked step leaves rows and moments
bit by bit as they are, and that another one is Adam's."""

from types import SimpleNamespace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from trainer.config.optim import TableOptimizerConfig
from trainer.optim.masked_tables import MaskedTables
from trainer.runtime.step_mask import StepMask
from trainer.sharding.kernels import FusedKernel

CPU, NAN = torch.device("cpu"), float("nan")
ROWS, WIDTHS = (5, 7), (4, 12)  # of two tables, one feature each
BEGINS = (0, ROWS[0] * WIDTHS[0])
FLOATS = BEGINS[1] + ROWS[1] * WIDTHS[1]
LR, BETA1, BETA2, EPS = 0.1, 0.9, 0.999, 1e-8


class AdamKernel(nn.Module):
    """Looks up one id a bag and, in backward, moves the rows it has looked up: with Adam's formulas, each once."""

    def __init__(self):
        super().__init__()
        self.optimizer, self.feature_table_map = EmbOptimType.ADAM, [0, 1]
        self.weights_offsets = torch.tensor(BEGINS)
        self.weights_dev = torch.empty(0)
        generator = torch.Generator().manual_seed(1)
        self.weights_host = nn.Parameter(torch.randn(FLOATS, generator=generator))
        self.momentum1_host, self.momentum2_host = torch.zeros(FLOATS), torch.zeros(FLOATS)
        self.steps = 0

    def forward(self, indices, offsets):
        return _Lookup.apply(self.weights_host, self, indices)

    def memories(self):
        return [self.weights_host.data, self.momentum1_host, self.momentum2_host]

    def views(self, table):
        begin, rows, width = BEGINS[table], ROWS[table], WIDTHS[table]
        return [memory[begin : begin + rows * width].view(rows, width) for memory in self.memories()]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, kernel, indices):
        ctx.kernel, ctx.ids = kernel, indices.view(2, -1)
        return torch.cat([kernel.views(table)[0][ids] for table, ids in enumerate(ctx.ids)], dim=1)  # [B, 16]

    @staticmethod
    def backward(ctx, gradient):
        ctx.kernel.steps += 1
        for table, part in enumerate(gradient.split(WIDTHS, dim=1)):
            adam(*ctx.kernel.views(table), ctx.ids[table], part, ctx.kernel.steps)
        return None, None, None


def adam(weights, first, second, ids, gradients, step):
    summed = torch.zeros_like(weights).index_add_(0, ids, gradients)
    rows = ids.unique()
    first[rows] = BETA1 * first[rows] + (1 - BETA1) * summed[rows]
    second[rows] = BETA2 * second[rows] + (1 - BETA2) * summed[rows].square()
    moved = (first[rows] / (1 - BETA1**step)) / ((second[rows] / (1 - BETA2**step)).sqrt() + EPS)
    weights[rows] -= LR * moved


def masked_tables(kernel, mask):
    shards = [
        SimpleNamespace(name=f"table{table}", local_cols=width, feature_names=["one"])
        for table, width in enumerate(WIDTHS)
    ]
    tables = [SimpleNamespace(name=shard.name, optimizer=TableOptimizerConfig("adam")) for shard in shards]
    return MaskedTables([FusedKernel(kernel, shards)], tables, mask)


def step(kernel, tables, mask, ids, gradient, flag):
    """Forward, the guard's answer, backward, the optimizer."""
    output = kernel(torch.tensor(ids), torch.arange(len(ids) + 1))
    mask.set(torch.tensor(flag))
    output.backward(gradient)
    tables.restore()


def gradients(seed):
    return torch.randn(3, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spoilt", [NAN, 1.0], ids=["the rank of the NaN", "another rank"])
def test_a_masked_step_leaves_rows_and_moments_as_they_are(spoilt):
    kernel, plain, mask = AdamKernel(), AdamKernel(), StepMask(CPU)
    tables = masked_tables(kernel, mask)
    first, second = [0, 4, 4, 6, 6, 0], [1, 2, 2, 0, 3, 6]  # repeated, and the first and the last row of each table
    for kernel_, act in ((kernel, tables), (plain, masked_tables(plain, other := StepMask(CPU)))):
        step(kernel_, act, mask if kernel_ is kernel else other, first, gradients(1), 0.0)
    before = [memory.clone() for memory in kernel.memories()]
    step(kernel, tables, mask, second, spoilt * gradients(2), NAN)
    for now, then in zip(kernel.memories(), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))
    kernel.steps = plain.steps
    step(kernel, tables, mask, second, gradients(3), 0.0)
    for table in range(2):
        adam(*plain.views(table), torch.tensor(second).view(2, -1)[table], gradients(3).split(WIDTHS, 1)[table], 2)
    for now, then, earlier in zip(kernel.memories(), plain.memories(), before, strict=True):
        assert torch.equal(now, then) and not torch.equal(now, earlier)
