import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.samples import mlp, randomize, state
from trainer.modules.attention import TargetAttention
from trainer.modules.dice import Dice
from trainer.modules.execution import Execution, bfloat16, executed_by
from trainer.modules.head import Head
from trainer.modules.interactions import FactorizationMachine
from trainer.modules.jagged import Segments, expand, segment_mean, segment_softmax, segment_sum
from trainer.modules.mlp import MLP, DenseFields, aligned
from trainer.modules.tokens import filled_up, token_linear

LENGTHS = [3, 0, 1, 5, 0]  # tokens of each sample
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 9])
NO_TOKENS = torch.zeros(4, dtype=torch.int64)


def dice_formula(values: torch.Tensor, alpha: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Equation 3, statistics over the chosen rows."""
    mean, variance = values[rows].mean(0), values[rows].var(0, correction=0)
    gate = torch.sigmoid((values - mean) / torch.sqrt(variance + 1e-8))
    return gate * values + (1 - gate) * alpha * values


def inputs_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
def test_mlp_equals_its_formula(activation):
    module = MLP(5, [4, 3], activation=activation, out_dim=2)
    randomize(module)
    module.eval()
    inputs, values = inputs_of(6, 5), state(module)
    renamed = {f"m.{name}": value for name, value in values.items()}
    expected = [mlp(renamed, "m", row, activation) for row in inputs.double().numpy()]
    np.testing.assert_allclose(module(inputs).detach(), expected, rtol=1e-5, atol=1e-5)


def test_mlp_dropout_only_in_training():
    module = MLP(5, [64], dropout=0.5, out_dim=1)
    inputs = inputs_of(8, 5)
    torch.manual_seed(0)
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


def pairs_written_out(linear, fields, dense=None, weights=None, vectors=None):
    """Equation 1 of Rendle, 2010: every number a field, every pair a product."""
    if dense is not None:
        linear = linear + (dense * weights).sum(1)
        fields = torch.cat((fields, dense.unsqueeze(2) * vectors), dim=1)
    pairs = itertools.combinations(range(fields.shape[1]), 2)
    return linear + sum((fields[:, i] * fields[:, j]).sum(1) for i, j in pairs)


@pytest.mark.parametrize("numbers", [0, 1, 3])
def test_factorization_machine_sums_over_pairs_with_gradients(numbers):
    """Fields are columns of a wider lookup, as in a model; the first row is all zeros."""
    lookup = inputs_of(4, 6 * 8 + 4)
    lookup[0] = 0
    dense = inputs_of(4, numbers, seed=1) if numbers else None
    leaves = [
        inputs_of(4, seed=2),
        lookup,
        *([inputs_of(numbers, seed=3), inputs_of(numbers, 8, seed=4)] if numbers else []),
    ]
    found, exact = (
        [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves] for dtype in (torch.float32, torch.float64)
    )
    results = []
    for machine, (linear, wide, *numeric), values in (
        (FactorizationMachine(), found, dense),
        (pairs_written_out, exact, dense.double() if numbers else None),
    ):
        fields = wide[:, :48].unflatten(1, (6, 8))
        results.append(machine(linear, fields, values, *numeric) if numbers else machine(linear, fields))
        (results[-1] * inputs_of(4, seed=5)).sum().backward()
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


def test_factorization_machine_stays_float32_under_autocast():
    arguments = (inputs_of(4), inputs_of(4, 6, 8), inputs_of(4, 3), inputs_of(3), inputs_of(3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = FactorizationMachine()(*arguments)
    assert torch.equal(rounded, FactorizationMachine()(*arguments))


def test_dense_fields_fold_into_the_layer_that_reads_them():
    module = DenseFields(3, 4, init_std=0.01)
    assert not module.weights.any() and module.vectors.any()
    dense, weight = inputs_of(5, 3), inputs_of(7, 12, seed=1)
    fields = (dense.unsqueeze(2) * module.vectors).flatten(1)
    torch.testing.assert_close(dense @ module.folded(weight).t(), fields @ weight.t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_layers_in_one_function_have_the_gradients_of_each_by_itself(dtype):
    module = MLP(12, [16, 8], out_dim=1)
    randomize(module)
    inputs, found, expected = inputs_of(64, 12), [], []
    for one, gradients in ((True, found), (False, expected)):
        module.zero_grad()
        leaf = inputs.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = leaf
            for layer in () if one else module.layers:
                hidden = torch.relu(layer(hidden))
            output = module(leaf) if one else module.output(hidden.float())
        output.square().sum().backward()
        gradients += [output.detach().float(), leaf.grad, *(parameter.grad for parameter in module.parameters())]
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-23  # in float32 products are summed in another order
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=8 * unit * float(theirs.abs().max()))


def test_columns_of_zeros_change_nothing():
    for width in (15, 16, 17):
        parts = inputs_of(6, width - 5), inputs_of(6, 5, seed=1)
        filled, module = aligned(*parts), MLP(width, [4], out_dim=1)
        assert filled.shape == (6, -(-width // 16) * 16)
        assert torch.equal(filled[:, :width], torch.cat(parts, dim=1)) and not filled[:, width:].any()
        module(filled).sum().backward()
        gradient = module.layers[0].weight.grad.clone()
        torch.testing.assert_close(module(filled), module(torch.cat(parts, dim=1)))
        module.zero_grad()
        module(torch.cat(parts, dim=1)).sum().backward()
        torch.testing.assert_close(gradient, module.layers[0].weight.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_dice_equals_the_paper_with_gradients(masked):
    module = Dice(4)
    randomize(module, std=1.0)
    valid = torch.tensor([1.0, 0.5, 0.0, 3.0, 0.0, 1.0]) if masked else None
    rows = valid > 0 if masked else torch.ones(6, dtype=torch.bool)
    values, weights = (inputs_of(6, 4) * 3 + 2).requires_grad_(), inputs_of(6, 4, seed=1)
    exact, alpha = values.detach().double().requires_grad_(), module.alpha.detach().double().requires_grad_()
    expected = dice_formula(exact, alpha, rows)
    (expected * weights).sum().backward()
    found = module(values, valid)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.alpha.grad.double(), alpha.grad, rtol=1e-5, atol=1e-5)


def test_dice_moving_averages():
    module = Dice(3, momentum=0.25)
    batches = [inputs_of(50, 3, seed=seed) * (seed + 1) + seed for seed in range(7)]
    mean, variance = torch.zeros(3), torch.ones(3)
    for number, batch in enumerate(batches, start=1):
        module(batch)
        rate = max(1 / number, 0.25)
        mean = (1 - rate) * mean + rate * batch.mean(0)
        variance = (1 - rate) * variance + rate * batch.var(0, correction=0)
    torch.testing.assert_close(module.moving_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.moving_variance, variance, rtol=1e-5, atol=1e-5)
    before = [buffer.clone() for buffer in module.buffers()]
    module.eval()
    one = module(batches[0][:1])
    torch.testing.assert_close(one[0], module(batches[0])[0])
    gate = torch.sigmoid((batches[0][0] - mean) / torch.sqrt(variance + 1e-8))
    torch.testing.assert_close(one[0], gate * batches[0][0], rtol=1e-5, atol=1e-5)  # alpha starts at 0
    assert all(torch.equal(*pair) for pair in zip(before, module.buffers(), strict=True))


def test_dice_statistics_far_from_zero():
    """Sums of squares of plain values would lose the variance here: 1e4 ** 2 is 1e8 times it."""
    module = Dice(2)
    module.moving_mean.fill_(1e4 + 1)
    values = inputs_of(1000, 2) + 1e4
    expected = dice_formula(values.double(), torch.zeros(2).double(), torch.ones(1000, dtype=torch.bool))
    # float32 holds the mean of 1e4 to 2^-11; the gate, a sigmoid of (value - mean) / 1, moves by at most that much of itself.
    torch.testing.assert_close(module(values).double(), expected, rtol=2 * 2**-11, atol=0.0)


@pytest.mark.parametrize("valid", [None, torch.zeros(0), torch.zeros(3)])
def test_dice_without_rows(valid):
    module = Dice(4)
    randomize(module)
    before = [buffer.clone() for buffer in module.buffers()]
    values = inputs_of(0 if valid is None else len(valid), 4).requires_grad_()
    output = module(values, valid)
    output.sum().backward()
    assert output.shape == values.shape and output.isfinite().all()
    assert module.alpha.grad.isfinite().all() and values.grad.isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(before, module.buffers(), strict=True))


def test_dice_all_reduce_makes_statistics_global():
    """Two parts with their sums exchanged give what the whole gives; one part has no rows that count."""
    values = inputs_of(10, 4) * 2 + 1
    for cut, valid in ((3, torch.ones(10)), (0, torch.ones(10)), (4, torch.tensor([0.0] * 4 + [1.0] * 6))):
        whole, sums = Dice(4), []
        with executed_by(Execution(all_reduce=lambda own: sums.append(own.clone()))):
            parts = Dice(4), Dice(4)
        pieces = ((values[:cut], valid[:cut]), (values[cut:], valid[cut:]))
        for part, piece in zip(parts, pieces, strict=True):
            part(*piece)
        assert len(sums) == 2 and all(part.shape == (9,) for part in sums)  # once a forward: count, 4 sums, 4 squares
        with executed_by(Execution(all_reduce=lambda own: own.copy_(sums[0] + sums[1]))):
            fresh = Dice(4)
        torch.testing.assert_close(fresh(*pieces[1]), whole(values, valid)[cut:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fresh.moving_variance, whole.moving_variance, rtol=1e-5, atol=1e-6)


def test_dice_statistics_are_float32_under_autocast():
    values = (inputs_of(4096, 2) + 20).bfloat16()
    module = Dice(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(values).dtype == torch.bfloat16
    torch.testing.assert_close(module.moving_mean, values.double().mean(0).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.moving_variance, values.double().var(0).float(), rtol=1e-2, atol=1e-3)


def test_segments():
    values = inputs_of(9, 3).requires_grad_()
    segments = Segments.of(OFFSETS, 9)
    assert segments.sample.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]
    parts = values.split(LENGTHS)
    expected = torch.stack([part.sum(0) for part in parts])
    torch.testing.assert_close(segment_sum(values, segments), expected)
    means = torch.stack([part.mean(0) if len(part) else torch.zeros(3) for part in parts])
    torch.testing.assert_close(segment_mean(values, segments), means)
    narrow = Segments.of(OFFSETS.int(), 9)
    torch.testing.assert_close(segment_sum(values, narrow), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_gradients(dtype):
    segments = Segments.of(OFFSETS, 9)
    values, weights = inputs_of(9, 3).to(dtype).requires_grad_(), inputs_of(5, 3, seed=1)
    (segment_sum(values, segments) * weights).sum().backward()
    torch.testing.assert_close(values.grad, weights[segments.sample].to(dtype))
    rows, token_weights = inputs_of(5, 3).to(dtype).requires_grad_(), inputs_of(9, 3, seed=2).to(dtype)
    expanded = expand(rows, segments)
    assert expanded.dtype == dtype
    (expanded * token_weights).sum().backward()
    expected = torch.stack([part.float().sum(0) for part in token_weights.split(LENGTHS)])
    torch.testing.assert_close(rows.grad, expected.to(dtype))


def test_long_segments_in_bf16_are_summed_in_float32():
    segments = Segments.of(torch.tensor([0, 1001]), 1001)  # bf16 counts to 256
    values, row = (torch.ones(length, 1, dtype=torch.bfloat16, requires_grad=True) for length in (1001, 1))
    assert segment_sum(values, segments).item() == 1001
    expand(row, segments).sum().backward()
    assert row.grad.item() == 1000  # the nearest bf16


def test_segment_softmax():
    segments = Segments.of(OFFSETS, 9)
    scores = (inputs_of(9) * 3).requires_grad_()
    weights = inputs_of(9, seed=1)
    expected = torch.cat([part.softmax(0) for part in scores.split(LENGTHS)])
    (wanted,) = torch.autograd.grad((expected * weights).sum(), scores)
    found = segment_softmax(scores, segments)
    (gradient,) = torch.autograd.grad((found * weights).sum(), scores)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    huge = torch.tensor([1e4, 1e4, -1e4, 5e3] + [-1e4] * 5)
    torch.testing.assert_close(segment_softmax(huge, segments), torch.tensor([0.5, 0.5, 0, 1] + [0.2] * 5))


def naive_attention(module: TargetAttention, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Equation 2 on one sample: the activation unit as written, on all four parts of its input."""
    if not len(tokens):
        return torch.zeros_like(query)
    queries = query.expand_as(tokens)
    hidden = module.first(torch.cat((queries, tokens, queries - tokens, queries * tokens), dim=1))
    if module.positions is not None:  # one-hot distances from the end, times a matrix
        oldest = len(module.positions) - 1
        distances = [
            [float(min(len(tokens) - 1 - t, oldest) == d) for d in range(oldest + 1)] for t in range(len(tokens))
        ]
        hidden = hidden + torch.tensor(distances) @ module.positions
    if module.cosine is not None:
        cosines = (queries * tokens).sum(1) / (queries.norm(dim=1) * tokens.norm(dim=1))
        hidden = hidden + torch.outer(cosines, module.cosine.weight[:, 0])
    scores = module.rest(module.activation(hidden)).squeeze(1)
    weights = scores.softmax(0) if module.softmax else scores
    interest = (weights.unsqueeze(1) * tokens).sum(0)
    return interest if module.intensity is None else interest + weights.sum() * module.intensity


@pytest.mark.parametrize("positions", [None, 3, 7])  # fewer and more than the events of the longest history
@pytest.mark.parametrize(
    "extensions", [{}, {"cosine": True}, {"intensity": True}], ids=["paper", "cosine", "intensity"]
)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_attention_equals_the_paper_with_gradients(activation, softmax, extensions, positions):
    module = TargetAttention(3, [8, 4], activation=activation, softmax=softmax, positions=positions, **extensions)
    randomize(module)
    module.eval()  # Dice's moving averages: samples do not meet
    query, tokens = inputs_of(5, 3).requires_grad_(), inputs_of(9, 3, seed=1).requires_grad_()
    weights = inputs_of(5, 3, seed=2)
    leaves = [query, tokens, *module.parameters()]
    expected = torch.stack([naive_attention(module, *pair) for pair in zip(query, tokens.split(LENGTHS), strict=True)])
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    found = module(query, tokens, OFFSETS)
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-4)
    assert not found[1].any() and not found[4].any()


