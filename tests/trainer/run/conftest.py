import pytest

from tests.helpers.training_files import write


@pytest.fixture
def log(tmp_path):
    """Two files, in an order of their own."""
    root = tmp_path / "log"
    write(root, "b.parquet", 0)
    write(root, "a.parquet", 10)
    return root
