import re

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


# Whole programs, several processes, engines: by place, so that a new test is marked without a word of its own.
SLOW = re.compile(
    r"tests/(integration|bench|requirements|data_loaders/prepare|conf)/|_ranks\.py"
    r"|tests/launch/test_(?!sweep_(options|space))|test_(add_a_model|tutorial|site)\.py"
    r"|tests/trainer/(config/test_(compose|security)|plan/test_plan)\.py"
)
MARKED = {
    "slow": SLOW,
    "cluster": re.compile(r"tests/launch/test_cluster"),
    "browser": re.compile(r"test_report_browser\.py|serve/test_page\.py"),
    "spark": re.compile(r"\[(.*-)?spark(-.*)?\]|_spark"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        for name, place in MARKED.items():
            if place.search(item.nodeid):
                item.add_marker(name)
