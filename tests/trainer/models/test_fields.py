"""xDeepFM, AutoInt, FiBiNET, FinalMLP, MaskNet and WuKong against their papers' formulas, a row at a time."""

import numpy as np
import pytest

from tests.helpers.model_checks import BAGS, CPU, check_equals, field, made, without_numbers
from tests.helpers.samples import check_dense_start, check_model, mlp, one_dim_schema, pooled_bag, random_rows
from trainer.models import autoint, fibinet, finalmlp, masknet, wukong, xdeepfm


def fields_of(schema, values, row):
    """[F, D]: ids, then numbers."""
    numbers = [row[key] * values["head.fields.vectors"][i] for i, key in enumerate(schema.dense)]
    return np.stack([*(field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)), *numbers])


def first_order(schema, values, row):
    keys = [key for key in (*schema.sparse, *schema.sequences) if key in schema.wide or key in schema.sparse]
    tables = [values[f"{BAGS}.wide_{key.replace('.', '%2E')}.weight"] for key in keys]
    linear = sum(pooled_bag(table, row[key], "sum")[0] for key, table in zip(keys, tables))
    numbers = np.array([row[key] for key in schema.dense])
    return linear + (numbers @ values["head.linear.weight"][0] if len(numbers) else 0.0)


def relu(values):
    return np.maximum(values, 0)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def normed(values):
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


def naive_xdeepfm(schema, values, row):
    start = hidden = fields_of(schema, values, row)
    sums, layer = [], 0
    while f"head.cross.weights.{layer}" in values:
        maps = values[f"head.cross.weights.{layer}"]
        hidden = np.stack(
            [
                sum(one[i, j] * hidden[i] * start[j] for i in range(len(hidden)) for j in range(len(start)))
                for one in maps
            ]
        )
        sums, layer = [*sums, *hidden.sum(1)], layer + 1
    crossed = values["head.cross_output.weight"][0] @ np.array(sums)
    return first_order(schema, values, row) + crossed + float(mlp(values, "head.deep", start.flatten(), "relu")[0])


def naive_autoint(heads):
    def logit(schema, values, row):
        start = hidden = fields_of(schema, values, row)
        layer = 0
        while f"head.attention.{layer}.projections.weight" in values:
            query, key, value, residual = np.split(values[f"head.attention.{layer}.projections.weight"], 4)
            width, found = len(query) // heads, []
            for m in range(len(hidden)):
                parts = []
                for head in range(heads):
                    mine = slice(head * width, (head + 1) * width)
                    scores = np.array([(query[mine] @ hidden[m]) @ (key[mine] @ other) for other in hidden])
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    parts.append(sum(w * (value[mine] @ other) for w, other in zip(weights, hidden)))
                found.append(relu(np.concatenate(parts) + residual @ hidden[m]))
            hidden, layer = np.stack(found), layer + 1
        logit = float((hidden * values["head.output.weight"]).sum() + values["head.output.bias"])
        deep = "head.deep.output.weight" in values
        return logit + (float(mlp(values, "head.deep", start.flatten(), "relu")[0]) if deep else 0.0)

    return logit


def naive_fibinet(kind):
    def logit(schema, values, row):
        names = [*schema.sparse, *schema.sequences, *schema.dense]
        found = dict(zip(names, fields_of(schema, values, row)))
        plain = np.stack([found[name] for name in sorted(names)])
        squeeze, excite = values["head.importance.squeeze.weight"], values["head.importance.excite.weight"]
        weighted = plain * relu(excite @ relu(squeeze @ plain.mean(1)))[:, None]
        products = []
        for part, fields in (("product", plain), ("weighted_product", weighted)):
            pair = 0
            for i in range(len(fields)):
                for j in range(i + 1, len(fields)):
                    matrix = values[f"head.{part}.weight"][{"all": 0, "each": i, "interaction": pair}[kind]]
                    products.append((fields[i] @ matrix) * fields[j])
                    pair += 1
        deep = mlp(values, "head.network", np.concatenate(products), "relu")
        return first_order(schema, values, row) + float(deep[0])

    return logit


def naive_finalmlp(context, heads):
    def logit(schema, values, row):
        fields = fields_of(schema, values, row)
        names, outputs = [*schema.sparse, *schema.sequences, *schema.dense], []
        for stream, chosen in enumerate(context):
            looked = [fields[names.index(name)] for name in chosen] or [values[f"head.gates.{stream}.constant"][0]]
            gate = 2 * sigmoid(mlp(values, f"head.gates.{stream}.network", np.concatenate(looked), "relu"))
            outputs.append(relu(mlp(values, f"head.streams.{stream}", gate * fields.flatten(), "relu")))
        first, second = outputs
        parts = zip(np.split(first, heads), values["head.fusion.products"], np.split(second, heads))
        linear = values["head.fusion.first"] @ first + values["head.fusion.second"] @ second
        return float(values["head.fusion.bias"] + linear + sum(left @ matrix @ right for left, matrix, right in parts))

    return logit


