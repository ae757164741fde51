"""`clicktrainer evaluate` and `clicktrainer predict` with `--nproc-per-node`: on several ranks."""

from collections.abc import Sequence

from data_loaders.messages import fail
from launch import ranks
from trainer.config import arguments


def evaluate(argv: Sequence[str]) -> int:
    return _run("trainer.evaluate", argv)


def predict(argv: Sequence[str]) -> int:
    return _run("trainer.predict", argv)


def _run(module: str, argv: Sequence[str]) -> int:
    options, words = arguments.count().parse_known_args(argv)
    named = [word.removeprefix("device=") for word in words if word.startswith("device=")]
    device = named[-1] if named else "auto"
    try:
        num_ranks = ranks.choose_num_ranks(options.nproc_per_node, device)
    except ValueError as error:
        return fail(error)
    return ranks.run(ranks.Job(module, words, num_ranks, device))
