import pytest

from data_loaders import secrets
from tests.helpers import tiny


@pytest.fixture(scope="session")
def click_log(tmp_path_factory):
    """The folder of a small click log with every kind of feature."""
    return tiny.write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(autouse=True)
def environment_of_nobody(monkeypatch):
    """What one test's environment provided, another's messages do not hide."""
    monkeypatch.setattr(secrets, "_provided", {})
