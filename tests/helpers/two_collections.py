"""A model with two embedding collections."""

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

META = torch.device("meta")


class TwoCollections(nn.Module):
    def __init__(self, sequence_table: str = "item") -> None:
        super().__init__()
        mean = EmbeddingBagConfig(
            name="user", num_embeddings=9, embedding_dim=8, feature_names=["user", "friends"], pooling=PoolingType.MEAN
        )
        wide = EmbeddingBagConfig(name="wide_user", num_embeddings=9, embedding_dim=4, feature_names=["user"])
        self.bags = EmbeddingBagCollection(tables=[mean, wide], device=META)
        sequence = EmbeddingConfig(name=sequence_table, num_embeddings=5, embedding_dim=4, feature_names=["clicks"])
        self.inner = nn.ModuleDict({"sequences": EmbeddingCollection(tables=[sequence], device=META)})
