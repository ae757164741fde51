"""Every configuration of ours on the migration page composes; a ``yaml`` block of ours begins with ``# mine/…``, its path."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from data_loaders.prepare import compose as recipes
from trainer.config.compose import compose

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
FILES = dict(re.findall(r"```yaml\n# mine/(\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
EXPERIMENTS = sorted(Path(path).stem for path in FILES if path.startswith("experiment/"))
ROWS = 1000  # of tables whose rows a recipe counts


@pytest.fixture
def mine(tmp_path):
    """The page's files in a folder, with the data set that the recipe would make."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    recipe = yaml.safe_load(FILES["recipe/taobao_x.yaml"])
    (tmp_path / "data" / "taobao_x.yaml").write_text(yaml.safe_dump(as_prepared(recipe)))
    return tmp_path


def as_prepared(recipe):
    schema = recipe["schema"]
    for table in schema["tables"].values():
        table["num_embeddings"] = ROWS if table.pop("vocabulary", None) is not None else table["num_embeddings"]
    for feature in schema["features"].values():
        feature.pop("make", None), feature.pop("counted", None)
    return {"name": recipe["name"], "root": ".", "train": ["train"], "valid": ["valid"], "schema": schema}


def test_the_page_has_a_recipe_four_experiments_and_two_commands():
    assert len(EXPERIMENTS) == 4 and len(COMMANDS) == 2
    assert sum(path.startswith(("data/", "recipe/")) for path in FILES) == 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_composes(name, mine):
    config = compose(["--config-dir", str(mine), f"experiment={name}"]).config
    assert config.model["name"] == "din" and config.data.schema.histories


def test_the_recipe_is_a_valid_declaration(mine):
    declaration = recipes.load(str(mine / "recipe" / "taobao_x.yaml"))
    assert declaration.schema.tables["item"].vocabulary.min_count == 10


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_composes(command):
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["clicktrainer", "train"]
    assert compose(words[2:]).config.steps


def test_what_is_said_of_weight_decay_and_initial_values_holds(mine):
    films = compose(["--config-dir", str(mine), "experiment=din_films"]).config
    assert films.optim.tables.weight_decay == pytest.approx(2 * 1e-6 / films.batch_size, rel=0.01)
    taobao = compose(["--config-dir", str(mine), "experiment=din_taobao"]).config
    assert taobao.data.schema.tables["adgroup"].init_std * 3**0.5 == pytest.approx(0.01, rel=1e-4)
    published = compose(["--config-dir", str(mine), "experiment=din_taobao_x_as_published"]).config
    assert published.optim.tables.weight_decay_rows == "all" and published.model["attention_units"] == [512, 256]
