"""Embedding tables on a CPU: lookup, and the update of the rows that a batch touches, in C++ (tables.cpp); for Adam, which FBGEMM
lacks on a CPU, the same in PyTorch.

A row's gradient is summed over all its occurrences in the batch, in their order, and then the row is updated once by

* sgd              w -= lr g
* rowwise_adagrad  s += mean(g²); w -= lr g / (√s + eps)                   one s a row
* adagrad          s += g²; w -= lr g / (√s + eps)
* adam             m, v as Kingma & Ba, 2015; w -= lr m̂ / (√v̂ + eps)
* ftrl             rows are [w, z, n, 0], and g[3] is the gradient of w (``trainer.optim.ftrl``)

in fp32; rows of fp16 are rounded to the nearest. Results are the same from run to run, whatever the number of threads.

Shapes: T tables, F features, B bags a feature, N ids of a batch, D columns of a table, U distinct rows, M values of all tables.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from trainer import kernels

POOLINGS = ("sum", "mean", "none")
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "ftrl")


@dataclass(frozen=True)
class Rates:
    """Of one step. ``correction1``, ``correction2``: 1 - beta1^t and 1 - beta2^t; the last four are FTRL's."""

    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    l1: float = 0.0
    l2: float = 0.0


@dataclass(frozen=True)
class TableGroup:
    """Tables that lie one after the other in ``memory`` [M], of fp32 or fp16, and what reads them.

    ``columns`` [F + 1]: where a feature's columns begin in the output; ``begins`` [F]: where its table begins in the memory;
    ``starts`` [T + 1]: the first feature of each table, whose features are neighbours; ``optimizers``: T of ``OPTIMIZERS``.
    ``first``, ``second``: fp32 states of the optimizers (adagrad's s; adam's m and v) or None, where a table's begins at
    ``states`` [T]. ``pooling``: one of ``POOLINGS``; with none, all tables are equally wide."""

    memory: Tensor
    columns: Tensor
    begins: Tensor
    starts: Tensor
    optimizers: tuple[str, ...]
    pooling: str
    states: Tensor
    first: Tensor | None = None
    second: Tensor | None = None

    @property
    def features(self) -> int:
        return len(self.begins)

    def bags(self, offsets: Tensor) -> int:
        return (len(offsets) - 1) // self.features

    def empty_output(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """[B, sum of D], or of sequences [N, D]."""
        if self.pooling == "none":
            return torch.empty(len(ids), int(self.columns[1]))
        return torch.empty(self.bags(offsets), int(self.columns[-1]))


def look_up(group: TableGroup, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows as fp32: [N] int64, [F * B + 1] int64 -> [B, sum of D], or of sequences [N, D]. Where ids of bags have ``weights``
    [N] fp32, rows are multiplied by these first. Of compiled kernels."""
    output = group.empty_output(ids, offsets)
    kernels.library().tables_look_up(*_inputs(group, ids, offsets, weights), output, torch.get_num_threads())
    return output


def update(
    group: TableGroup, ids: Tensor, offsets: Tensor, gradient: Tensor, rates: Rates, weights: Tensor | None = None
) -> None:
    """Updates rows and states in place by the ``gradient`` of what ``look_up`` gave. Of compiled kernels."""
    kernels.library().tables_update(
        *_inputs(group, ids, offsets, weights),
        len(group.optimizers),
        group.starts,
        torch.tensor([OPTIMIZERS.index(name) for name in group.optimizers]),
        group.first,
        group.second,
        group.states,
        torch.tensor(astuple(rates)),
        gradient.contiguous(),
        torch.get_num_threads(),
    )


def _inputs(group: TableGroup, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[object, ...]:
    pooling, half = POOLINGS.index(group.pooling), int(group.memory.dtype == torch.float16)
    bags = group.bags(offsets)
    return group.memory, half, group.features, group.columns, group.begins, pooling, bags, ids, offsets, weights


def look_up_in_torch(group: TableGroup, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """As ``look_up``."""
    output = group.empty_output(ids, offsets)
    for feature in _features(group, offsets):
        rows = feature.table.index_select(0, ids[feature.places]).float()  # [n, D]
        rows = rows if weights is None else rows * weights[feature.places].unsqueeze(1)
        if group.pooling == "none":
            output[feature.places] = rows
        else:
            sums = torch.zeros(group.bags(offsets), rows.shape[1]).index_add_(0, feature.bags, rows)
            output[:, feature.columns] = sums * feature.shares
    return output


def update_by_adam_in_torch(
    group: TableGroup, ids: Tensor, offsets: Tensor, gradient: Tensor, rates: Rates, weights: Tensor | None = None
) -> None:
    """As ``update`` where all tables have adam."""
    features, starts = _features(group, offsets), group.starts.tolist()
    for first, last, begin in zip(starts, starts[1:], group.states.tolist()):
        own = features[first:last]
        table, width = own[0].table, own[0].table.shape[1]
        rows, inverse = torch.cat([ids[feature.places] for feature in own]).unique(return_inverse=True)
        gradients = torch.cat([feature.gradients(group, gradient, weights) for feature in own])  # [n, D]
        g = torch.zeros(len(rows), width).index_add_(0, inverse, gradients)  # [U, D]
        m, v = _rows(group.first, begin, width), _rows(group.second, begin, width)
        m[rows] = rates.beta1 * m[rows] + (1 - rates.beta1) * g
        v[rows] = rates.beta2 * v[rows] + (1 - rates.beta2) * g * g
        step = rates.lr * (m[rows] / rates.correction1) / ((v[rows] / rates.correction2).sqrt() + rates.eps)
        table[rows] = (table[rows].float() - step).to(table.dtype)


@dataclass(frozen=True)
class _Feature:
    """``table`` [its rows and those behind them, D]; the feature's ``columns`` of the output and ``places`` among the N ids; the
    bag of each of its n ids, ``bags`` [n]; what a bag's sum is multiplied by, ``shares`` [B, 1]."""

    table: Tensor
    columns: slice
    places: slice
    bags: Tensor
    shares: Tensor

    def gradients(self, group: TableGroup, gradient: Tensor, weights: Tensor | None) -> Tensor:
        """Of each of its ids: [n, D]."""
        if group.pooling == "none":
            return gradient[self.places]
        of_ids = (gradient[:, self.columns] * self.shares).index_select(0, self.bags)
        return of_ids if weights is None else of_ids * weights[self.places].unsqueeze(1)


def _features(group: TableGroup, offsets: Tensor) -> list[_Feature]:
    count, columns, found = group.bags(offsets), group.columns.tolist(), []
    for feature, begin in enumerate(group.begins.tolist()):
        own = offsets[feature * count : (feature + 1) * count + 1]  # [B + 1]
        sizes = own.diff()
        shares = 1 / sizes.clamp(min=1).float() if group.pooling == "mean" else torch.ones(count)
        first, last = columns[feature : feature + 2]
        found.append(
            _Feature(
                _rows(group.memory, begin, last - first),
                slice(first, last),
                slice(int(own[0]), int(own[-1])),
                torch.arange(count).repeat_interleave(sizes),
                shares.unsqueeze(1),
            )
        )
    return found


def _rows(memory: Tensor, begin: int, width: int) -> Tensor:
    """From ``begin`` on, as far as they go."""
    count = (len(memory) - begin) // width
    return memory[begin : begin + count * width].view(count, width)