def test_attention_in_training_equals_padded_attention():
    """Dice's statistics are over tokens, not over the padding of a [B, L] layout."""
    module, padded = (TargetAttention(3, [8], activation="dice") for _ in range(2))
    padded.load_state_dict(module.state_dict())
    query, tokens = inputs_of(5, 3), inputs_of(9, 3, seed=1)
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)  # [B, L]
    keys = torch.zeros(5, 5, 3).masked_scatter(mask.unsqueeze(2), tokens)
    queries = query.unsqueeze(1).expand_as(keys)
    hidden = padded.first(torch.cat((queries, keys, queries - keys, queries * keys), dim=2)).flatten(0, 1)
    scores = padded.rest(padded.activation(hidden, mask.flatten().float())).reshape(5, 5) * mask
    expected = (scores.unsqueeze(2) * keys).sum(1)
    torch.testing.assert_close(module(query, tokens, OFFSETS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.activation.moving_mean, padded.activation.moving_mean)


@pytest.mark.parametrize("softmax", [False, True])
def test_attention_without_tokens(softmax):
    module = TargetAttention(3, [8, 4], activation="dice", softmax=softmax, positions=5)
    query, tokens = inputs_of(3, 3).requires_grad_(), torch.zeros(0, 3).requires_grad_()
    interest = module(query, tokens, NO_TOKENS)
    interest.sum().backward()
    assert torch.equal(interest, torch.zeros(3, 3))
    for leaf in (query, tokens, *module.parameters()):
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_cosine_does_not_know_the_scale_of_the_events():
    """Rows that training has never touched are small; equal ids are told apart from others all the same."""
    module = TargetAttention(3, [8], activation="prelu", cosine=True)
    query, tokens = 1e-3 * inputs_of(5, 3), 1e-3 * inputs_of(9, 3, seed=1)
    segments = Segments.of(OFFSETS, 9)
    others = module.scores(query, tokens, segments)
    tokens[0] = query[0]
    change = (module.scores(query, tokens, segments) - others).abs()
    assert change[0] > 0.01 and not change[1:].any()


def test_attention_to_positions_begins_as_attention_without():
    plain, module = (TargetAttention(3, [8], activation="prelu", positions=positions) for positions in (None, 5))
    module.load_state_dict({**plain.state_dict(), "positions": module.positions.detach()})
    query, tokens = inputs_of(5, 3), inputs_of(9, 3, seed=1)
    assert torch.equal(module(query, tokens, OFFSETS), plain(query, tokens, OFFSETS))
    module(query, tokens, OFFSETS).sum().backward()
    assert module.positions.grad.any(dim=1).all()


def test_attention_of_a_sample_is_its_own():
    module = TargetAttention(3, [8], activation="prelu")
    randomize(module)
    query, tokens = inputs_of(5, 3), inputs_of(9, 3, seed=1)
    before = module(query, tokens, OFFSETS)
    tokens[4:], query[3] = 1e3, -7.0  # sample 3's
    after = module(query, tokens, OFFSETS)
    assert torch.equal(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert not torch.equal(after[3], before[3])


class SumHead(Head):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)

    def logits(self, dense: torch.Tensor) -> torch.Tensor:
        self.seen = self.layer(dense)
        return self.seen.squeeze(1)


def test_a_head_computes_in_the_precision_it_was_made_in():
    with executed_by(Execution(bfloat16)):
        module = SumHead()
    plain = SumHead()
    plain.load_state_dict(module.state_dict())
    dense = inputs_of(4, 64)
    exact, rounded = plain(dense), module(dense)
    assert (module.seen.dtype, plain.seen.dtype) == (torch.bfloat16, torch.float32)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]


