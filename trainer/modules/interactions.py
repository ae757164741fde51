"""Feature interactions: products of fields, cross networks. Tensors in, tensors out.

Shapes: B rows of this rank, F fields, D embedding_dim, P pairs of fields, I width of a cross network's input, K experts,
R rank of their matrices.

Under autocast the matrix products are in its type; what they are added to and multiplied with stays float32.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.linalg import vector_norm as norm
from torch.nn import functional

from trainer.modules.mlp import MLP


class InnerProduct(nn.Module):
    """``<v_i, v_j>`` of all pairs i < j of fields, row by row of the triangle: (0, 1), (0, 2), … (Qu et al., 2016,
    section III-B; Naumov et al., 2019, section 2.1.3). Their sum is the factorization machine's."""

    def forward(self, fields: Tensor) -> Tensor:
        """``fields`` [B, F, D] -> [B, P]."""
        count = fields.shape[1]
        row, column = torch.triu_indices(count, count, offset=1, device=fields.device)
        products = torch.bmm(fields, fields.transpose(1, 2)).flatten(1)  # [B, F * F]
        return products.index_select(1, row * count + column)


class OuterProduct(nn.Module):
    """``sum over i, j of v_i v_j^T``, which is ``s s^T`` for the sum ``s`` of all fields (Qu et al., 2016, section III-C:
    the superposition that makes outer products affordable)."""

    def forward(self, fields: Tensor) -> Tensor:
        """``fields`` [B, F, D] -> [B, D * D] float32."""
        total = fields.float().sum(1)  # [B, D]
        return (total.unsqueeze(2) * total.unsqueeze(1)).flatten(1)


