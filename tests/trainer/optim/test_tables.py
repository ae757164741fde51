"""What does not need ranks: names of tables, state sizes, and the step count of FBGEMM's Adam."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.helpers.two_collections import TwoCollections
from trainer.config.optim import TABLE_OPTIMIZERS, OptimConfig, TableOptimizerConfig
from trainer.optim.tables import (
    _check_fused,
    fused_optimizer,
)
from trainer.sharding.kernels import _uncount_evaluation
from trainer.sharding.table_plan import EmbeddingTable, embedding_tables


def user_table(optimizer: TableOptimizerConfig, dtype: torch.dtype = torch.float32) -> EmbeddingTable:
    table, *_ = embedding_tables(TwoCollections(), OptimConfig())
    return replace(table, optimizer=optimizer, dtype=dtype)


def test_tables_are_found_under_the_names_of_the_state_dict() -> None:
    model = TwoCollections()
    tables = {table.name: table for table in embedding_tables(model, OptimConfig())}
    assert {table.parameter for table in tables.values()} == set(model.state_dict())
    user, item = tables["user"], tables["item"]
    assert (user.module, user.pooled, user.mean, user.features) == ("bags", True, True, ("user", "friends"))
    assert (user.rows, user.dim) == (9, 8)
    assert (item.module, item.pooled, item.mean) == ("inner.sequences", False, False)
    assert not tables["wide_user"].mean


def test_a_table_in_two_collections_is_refused() -> None:
    with pytest.raises(ValueError, match="table 'user' is in both 'bags' and 'inner.sequences'"):
        embedding_tables(TwoCollections(sequence_table="user"), OptimConfig())


def test_every_optimizer_has_a_fused_form_and_a_size() -> None:
    expected = {"rowwise_adagrad": 40, "adagrad": 320, "sgd": 0, "adam": 640, "ftrl": 0}  # beside a clock of 40
    for name in TABLE_OPTIMIZERS:
        config = TableOptimizerConfig(name, lr=0.3)
        _, arguments = fused_optimizer(config)
        assert arguments["lr"] == (1.0 if name == "ftrl" else 0.3)
        assert fused_optimizer(config)[1] is not arguments  # TorchRec writes into it
        assert user_table(config).state_bytes(rows=10, dim=8) == expected[name] + 40


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TableOptimizerConfig("sgd", weight_decay=0.1, weight_decay_rows="all"),
            "weight_decay_rows=touched, or sharding",
        ),
    ],
)
def test_what_only_data_parallel_tables_have_is_refused_for_others(config: TableOptimizerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _check_fused(user_table(config), torch.device("cpu"))
    _check_fused(user_table(TableOptimizerConfig("adam", weight_decay=0.1)), torch.device("cuda"))


def test_adam_of_fp16_is_refused_before_its_first_step_fails() -> None:
    """FBGEMM 1.8, whose own message speaks of 'row_counter_dev'."""
    with pytest.raises(
        ValueError, match="'user' has optimizer adam and rows of fp16.*dtype=fp32, or use rowwise_adagrad"
    ):
        _check_fused(user_table(TableOptimizerConfig("adam"), torch.float16), torch.device("cuda"))
    _check_fused(user_table(TableOptimizerConfig("adagrad"), torch.float16), torch.device("cuda"))
    _check_fused(user_table(TableOptimizerConfig("adam"), torch.float16), torch.device("cpu"))


def test_ftrl_has_l2_instead_of_weight_decay() -> None:
    optim = OptimConfig(wide=TableOptimizerConfig("ftrl", weight_decay=0.1))
    with pytest.raises(ValueError, match="'wide_user'.*use l2 instead"):
        embedding_tables(TwoCollections(), optim)


def test_evaluation_does_not_count_as_a_step_of_adam() -> None:
    class Kernel(nn.Module):  # FBGEMM's Adam runs on GPUs only; this counts as it does
        def __init__(self) -> None:
            super().__init__()
            self.iter, self.iter_cpu = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

        def forward(self) -> None:
            self.iter.add_(1)
            self.iter_cpu.add_(1)

    kernel = Kernel()
    kernel.register_forward_hook(_uncount_evaluation)
    for training in (True, False, False, True):
        kernel.train(training)()
    assert (int(kernel.iter), int(kernel.iter_cpu)) == (2, 2)
