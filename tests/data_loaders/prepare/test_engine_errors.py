"""What an engine says about an expression reaches nobody as it is."""

import re
from pathlib import Path

import ibis
import pytest

from data_loaders.prepare import engine_errors
from data_loaders.prepare.declaration import Step
from data_loaders.prepare.steps import apply_steps

LIBRARY = "Error:|Exception|SQLSTATE|Candidate|LINE 1|\\[[A-Z_.]+\\]|org\\.apache"
WRONG = {
    "CAST(name AS BIGINT)": "'x' is not .*TRY_CAST",
    "CAST(number * 100 AS TINYINT)": "does not fit into|beyond its type",
    "number + [1]": "the types do not fit together|cannot be computed",
}


@pytest.mark.parametrize("expression", WRONG)
def test_expressions_that_cannot_be_computed(expression, engine):
    table = engine.store(ibis.memtable({"name": ["1", "x"], "number": [1, 2], "__row": [0, 1], "__part": [0, 0]}), "t")
    step = Step("select", {"made": expression}, "examples.steps[0]")
    with pytest.raises(ValueError, match=WRONG[expression]) as caught:
        try:
            engine.store(apply_steps(engine, table, (step,), {}), "made")
        except Exception as error:
            raise engine.explain(error) or error from error
    assert not re.search(LIBRARY, str(caught.value)) and "\n" not in str(caught.value)


def test_what_is_not_known_is_kept_in_a_file(duckdb_engine):
    error = ValueError("something\nnobody has seen")
    assert engine_errors.explanation(error) is None
    path = duckdb_engine.store_error(error).removeprefix("the engine's own message is in ")
    assert Path(path).read_text() == "ValueError: something\nnobody has seen\n"
