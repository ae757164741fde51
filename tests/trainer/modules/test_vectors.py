"""Vectors as dense inputs, against NumPy."""

import numpy as np
import torch

from data_loaders.schema import Feature, Schema
from trainer.modules.vectors import DenseVectors

SCHEMA = Schema(
    features={
        "plain": Feature("vector", dim=2),
        "price": Feature("dense"),
        "image.v": Feature("vector", dim=3, project=4, normalize="l2"),
        "text": Feature("vector", dim=2, normalize="l2"),
    }
)


def test_numbers_then_vectors_normalised_and_projected():
    torch.manual_seed(0)
    module, dense = DenseVectors(SCHEMA), torch.randn(5, 1 + 2 + 3 + 2)
    dense[2, 3:6] = 0  # of length 0
    (projection,) = module.projections.values()
    assert SCHEMA.dense == ("price", "plain", "plain", *["image.v"] * 4, "text", "text")
    found = module(dense)
    given = dense.double().numpy()
    image, text = given[:, 3:6], given[:, 6:]
    image = image / np.maximum(np.linalg.norm(image, axis=1, keepdims=True), 1e-12)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    expected = np.hstack((given[:, :3], image @ projection.weight.detach().double().numpy().T, text))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(dense), found)
    found.sum().backward()
    assert projection.weight.grad.abs().sum() > 0
