"""Logits of a model against a formula."""

from dataclasses import replace

import numpy as np
import torch

from tests.helpers.samples import make_batch, pooled_bag, randomize, state

CPU = torch.device("cpu")
BAGS = "embedding_bags.embedding_bags"


def made(model_class, schema, **options):
    model = model_class(schema, **options, device=CPU)
    randomize(model)
    return model.eval()


def logits(model, schema, rows):
    return model(make_batch(schema, model.layout, rows)).detach()


def check_equals(naive, model, schema, rows):
    values = state(model)
    expected = [naive(schema, values, row) for row in rows]
    np.testing.assert_allclose(logits(model, schema, rows), expected, rtol=1e-4, atol=1e-5)


def without_numbers(schema):
    return replace(schema, features={name: f for name, f in schema.features.items() if f.kind != "dense"})


def field(schema, values, key, row):
    table = schema.features[key].table
    return pooled_bag(values[f"{BAGS}.{table}.weight"], row[key], schema.tables[table].pooling)
