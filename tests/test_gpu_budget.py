"""What tests/gpu says of this program is true of it: the functions that it names are there, and every model has a budget."""

import ast
import json
import pkgutil
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "tests" / "gpu"


def entries(name):
    lines = (line.partition("#")[0].strip() for line in (FOLDER / name).read_text().splitlines())
    return [line for line in lines if line]


def test_the_places_where_a_step_may_wait_are_there():
    for entry in entries("allowed_syncs.txt"):
        file, _, function = entry.partition(":")
        tree = ast.parse((REPOSITORY / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, entry


def test_the_parts_of_a_step_that_are_timed_are_there():
    for entry in entries("host_parts.txt"):
        assert callable(pkgutil.resolve_name(entry.split()[0])), entry


def test_every_model_and_case_has_a_budget():
    budget = json.loads((FOLDER / "launch_budget.json").read_text())
    models = {path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml")}
    cases = yaml.safe_load((FOLDER / "cases.yaml").read_text())["cases"]
    assert models | set(cases) <= set(budget)
    assert all(type(most) is int and most > 0 for most in budget.values())
