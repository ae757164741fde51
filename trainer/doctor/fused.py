"""One table looked up and updated by FBGEMM's fused kernels, against the formulas of ``trainer.optim.tables`` in float64.

`python -m trainer.doctor.fused` prints the comparisons of every optimizer and precision, pooled and not, on the first GPU, as
one line of JSON.

Weights begin as multiples of 1/64 in [-1, 1), which fp16 holds, and gradients are multiples of 1/8, of which float32 adds up
some exactly, in whatever order: an update differs by the rounding of its own formula alone. Letters: R rows, D columns,
B bags, N ids.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

ROWS, BAGS, MOST_IDS, STEPS = 500, 64, 6, 3
LR, EPS, BETA1, BETA2 = 0.1, 1e-8, 0.9, 0.999
KINDS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}
PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}
# An update is of the size of LR; 1 - beta2 = 0.001 has a relative error of 6e-5 in float32, half of it under the root. fp16
# weights are rounded to one of their two neighbours, at random, at each step: 2^-10 below 2, the largest here.
UPDATE_ERROR, HALF_ULP = 1e-5, 2.0**-10
LOOKUP_ERROR = 3e-6  # up to five rows below 2 are added up, each sum with half an ulp of a number below 10: 5 x 4.8e-7


@dataclass(frozen=True)
class Case:
    """``dim`` columns of a ``precision`` (fp32, fp16); ``pooled``: sums of bags, or each row by itself."""

    optimizer: str
    precision: str
    pooled: bool
    dim: int

    @property
    def allowed(self) -> float:
        return UPDATE_ERROR + (STEPS * HALF_ULP if self.precision == "fp16" else 0.0)


def all_cases(device: torch.device) -> list[Case]:
    """What FBGEMM has on a device: Adam for fp32 alone; on a CPU no Adam, and updates of fp16 are another matter."""
    on_gpu = device.type == "cuda"
    return [
        Case(optimizer, precision, pooled, dim)
        for optimizer in KINDS
        for precision in PRECISIONS
        for pooled, dim in ((True, 16), (True, 128), (False, 64))
        if (optimizer, precision) != ("adam", "fp16") and (on_gpu or (optimizer != "adam" and precision == "fp32"))
    ]


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """The largest differences of the lookups and of the weights after ``STEPS`` updates, and whether they are allowed."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-64, 64, (ROWS, case.dim), generator=generator).double() / 64  # [R, D]
    table = _table(case, device)
    (held,) = table.split_embedding_weights()
    held.copy_(weights)
    update, worst = Update(case.optimizer), 0.0
    for _ in range(STEPS):
        ids, offsets = _bags(generator)
        count = BAGS if case.pooled else len(ids)
        gradient = torch.randint(-16, 16, (count, case.dim), generator=generator).double() / 8  # [B or N, D]
        before = held.detach().double().cpu()  # fp16 rounds at random: a lookup is held against what is there
        rows = table(ids.to(device), offsets.to(device))
        rows.backward(gradient.to(device, rows.dtype))
        worst = max(worst, _difference(rows, _lookup(before, ids, offsets, case.pooled)))
        weights = update(weights, _gradient_of_rows(weights, gradient, ids, offsets, case.pooled), ids)
    error = _difference(held, weights)
    right = worst <= LOOKUP_ERROR and error <= case.allowed
    return {**asdict(case), "lookup": worst, "update": error, "allowed": case.allowed, "right": right}


class Update:
    """The formulas, with their states, in float64. Rows that a step does not touch rest."""

    def __init__(self, optimizer: str) -> None:
        self.optimizer, self.step = optimizer, 0
        self.first: Tensor | float = 0.0  # Adam's m
        self.second: Tensor | float = 0.0  # Adam's v, AdaGrad's s

    def __call__(self, weights: Tensor, gradient: Tensor, ids: Tensor) -> Tensor:
        self.step += 1
        touched = torch.zeros(len(weights), 1, dtype=torch.float64).index_fill_(0, ids.long(), 1.0)  # [R, 1]
        return weights - LR * touched * self._direction(gradient, touched)

    def _direction(self, gradient: Tensor, touched: Tensor) -> Tensor:
        square = gradient.square()
        if self.optimizer == "sgd":
            return gradient
        if self.optimizer == "adam":
            decay1, decay2 = 1 - touched * (1 - BETA1), 1 - touched * (1 - BETA2)
            self.first = decay1 * self.first + (1 - BETA1) * gradient
            self.second = decay2 * self.second + (1 - BETA2) * square
            mean, variance = self.first / (1 - BETA1**self.step), self.second / (1 - BETA2**self.step)
            return mean / (variance.sqrt() + EPS)
        if self.optimizer == "rowwise_adagrad":
            square = square.mean(1, keepdim=True)
        self.second = self.second + square
        return gradient / (self.second.sqrt() + EPS)


def _table(case: Case, device: torch.device) -> SplitTableBatchedEmbeddingBagsCodegen:
    on_gpu = device.type == "cuda"
    place = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, case.dim, place, compute)],
        optimizer=KINDS[case.optimizer],
        learning_rate=LR,
        eps=EPS,
        beta1=BETA1,
        beta2=BETA2,
        weights_precision=PRECISIONS[case.precision],
        pooling_mode=PoolingMode.SUM if case.pooled else PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
    )


def _bags(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [N] and offsets [B + 1]; some bags are empty, some ids occur more than once."""
    lengths = torch.randint(0, MOST_IDS, (BAGS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, ROWS, (int(offsets[-1]),), generator=generator), offsets


def _bag_of_each(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(BAGS), offsets.diff())  # [N]


def _lookup(weights: Tensor, ids: Tensor, offsets: Tensor, pooled: bool) -> Tensor:
    if not pooled:
        return weights[ids]  # [N, D]
    return weights.new_zeros(BAGS, weights.shape[1]).index_add_(0, _bag_of_each(offsets), weights[ids])  # [B, D]


def _gradient_of_rows(weights: Tensor, gradient: Tensor, ids: Tensor, offsets: Tensor, pooled: bool) -> Tensor:
    of_ids = gradient[_bag_of_each(offsets)] if pooled else gradient  # [N, D]
    return torch.zeros_like(weights).index_add_(0, ids, of_ids)  # [R, D]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Infinite where anything is not a number."""
    largest = (found.detach().double().cpu() - expected).abs().max() if len(expected) else torch.zeros(())
    return float(largest) if bool(largest.isfinite()) else float("inf")


if __name__ == "__main__":
    first = torch.device("cuda", 0)
    torch.cuda.set_device(first)
    print(json.dumps([compare(each, first) for each in all_cases(first)]))
