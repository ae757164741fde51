"""Compiled lookups and updates of tables against FBGEMM's own, over random shapes; Adam, which FBGEMM lacks on a CPU, against the
one in PyTorch (and in closed form: ``tests/trainer/optim/test_tables_ranks.py``)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from tests.helpers.compiled import compiled_kernels
from trainer.sharding.cpu_tables import CpuTables

pytestmark = compiled_kernels
POOLINGS = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN, "none": PoolingMode.NONE}
OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}
WIDTHS = (4, 8, 12, 16, 32, 64, 68, 132)  # with code of their own, and without
PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}
STEPS = 3


@dataclass(frozen=True)
class Case:
    """Tables of ``rows`` and ``widths``, and which one each feature reads."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    of_feature: tuple[int, ...]
    bags: int
    longest: int  # bag

    def module(self, compiled: bool | None, optimizer: str, pooling: str, precision: str) -> torch.nn.Module:
        """``compiled`` None: FBGEMM's."""
        arguments = {
            "embedding_specs": [
                (rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in zip(self.rows, self.widths)
            ],
            "feature_table_map": list(self.of_feature),
            "optimizer": OPTIMIZERS[optimizer],
            "pooling_mode": POOLINGS[pooling],
            "weights_precision": PRECISIONS[precision],
            "learning_rate": 0.1,
            "eps": 1e-3,
            "device": torch.device("cpu"),
            "stochastic_rounding": False,
        }
        if compiled is None:
            made = SplitTableBatchedEmbeddingBagsCodegen(**arguments)
        else:
            made = CpuTables(**arguments, compiled=compiled)
        made.weights_host.data.normal_(generator=torch.Generator().manual_seed(1))
        return made

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, offsets); bags of 0 to ``longest`` ids, of tables that are smaller than a batch."""
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            features = len(self.of_feature)
            lengths = torch.randint(self.longest + 1, (features, self.bags), generator=generator)
            ids = [
                torch.randint(self.rows[table], (int(sizes.sum()),), generator=generator)
                for table, sizes in zip(self.of_feature, lengths)
            ]
            offsets = torch.zeros(features * self.bags + 1, dtype=torch.int64)
            offsets[1:] = lengths.flatten().cumsum(0)
            yield torch.cat(ids), offsets


def random_case(seed: int, *, equal_widths: bool) -> Case:
    choose = random.Random(seed)
    tables = choose.randint(1, 6)
    width = choose.choice(WIDTHS)
    return Case(
        rows=tuple(choose.choice((1, 3, 40)) for _ in range(tables)),
        widths=tuple(width if equal_widths else choose.choice(WIDTHS) for _ in range(tables)),
        of_feature=tuple(table for table in range(tables) for _ in range(choose.randint(1, 3))),
        bags=choose.choice((1, 7, 300)),
        longest=choose.choice((0, 1, 4)),
    )


def train(module: torch.nn.Module, case: Case, *, weighted: bool = False) -> list[Tensor]:
    """What each step looked up, and at last weights and states."""
    found = []
    for ids, offsets in case.batches():
        weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(len(ids))) if weighted else None
        output = module(ids, offsets, weights)
        found.append(output.detach().clone())
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(len(found))))
    states = [module.momentum1_host, module.momentum2_host]
    return [*found, module.weights_host.detach(), *(state.detach() for state in states if state.numel())]


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_lookups_and_updates_are_those_of_the_reference(optimizer: str, pooling: str, precision: str) -> None:
    # Sums of up to 5,000 gradients in another order. In fp16 each of 3 steps may end at the neighbouring number (2^-9 of rows
    # up to 4), which sums of 4 rows multiply.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 3e-3, "atol": 3 * 4 * 2**-9}
    for seed in range(8):
        case = random_case(seed, equal_widths=pooling == "none")
        reference = case.module(False if optimizer == "adam" else None, optimizer, pooling, precision)
        expected = train(reference, case)
        found = train(case.module(True, optimizer, pooling, precision), case)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_ids_with_weights(optimizer: str) -> None:
    for seed in range(4):
        case = random_case(seed, equal_widths=False)
        reference = case.module(False if optimizer == "adam" else None, optimizer, "sum", "fp32")
        expected = train(reference, case, weighted=True)
        found = train(case.module(True, optimizer, "sum", "fp32"), case, weighted=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{case}: {text}")
        if case.longest:
            assert not torch.equal(found[0], train(case.module(True, optimizer, "sum", "fp32"), case)[0])


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_results_are_the_same_bits_from_any_number_of_threads(optimizer: str, pooling: str) -> None:
    """Of one table and of more tables than threads: they are divided in different ways."""
    threads = torch.get_num_threads()
    try:
        for tables in (1, 20):
            case = Case((50,) * tables, (16,) * tables, tuple(range(tables)), bags=400, longest=5)
            runs = []
            for count in (1, 1, 2, 3):
                torch.set_num_threads(count)
                runs.append(train(case.module(True, optimizer, pooling, "fp32"), case))
            assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_without_rows_and_one_without_ids(compiled: bool) -> None:
    case = Case((5, 5), (8, 8), (0, 1), bags=0, longest=0)
    module = case.module(compiled, "adam", "mean", "fp32")
    before = module.weights_host.detach().clone()
    for bags in (0, 3):
        output = module(torch.empty(0, dtype=torch.int64), torch.zeros(2 * bags + 1, dtype=torch.int64))
        assert torch.equal(output, torch.zeros(bags, 16))
        output.sum().backward()
    assert torch.equal(module.weights_host, before) and int(module.iter_cpu) == 2


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_what_is_not_finite_stays_in_its_row(optimizer: str) -> None:
    module = Case((4,), (8,), (0,), bags=3, longest=1).module(True, optimizer, "sum", "fp32")
    gradient = torch.ones(3, 8)
    gradient[0, 3], gradient[1, 0] = float("nan"), float("inf")
    module(torch.tensor([2, 1, 0]), torch.arange(4)).backward(gradient)
    finite = module.weights_host.detach().view(4, 8).isfinite()
    assert finite[0].all() and finite[3].all()
    assert not finite[2, 3] and not (optimizer == "sgd" and finite[1, 0])
    whole = optimizer == "rowwise_adagrad"  # one sum of squares a row
    assert finite[2].any() != whole


def test_ids_may_have_32_bits() -> None:
    case = Case((9,), (16,), (0,), bags=6, longest=3)
    wide, narrow = (case.module(True, "adagrad", "sum", "fp32") for _ in range(2))
    for ids, offsets in case.batches():
        one, other = wide(ids, offsets), narrow(ids.int(), offsets.int())
        assert torch.equal(one, other)
        one.sum().backward()
        other.sum().backward()
    assert torch.equal(wide.weights_host, narrow.weights_host)


def test_weights_that_learn_are_left_to_fbgemm() -> None:
    case = Case((9, 9), (16, 8), (0, 1), bags=6, longest=3)
    ours, theirs = (case.module(compiled, "rowwise_adagrad", "sum", "fp32") for compiled in (True, None))
    for ids, offsets in case.batches():
        outputs = []
        for module in (ours, theirs):
            weights = torch.linspace(0.5, 2.0, len(ids)).requires_grad_()
            output = module(ids, offsets, per_sample_weights=weights)
            output.square().sum().backward()
            outputs.append((output, weights.grad))
        assert all(torch.equal(one, other) for one, other in zip(*outputs))
    assert torch.equal(ours.weights_host, theirs.weights_host)
