"""MaskNet (Wang et al., 2021, "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by Instance-Guided Mask",
section 3).

A block is ``relu(LN(W (mask * x)))``, its mask ``W_2 relu(W_1 v + c_1) + c_2`` of the row's embeddings ``v``. Serial: the first
block's ``x`` are the embeddings, each normalised by itself, every further one's is the output of the block before, and the
logit is linear in the last. Parallel: all blocks are over the embeddings, and a network is over their outputs.

Shapes: B rows of this rank, F fields, D embedding_dim, I width of x, H units of a block.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.fields import FieldNorm, Fields
from trainer.modules.head import Head
from trainer.modules.mlp import MLP, check_least, check_units

STRUCTURES = ("parallel", "serial")
MOST_BLOCKS = 16


class MaskNet(PooledModel):
    """``structure``: parallel or serial; ``block_units``: of each block, ``reduction``: how many times wider than its input a
    mask's hidden layer is; ``hidden_units`` (of the parallel model), ``dropout``: of the network behind the blocks.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        structure: str = "parallel",
        block_units: list[int] = [128, 128, 128],
        reduction: float = 2.0,
        hidden_units: list[int] = [128, 128],
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        one_of(structure, STRUCTURES, "model.structure")
        check_units(block_units, "model.block_units")
        check_units(hidden_units, "model.hidden_units")
        if len(block_units) > MOST_BLOCKS:
            raise UserError(f"model.block_units has {len(block_units)} blocks: give at most {MOST_BLOCKS}")
        layout, dim, count = schema.layout(), field_dim(schema, "masknet"), len(field_names(schema))
        parallel, width = structure == "parallel", count * dim
        check_least(int(reduction * min(width, *block_units)), 1, "model.reduction (times the width of a block)")
        tables, groups = pooled_lookup(schema, layout.pooled)
        inputs = [width] * len(block_units) if parallel else [width, *block_units[:-1]]
        kinds = ["embedded" if parallel or block == 0 else "hidden" for block in range(len(block_units))]
        blocks = (
            MaskBlock(width, each, units, reduction, kind)
            for each, units, kind in zip(inputs, block_units, kinds, strict=True)
        )
        head = MaskNetHead(
            Fields(groups, len(schema.dense), dim),
            FieldNorm(count, dim),
            nn.ModuleList(blocks),
            MLP(sum(block_units), hidden_units, dropout=dropout, out_dim=1)
            if parallel
            else MLP(block_units[-1], [], out_dim=1),
            parallel,
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """By names that a block has only where it masks the embeddings: ``embedded`` in place of ``hidden``."""
        dim, names = field_dim(schema, "masknet"), field_names(schema)
        ones, wide = [(name, 1) for name in names], [(name, dim) for name in names]
        axes: FeatureAxes = {"head.norm.gain": (0, ones), "head.norm.bias": (0, ones)}
        for block in range(MOST_BLOCKS):
            prefix = f"head.blocks.{block}"
            axes |= {f"{prefix}.squeeze.weight": (1, wide), f"{prefix}.linear.embedded.weight": (1, wide)}
            axes |= {f"{prefix}.mask.embedded.{part}": (0, wide) for part in ("weight", "bias")}
        return axes | field_axes(schema)


class MaskBlock(nn.Module):
    """``embedded``: width of the row's embeddings; ``in_dim``: of what is masked; ``kind``: embedded or hidden, what that is."""

    def __init__(self, embedded: int, in_dim: int, units: int, reduction: float, kind: str) -> None:
        super().__init__()
        width = int(reduction * in_dim)
        self.kind, self.squeeze = kind, nn.Linear(embedded, width)
        # By name, since only the embeddings' columns belong to features.
        self.mask = nn.ModuleDict({kind: nn.Linear(width, in_dim)})
        self.linear = nn.ModuleDict({kind: nn.Linear(in_dim, units, bias=False)})
        self.norm = nn.LayerNorm(units)

    def forward(self, embedded: Tensor, inputs: Tensor) -> Tensor:
        """[B, F D], [B, I] -> [B, H] float32."""
        mask = self.mask[self.kind](functional.relu(self.squeeze(embedded)))
        return functional.relu(self.norm(self.linear[self.kind](mask * inputs).float()))


class MaskNetHead(Head):
    def __init__(self, fields: Fields, norm: FieldNorm, blocks: nn.ModuleList, output: MLP, parallel: bool) -> None:
        super().__init__()
        self.fields, self.norm, self.blocks, self.output, self.parallel = fields, norm, blocks, output, parallel

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, _ = self.fields(dense, pooled)
        embedded, inputs = fields.flatten(1), self.norm(fields).flatten(1)  # [B, F D]
        if self.parallel:
            hidden = torch.cat([block(embedded, inputs) for block in self.blocks], dim=1)
        else:
            hidden = inputs
            for block in self.blocks:
                hidden = block(embedded, hidden)
        return self.output(hidden, valid=weights).squeeze(1)


Model = MaskNet
