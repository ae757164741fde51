"""Batch and layer normalisation in an MLP: PyTorch's numbers on the rows that count, of all ranks together."""

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_distributed
from trainer.modules.execution import Execution, executed_by
from trainer.modules.mlp import MLP
from trainer.modules.normalization import BatchNorm
from trainer.runtime.distributed import all_reduce_sum

ROWS, STEPS = 12, 3


def built(normalization, dropout=0.0):
    torch.manual_seed(3)
    with executed_by(Execution(all_reduce=all_reduce_sum)):
        module = MLP(5, [6, 4], activation="prelu", normalization=normalization, dropout=dropout, out_dim=1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("normalizations"):
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return module


def reference(module, normalization):
    """The same in float64 by PyTorch's own modules."""
    parts = []
    for layer, norm, activation in zip(module.layers, module.normalizations, module.activations):
        if normalization == "batch":
            made = nn.BatchNorm1d(layer.out_features, momentum=None)  # the plain average of all batches
        else:
            made = nn.LayerNorm(layer.out_features)
        made.weight.data.copy_(norm.weight.data)
        made.bias.data.copy_(norm.bias.data)
        linear, prelu = (
            nn.Linear(layer.in_features, layer.out_features, layer.bias is not None),
            nn.PReLU(len(activation.weight)),
        )
        linear.load_state_dict(layer.state_dict())
        prelu.load_state_dict(activation.state_dict())
        parts += [linear, made, prelu]
    output = nn.Linear(4, 1)
    output.load_state_dict(module.output.state_dict())
    return nn.Sequential(*parts, output).double()


def batch(step):
    """Inputs [ROWS + 4, 5] far from zero, and which count: padding at the end of either half."""
    inputs = torch.randn(ROWS + 4, 5, generator=torch.Generator().manual_seed(step)) * 3 + 7
    valid = torch.ones(ROWS + 4)
    valid[6:8] = valid[14:] = 0.0
    inputs[valid == 0] = 1e3
    valid[1] = 0.25  # a weight, but a row like any other
    return inputs, valid


def check(rank, world_size, normalization):
    module = built(normalization)
    plain = reference(module, normalization)
    size = (ROWS + 4) // world_size
    mine = slice(rank * size, (rank + 1) * size)
    for step in range(STEPS):
        inputs, valid = batch(step)
        counted = valid > 0
        module.zero_grad()
        plain.zero_grad()
        found = module(inputs[mine], valid[mine]).squeeze(1)
        ((found.square()) * counted[mine]).sum().backward()
        expected = plain(inputs[counted].double()).squeeze(1)
        expected.square().sum().backward()
        whole = torch.zeros(len(inputs))
        whole[mine] = found.detach()
        torch.testing.assert_close(all_reduce_sum(whole)[counted].double(), expected.detach(), rtol=1e-4, atol=1e-5)
        modules = [m for triple in zip(module.layers, module.normalizations, module.activations) for m in triple]
        for own, other in zip([*modules, module.output], plain):
            for (name, parameter), (_, their) in zip(own.named_parameters(), other.named_parameters(), strict=True):
                gradient = all_reduce_sum(parameter.grad.double().clone())
                torch.testing.assert_close(gradient, their.grad, rtol=1e-3, atol=1e-4, msg=name)
    moving = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for own, other in zip(moving, [m for m in plain if isinstance(m, nn.BatchNorm1d)], strict=True):
        torch.testing.assert_close(own.moving_mean.double(), other.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.moving_variance.double(), other.running_var, rtol=1e-4, atol=1e-5)
    assert len(moving) == (2 if normalization == "batch" else 0)
    module.eval()
    plain.eval()
    inputs, _ = batch(9)
    torch.testing.assert_close(
        module(inputs).double(), plain(inputs.double()), rtol=1e-4, atol=1e-4
    )  # each row by itself, no statistics of its batch
    torch.testing.assert_close(module(inputs[:1]), module(inputs)[:1], rtol=1e-5, atol=1e-5)


def check_both(rank, world_size):
    check(rank, world_size, "batch")
    check(rank, world_size, "layer")
    if rank == world_size - 1:  # a rank without a row that counts takes part, and others' statistics are theirs alone
        empty = torch.zeros(ROWS // world_size)
    else:
        empty = torch.ones(ROWS // world_size)
    module = built("batch")
    assert module(batch(0)[0][: len(empty)], empty).isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_normalisation_is_pytorchs_over_the_rows_of_all_ranks_that_count(world_size):
    run_distributed(check_both, world_size)


def test_the_order_is_linear_normalisation_activation_dropout_and_a_cancelled_bias_is_left_out():
    module = MLP(3, [400], normalization="batch", dropout=0.5, out_dim=1)
    assert module.layers[0].bias is None and MLP(3, [4], normalization="layer", out_dim=1).layers[0].bias is not None
    seen = {}
    module.output.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    torch.manual_seed(0)
    inputs = torch.randn(50, 3)
    module(inputs)
    hidden = seen["hidden"]  # what is kept after a ReLU is doubled, the rest 0
    plain = nn.BatchNorm1d(400)(module.layers[0](inputs)).relu()
    kept = hidden != 0
    torch.testing.assert_close(hidden[kept], 2 * plain[kept], rtol=1e-4, atol=1e-5)
    assert 0.45 < kept.float().mean() / (plain > 0).float().mean() < 0.55


def test_an_unknown_normalization_is_named():
    with pytest.raises(ValueError, match="model.normalization: 'btch' is not known; did you mean 'batch'"):
        MLP(3, [4], normalization="btch", out_dim=1)


def test_bf16_changes_little():
    for normalization in ("batch", "layer"):
        torch.manual_seed(0)
        module = MLP(5, [32], normalization=normalization, out_dim=1)
        inputs = torch.randn(64, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module(inputs)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, module(inputs), rtol=0.05, atol=0.05)