def naive_masknet(serial):
    def logit(schema, values, row):
        fields = fields_of(schema, values, row)
        gains, biases = values["head.norm.gain"], values["head.norm.bias"]
        inputs = hidden = np.concatenate([normed(f) * gain + bias for f, gain, bias in zip(fields, gains, biases)])
        outputs, block = [], 0
        while (prefix := f"head.blocks.{block}") + ".squeeze.weight" in values:
            kind = "hidden" if serial and block else "embedded"
            inner = relu(values[f"{prefix}.squeeze.weight"] @ fields.flatten() + values[f"{prefix}.squeeze.bias"])
            mask = values[f"{prefix}.mask.{kind}.weight"] @ inner + values[f"{prefix}.mask.{kind}.bias"]
            made = normed(values[f"{prefix}.linear.{kind}.weight"] @ (mask * (hidden if serial else inputs)))
            hidden = relu(made * values[f"{prefix}.norm.weight"] + values[f"{prefix}.norm.bias"])
            outputs, block = [*outputs, hidden], block + 1
        return float(mlp(values, "head.output", hidden if serial else np.concatenate(outputs), "relu")[0])

    return logit


def naive_wukong(schema, values, row):
    vectors, layer = fields_of(schema, values, row), 0
    while (prefix := f"head.layers.{layer}") + ".projection" in values:
        own = {name.removeprefix(f"{prefix}."): value for name, value in values.items() if name.startswith(prefix)}
        products = normed((vectors @ vectors.T @ own["projection"]).flatten())
        products = products * own["gain"].flatten() + own["bias"].flatten()
        hidden = relu(own["first"].reshape(len(own["first"]), -1) @ products + own["first_bias"])
        made = mlp(values, f"{prefix}.rest", hidden, "relu").reshape(-1, vectors.shape[1])
        residual = own["residual"] @ vectors if "residual" in own else vectors
        summed = np.concatenate([made, own["linear"] @ vectors]) + residual
        vectors = np.stack([normed(vector) * own["norm.weight"] + own["norm.bias"] for vector in summed])
        layer += 1
    return float(mlp(values, "head.output", vectors.flatten(), "relu")[0])


CONTEXT = {"first_context": ["user.id", "age"], "second_context": ["item_id"]}
BARE = {"first_context": [], "second_context": ["item_id"]}
SMALL = {"first_units": [8, 4], "second_units": [6, 6], "gate_units": [5], "heads": 2}
BLOCKS = {"block_units": [6, 5], "hidden_units": [4], "reduction": 1.5}
LAYERS = {"layers": 2, "product_vectors": 3, "linear_vectors": 2, "rank": 4, "block_units": [8, 6], "hidden_units": [5]}
CASES = {
    "xdeepfm": (xdeepfm.Model, {"cross_units": [5, 4, 3], "hidden_units": [8]}, naive_xdeepfm),
    "autoint": (autoint.Model, {"attention_layers": 2, "heads": 3, "head_width": 4}, naive_autoint(3)),
    "autoint+": (autoint.Model, {"attention_layers": 1, "hidden_units": [8]}, naive_autoint(2)),
    **{
        f"fibinet {kind}": (fibinet.Model, {"bilinear": kind, "hidden_units": [8]}, naive_fibinet(kind))
        for kind in fibinet.BILINEAR
    },
    "finalmlp": (finalmlp.Model, {**SMALL, **BARE}, naive_finalmlp(list(BARE.values()), 2)),
    "masknet parallel": (masknet.Model, BLOCKS, naive_masknet(serial=False)),
    "masknet serial": (masknet.Model, {**BLOCKS, "structure": "serial"}, naive_masknet(serial=True)),
    "wukong": (wukong.Model, LAYERS, naive_wukong),
    "wukong as many": (wukong.Model, {**LAYERS, "product_vectors": 6, "linear_vectors": 3}, naive_wukong),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_paper(case):
    model_class, options, naive = CASES[case]
    for schema in (one_dim_schema(), without_numbers(one_dim_schema())):
        check_equals(naive, made(model_class, schema, **options), schema, random_rows(schema, 12))
    check_model(made(model_class, one_dim_schema(), **options), one_dim_schema())
    check_dense_start(model_class, one_dim_schema(), **options)


def test_the_gates_of_finalmlp_look_at_numbers_too():
    schema = one_dim_schema()
    model = made(finalmlp.Model, schema, **SMALL, **CONTEXT)
    check_equals(naive_finalmlp(list(CONTEXT.values()), 2), model, schema, random_rows(schema, 12))


@pytest.mark.parametrize(
    ("model_class", "options", "told"),
    [
        (xdeepfm.Model, {"cross_units": []}, r"model.cross_units is \[\]"),
        (xdeepfm.Model, {"cross_units": [2] * 17}, "model.cross_units has 17 layers: give at most 16"),
        (autoint.Model, {"heads": 0}, "model.heads is 0: it must be at least 1"),
        (fibinet.Model, {"bilinear": "eech"}, "model.bilinear: 'eech' is not known; did you mean 'each'"),
        (finalmlp.Model, {"first_units": [8, 5]}, "model.first_units ends with 5, which model.heads=2 does not divide"),
        (finalmlp.Model, {"first_units": [8]}, r"model.first_units is \[8\]: give two widths or more"),
        (finalmlp.Model, {"first_context": ["item"]}, "model.first_context: 'item' is not known"),
        (masknet.Model, {"structure": "seriel"}, "model.structure: 'seriel' is not known; did you mean 'serial'"),
        (masknet.Model, {"block_units": [2] * 17}, "model.block_units has 17 blocks"),
        (wukong.Model, {"rank": 0}, "model.rank is 0: it must be at least 1"),
    ],
)
def test_mistakes(model_class, options, told):
    with pytest.raises(ValueError, match=told):
        model_class(one_dim_schema(), **options, device=CPU)
