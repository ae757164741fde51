"""A mistake of the user's is one on every rank, and so is what is none: the verdict travels with the error."""

import pickle

import pytest

from data_loaders.errors import UserError
from data_loaders.storage import StorageError
from tests.distributed.helper import run_distributed
from trainer.config import checks
from trainer.runtime import process
from trainer.runtime.distributed import from_first
from trainer.runtime.verdict import for_all_ranks, is_user_error


class NeedsTwo(ValueError):
    """Pickled, it cannot be made again."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def caught(action):
    with pytest.raises(Exception) as found:
        action()
    return found.value


def ours():
    checks.positive(-1, "epochs")


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("action", "mistake", "retryable"),
    [
        (ours, True, False),
        (lambda: int("x"), False, True),  # Python's own
        (lambda: raise_(UserError("no such model")), True, False),
        (lambda: raise_(PermissionError(13, "Permission denied", "/x")), True, False),
        (lambda: raise_(StorageError("failed 5 times")), True, True),
        (lambda: raise_(NeedsTwo("a", "b")), False, True),
        (lambda: raise_(KeyError("a bug")), False, True),
    ],
)
def test_an_error_of_rank_0_is_judged_alike_everywhere(action, mistake, retryable):
    here = caught(action)
    assert is_user_error(here) == mistake
    sent = pickle.loads(pickle.dumps(for_all_ranks(here)))
    assert isinstance(sent, (ValueError, OSError)) == isinstance(here, (ValueError, OSError))
    for error in (here, caught(lambda: raise_(sent))):
        assert is_user_error(error) == mistake and process.is_retryable(error) == retryable
    assert str(here) in str(sent)


def judged(rank, world_size):
    """On each rank: what it raises, and what it makes of that."""
    found = []
    for action in (ours, lambda: int("x"), lambda: raise_(NeedsTwo("a", "b"))):
        try:
            from_first(action)
        except ValueError as error:
            found.append((is_user_error(error), process.is_retryable(error), "NeedsTwo" in str(error)))
    return found


def test_all_ranks_raise_it_with_one_verdict():
    first, second = run_distributed(judged, 2)
    assert first == second == [(True, False, False), (False, True, False), (False, True, True)]
