"""The page's blocks run as one notebook, in this process."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the package is not installed
    found = {}
    for block in BLOCKS:
        exec(
            block.replace("train_rows: 20000", "train_rows: 4000").replace("test_rows: 2000", "test_rows: 1000"), found
        )
    assert found["run"].metrics["test"]["auc"] > 0.5 and len(found["probabilities"]) == 1000
    assert found["vectors"].shape == (20_000, 16)
    # Training and prediction may compute in bf16 (precision=auto), serving in fp32.
    np.testing.assert_allclose(found["scores"], found["probabilities"][:5], rtol=2**-7)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