class CrossNetwork(nn.Module):
    """Cross layers with a vector each: ``x_{l+1} = x_0 (x_l . w_l) + b_l + x_l`` (Wang et al., 2017, "Deep & Cross Network
    for Ad Click Predictions", equation 3)."""

    def __init__(self, in_dim: int, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_layers, in_dim))
        self.biases = nn.Parameter(torch.zeros(num_layers, in_dim))
        nn.init.normal_(self.weights, std=in_dim**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` [B, I] -> [B, I] float32, also under autocast: one product a layer, whose error would multiply."""
        with torch.autocast(inputs.device.type, enabled=False):
            start = crossed = inputs.float()
            for weight, bias in zip(self.weights, self.biases, strict=True):
                crossed = start * (crossed @ weight).unsqueeze(1) + bias + crossed
        return crossed


class MatrixCrossNetwork(nn.Module):
    """Cross layers with a matrix each: ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` (Wang et al., 2021, "DCN V2", equation 1)."""

    def __init__(self, in_dim: int, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_layers, in_dim, in_dim))
        self.biases = nn.Parameter(torch.zeros(num_layers, in_dim))
        nn.init.normal_(self.weights, std=in_dim**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` [B, I] -> [B, I] float32."""
        start = crossed = inputs.float()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = start * (functional.linear(crossed, weight) + bias) + crossed
        return crossed


class LowRankCrossNetwork(nn.Module):
    """Cross layers whose matrices are ``U V^T`` of rank R (Wang et al., 2021, equation 2) or, with several experts, mixtures
    of such, each with a nonlinear step in its R dimensions (equations 3 to 5):

    ``x_{l+1} = sum over k of G_k(x_l) E_k(x_l) + x_l``,  ``E_k(x_l) = x_0 * (U_k tanh(C_k tanh(V_k^T x_l)) + b)``.

    The gates ``G`` are a softmax: they sum to 1, so ``b`` is added once, and the experts' ``U`` are one product.
    """

    def __init__(self, in_dim: int, num_layers: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.down = nn.Parameter(torch.empty(num_layers, num_experts * rank, in_dim))  # V_k^T, one below the other
        self.up = nn.Parameter(torch.empty(num_layers, in_dim, num_experts * rank))  # U_k, side by side
        self.biases = nn.Parameter(torch.zeros(num_layers, in_dim))
        nn.init.normal_(self.down, std=in_dim**-0.5)
        nn.init.normal_(self.up, std=rank**-0.5)
        if num_experts > 1:
            self.middle = nn.Parameter(torch.empty(num_layers, num_experts, rank, rank))  # C_k
            self.gates = nn.Parameter(torch.empty(num_layers, num_experts, in_dim))
            nn.init.normal_(self.middle, std=rank**-0.5)
            nn.init.normal_(self.gates, std=in_dim**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` [B, I] -> [B, I] float32."""
        start = crossed = inputs.float()
        for layer in range(len(self.biases)):
            hidden = functional.linear(crossed, self.down[layer])  # [B, K * R]
            if self.num_experts > 1:
                hidden = self._experts(layer, crossed, hidden)
            crossed = start * (functional.linear(hidden, self.up[layer]) + self.biases[layer]) + crossed
        return crossed

    def _experts(self, layer: int, inputs: Tensor, hidden: Tensor) -> Tensor:
        """``hidden`` [B, K * R] -> the same, through each expert's nonlinear step and times its gate."""
        narrow = hidden.unflatten(1, (self.num_experts, -1)).tanh()  # [B, K, R]
        stepped = torch.einsum("bkr,ksr->bks", narrow, self.middle[layer]).tanh()
        gates = functional.linear(inputs, self.gates[layer]).softmax(1)  # [B, K]
        return (gates.unsqueeze(2) * stepped).flatten(1)


class CompressedInteractions(nn.Module):
    """CIN: ``X^k_h = sum over i, j of W^k_hij (X^{k-1}_i * X^0_j)``, products entry by entry, of each layer summed over its D
    entries (Lian et al., 2018, "xDeepFM", equations 6 to 8)."""

    def __init__(self, num_fields: int, units: list[int]) -> None:
        super().__init__()
        widths = zip(units, (num_fields, *units), strict=False)
        self.weights = nn.ParameterList(torch.empty(unit, before, num_fields) for unit, before in widths)
        for weight in self.weights:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)

    def forward(self, fields: Tensor) -> Tensor:
        """``fields`` [B, F, D] -> [B, sum of units] float32."""
        hidden, sums = fields, []
        for weight in self.weights:
            products = (hidden.unsqueeze(2) * fields.unsqueeze(1)).flatten(1, 2)  # [B, H F, D]
            hidden = torch.matmul(weight.flatten(1), products)
            sums.append(hidden.float().sum(2))
        return torch.cat(sums, dim=1)


class FieldAttention(nn.Module):
    """Self-attention among the fields: ``relu(heads beside each other + W v)``, a head being the values weighted by the softmax
    of ``<W_q v_m, W_k v_n>`` over n (Song et al., 2019, "AutoInt", equations 5 to 8)."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.Linear(dim, 4 * heads * width, bias=False)  # query, key, value, residual

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, F, heads * width]."""
        query, key, value, residual = self.projections(fields).chunk(4, dim=2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        weights = torch.matmul(query, key.transpose(2, 3)).float().softmax(3)  # [B, heads, F, F]
        attended = torch.matmul(weights.to(value.dtype), value)  # [B, heads, F, width]
        return functional.relu(attended.transpose(1, 2).flatten(2) + residual)


class SqueezeExcitation(nn.Module):
    """SENET: each field times a weight that follows from the means of all, ``relu(W_2 relu(W_1 z))`` (Huang et al., 2019,
    "FiBiNET", equations 1 to 3)."""

    def __init__(self, num_fields: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(1, num_fields // reduction)
        self.squeeze = nn.Linear(num_fields, squeezed, bias=False)
        self.excite = nn.Linear(squeezed, num_fields, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, F, D]."""
        weights = functional.relu(self.excite(functional.relu(self.squeeze(fields.mean(2)))))
        return fields * weights.unsqueeze(2)


class BilinearProduct(nn.Module):
    """``(v_i W) * v_j`` of all pairs i < j, entry by entry, in the order of ``InnerProduct``: one matrix for all pairs (all), one
    for each left field (each) or for each pair (interaction) (Huang et al., 2019, equation 5)."""

    def __init__(self, num_fields: int, dim: int, kind: str) -> None:
        super().__init__()
        pairs = num_fields * (num_fields - 1) // 2
        matrices = {"all": 1, "each": num_fields - 1, "interaction": pairs}[kind]
        self.kind = kind
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(matrices, dim, dim), std=dim**-0.5))

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, P, D]."""
        count = fields.shape[1]
        left, right = torch.triu_indices(count, count, offset=1, device=fields.device)
        if self.kind == "interaction":
            lefts = torch.einsum("bpd,pde->bpe", chosen(fields, left), self.weight)
        else:
            weight = self.weight if self.kind == "each" else self.weight.expand(count - 1, -1, -1)
            lefts = chosen(torch.einsum("bfd,fde->bfe", fields[:, :-1], weight), left)
        return lefts * chosen(fields, right)


def chosen(fields: Tensor, index: Tensor) -> Tensor:
    """``fields`` [B, F, D] at the places ``index`` [P] -> [B, P, D]: a product, whose gradient is added up in a fixed order on a
    GPU too, where that of ``index_select`` is not."""
    places = torch.arange(fields.shape[1], device=index.device)
    return torch.matmul((index.unsqueeze(1) == places).to(fields.dtype), fields)


class BilinearFusion(nn.Module):
    """``b + w_1 . x + w_2 . y + sum over heads of x_k W_k y_k``, the heads being parts of x and y (Mao et al., 2023, "FinalMLP",
    equations 9 to 11)."""

    def __init__(self, first: int, second: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Parameter(nn.init.normal_(torch.empty(first), std=first**-0.5))
        self.second = nn.Parameter(nn.init.normal_(torch.empty(second), std=second**-0.5))
        products = torch.empty(heads, first // heads, second // heads)
        self.products = nn.Parameter(nn.init.normal_(products, std=(first * second) ** -0.5))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[B, X], [B, Y] -> [B] float32, also under autocast."""
        heads = len(self.products)
        with torch.autocast(first.device.type, enabled=False):
            lefts = torch.einsum("bkx,kxy->bky", first.float().unflatten(1, (heads, -1)), self.products)
            products = (lefts.flatten(1) * second.float()).sum(1)
            return products + first.float() @ self.first + second.float() @ self.second + self.bias


class WukongLayer(nn.Module):
    """``LN([FMB(X), LCB(X)] + X)`` (Zhang et al., 2024, "Wukong", section 3.2 to 3.6): ``FMB = MLP(LN(X X^T Y))``,
    ``LCB = W X``. Where their vectors are not as many as X's, the residual is ``R X``. The network's first layer
    is ``first``, with an axis of its own for the vectors of X."""

    def __init__(self, count: int, dim: int, products: int, linear: int, rank: int, units: list[int]) -> None:
        super().__init__()
        self.projection = normal(count, rank, fan_in=count)  # Y
        self.gain = nn.Parameter(torch.ones(count, rank))
        self.bias = nn.Parameter(torch.zeros(count, rank))
        self.first = normal(units[0], count, rank, fan_in=count * rank)
        self.rest = MLP(units[0], units[1:], out_dim=products * dim)
        self.first_bias = nn.Parameter(torch.zeros(units[0]))
        self.linear = normal(linear, count, fan_in=count)
        self.residual = normal(products + linear, count, fan_in=count) if products + linear != count else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, F, D] -> [B, products + linear, D] float32."""
        projected = torch.matmul(self.projection.t(), vectors)  # Y^T X: [B, rank, D]
        products = torch.matmul(vectors, projected.transpose(1, 2)).flatten(1).float()  # [B, F * rank]
        normed = functional.layer_norm(products, products.shape[1:], self.gain.flatten(), self.bias.flatten())
        hidden = functional.relu(functional.linear(normed, self.first.flatten(1), self.first_bias))
        made = self.rest(hidden).unflatten(1, (-1, vectors.shape[2]))
        together = torch.cat((made, torch.matmul(self.linear, vectors).float()), dim=1)
        residual = vectors if self.residual is None else torch.matmul(self.residual, vectors)
        return self.norm(together + residual.float())


def normal(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=fan_in**-0.5))


class FactorizationMachine(nn.Module):
    """``linear + <w, x> + sum over i < j of <v_i, v_j>`` over the vectors of F embedded fields and of N numbers x, which are
    fields ``x * v`` (Rendle, 2010, equation 1). Pairs are summed by lemma 3.1, ``(|sum of v|^2 - sum of |v|^2) / 2``, of
    which numbers are products of matrices: no vector ``x * v`` is made."""

    def forward(
        self,
        linear: Tensor,
        fields: Tensor,
        dense: Tensor | None = None,
        weights: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """``linear`` [B], ``fields`` [B, F, D], and where there are numbers ``dense`` [B, N], ``weights`` [N] and ``vectors``
        [N, D] -> [B] float32, also under autocast."""
        with torch.autocast(fields.device.type, enabled=False):
            return _Machine.apply(linear.float(), fields.float(), dense, weights, vectors)


class _Machine(torch.autograd.Function):
    """In few operations, which keep nothing but the inputs and the sum of vectors [B, D]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        linear: Tensor,
        fields: Tensor,
        dense: Tensor | None,
        weights: Tensor | None,
        vectors: Tensor | None,
    ) -> Tensor:
        sums, parts = fields.sum(1), [fields.flatten(1)]
        if dense is not None:
            linear, sums = torch.addmv(linear, dense, weights), sums.addmm_(dense, vectors)
            parts.append(dense * norm(vectors, dim=1))  # as long as the vectors x * v
        ctx.save_for_backward(fields, sums, dense, vectors)
        length = norm(sums, dim=1)  # [B]
        result = torch.addcmul(linear, length, length, value=0.5)
        for part in parts:
            length = norm(part, dim=1)
            result.addcmul_(length, length, value=-0.5)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        fields, sums, dense, vectors = ctx.saved_tensors
        of_row = gradient.unsqueeze(1)  # [B, 1]
        scaled = sums * of_row  # [B, D]
        of_fields = torch.addcmul(scaled.unsqueeze(1), fields, of_row.unsqueeze(2), value=-1)  # g (sum - v)
        if dense is None:
            return gradient, of_fields, None, None, None
        squares = dense.square().t() @ of_row  # [N, 1]
        of_vectors = torch.addcmul(dense.t() @ scaled, vectors, squares, value=-1)
        return gradient, of_fields, None, dense.t() @ gradient, of_vectors