class MatrixProducts(TorchDispatchMode):
    """Notes the shapes of all matrix products in bf16, forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        product = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if product and args[-1].dtype == torch.bfloat16:
            self.shapes.add(tuple(tuple(tensor.shape) for tensor in args[-2:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 2047, 2048, 2049, 43_211, 1_000_003])
def test_tokens_are_filled_up_to_few_numbers(num_tokens):
    filled = filled_up(num_tokens)
    assert filled % 64 == 0 and num_tokens <= filled <= max(num_tokens * 17 / 16, num_tokens + 63)
    assert len({filled_up(n) for n in range(max(num_tokens, 1024), 2 * max(num_tokens, 1024), 97)}) <= 17


@pytest.mark.parametrize("num_tokens", [0, 1, 100])
def test_filling_up_changes_neither_products_nor_gradients(num_tokens):
    weight, bias = inputs_of(8, 5, seed=1), inputs_of(8, seed=2)
    found = {}
    for function in (token_linear, nn.functional.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs_of(num_tokens, 5), weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = function(*leaves)
            result.backward(inputs_of(num_tokens, 8, seed=3).bfloat16())
        found[function] = [result, *(leaf.grad for leaf in leaves)]
    for filled, plain in zip(*found.values(), strict=True):
        torch.testing.assert_close(filled, plain, rtol=0.01, atol=0.01)


def test_attention_in_bf16_multiplies_matrices_of_few_shapes():
    attention = TargetAttention(6, [8, 4], activation="dice", cosine=True)
    attention.train()
    found = []
    for length in (130, 131, 190):
        offsets = torch.tensor([0, length // 2, length])
        query, tokens = (inputs_of(rows, 6).requires_grad_() for rows in (2, length))
        with MatrixProducts() as products:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = attention(query, tokens, offsets).sum()
            result.backward()
        found.append(products.shapes)
    assert found[0] and found[0] == found[1] == found[2]
