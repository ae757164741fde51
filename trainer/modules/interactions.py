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
