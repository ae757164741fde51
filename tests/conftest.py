import pytest

from tests import tiny


@pytest.fixture(scope="session")
def click_log(tmp_path_factory):
    """The folder of a small click log with every kind of feature."""
    return tiny.write_log(tmp_path_factory.mktemp("log"))
