"""Which features go wide is a matter of configuration: overrides and experiment files, over any data set's schema."""

import pytest

from tests.helpers import tiny
from trainer.config.compose import compose
from trainer.models.construct import build_model
from trainer.modules.embeddings import wide_table

USUAL = {"user_id", "item_id", "category_id", "hour", "tags", "hour_x_category"}
OVERRIDES = (
    "data.schema.features.item_id.wide=false",
    "data.schema.features.clicked_items.wide=true",
    "+data.schema.crosses={user_x_hour: {columns: [user_id, hour], num_buckets: 500}}",
    "~data.schema.crosses.hour_x_category",
)
CHANGED = USUAL - {"item_id", "hour_x_category"} | {"clicked_items", "user_x_hour"}
EXPERIMENT = """# @package _global_
data:
  schema:
    features: {item_id: {wide: false}, clicked_items: {wide: true}}
    crosses: {user_x_hour: {columns: [user_id, hour], num_buckets: 500}}
"""


def wide_features(config):
    model = build_model(config.model, config.data.schema, seed=1)
    tables = set(model.embedding_bags.embedding_bags)
    found = {key for key in (*config.data.schema.features, *config.data.schema.crosses) if wide_table(key) in tables}
    assert len(found) == sum(table.startswith("wide_") for table in tables)
    return found


@pytest.mark.parametrize("model", ["wide_deep", "lr"])
def test_overrides_choose_the_features_and_crosses_of_the_linear_part(model, tmp_path):
    assert wide_features(tiny.job(tmp_path, f"model={model}").config) == USUAL
    assert wide_features(tiny.job(tmp_path, f"model={model}", *OVERRIDES).config) == CHANGED


def test_an_experiment_file_chooses_them(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.yaml").write_text((tiny.CONF / "data" / "tiny.yaml").read_text())
    (tmp_path / "experiment" / "other.yaml").write_text(EXPERIMENT)
    arguments = [
        "--config-dir",
        str(tmp_path),
        "data=tiny",
        "data.root=x",
        "batch_size=240",
        "model=lr",
        "experiment=other",
    ]
    assert wide_features(compose(arguments).config) == CHANGED | {"hour_x_category"}


def test_every_other_model_keeps_its_features_whatever_goes_wide(tmp_path):
    for model in ("deepfm", "dcn"):
        plain, changed = (tiny.job(tmp_path, f"model={model}", *more).config for more in ((), OVERRIDES[:1]))
        layouts = [build_model(config.model, config.data.schema, seed=1).layout for config in (plain, changed)]
        assert layouts[0] == layouts[1]
