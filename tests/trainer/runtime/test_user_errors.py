"""All ranks end alike: a person's mistake in one line, and what another start may mend with an exit code that says so."""

import contextlib
import io
import os
from unittest import mock

from data_loaders.errors import UserError
from data_loaders.storage import StorageError
from tests.helpers.ranks import run_distributed
from trainer.runtime import process
from trainer.runtime.distributed import from_first

SAID = {
    "a mistake": UserError("epochs is -1: give a number from 1"),
    "a library's": ValueError("invalid literal"),
    "storage": StorageError("failed 5 times"),
    "no permission": PermissionError(13, "Permission denied", "/x"),
}
ENDS = {"a mistake": (2, False), "a library's": (1, True), "unpicklable": (1, True)}
ENDS |= {"storage": (1, False), "no permission": (2, False)}


class Unpicklable(ValueError):
    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def raise_(error):
    raise error


def end_of(error):
    """The exit code of a rank where rank 0 meets ``error``, and what it prints."""
    printed = io.StringIO()
    leave = mock.patch("os._exit", side_effect=lambda code: raise_(SystemExit(code)))
    with leave, mock.patch.object(process, "PATIENCE_SECONDS", 0), contextlib.redirect_stderr(printed):
        try:
            process.guarded(lambda: from_first(lambda: raise_(error)))
        except SystemExit as left:
            return left.code, printed.getvalue()


def ends(rank, world_size):
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    return {name: end_of(error) for name, error in {**SAID, "unpicklable": Unpicklable("a", "b")}.items()}


def test_an_error_of_rank_0_ends_all_ranks_alike():
    both = run_distributed(ends, 2)
    for found in both:
        assert {name: (code, "Traceback" in text) for name, (code, text) in found.items()} == ENDS
        assert "Unpicklable" in found["unpicklable"][1] and "a: b" in found["unpicklable"][1]
    said = sorted(found["a mistake"][1] for found in both)
    assert said == ["", "error: epochs is -1: give a number from 1\n"]
