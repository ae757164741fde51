"""`clicktrainer train`: composes and checks the configuration in this process, once, then starts the ranks."""

import argparse
from collections.abc import Sequence

from data_loaders.errors import UserError
from data_loaders.messages import fail
from launch import messages, ranks
from launch.ranks import Job, choose_num_ranks
from launch.sweep import command as sweep
from trainer.config import arguments
from trainer.config.compose import compose


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments.train().parse_intermixed_args(argv)
    try:
        check(options)
        if options.multirun:
            return sweep.start(options)
        words = arguments.job_words(options, options.overrides)
        composed = compose(words)
        if options.print_config:
            return messages.result(composed.text.rstrip())
        config = composed.config
        config.check_addresses()
        num_ranks = choose_num_ranks(options.nproc_per_node, config.device)
        config.check_world_size(num_ranks)
    except ValueError as error:
        return fail(error)
    limits = options.max_restarts, options.grace
    return ranks.run(Job("trainer.train", words, num_ranks, config.device, *limits, config.run))


def check(options: argparse.Namespace) -> None:
    """Raises ``UserError``."""
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}: give a number from 0")
    if options.grace < 0:
        raise UserError(f"--grace is {options.grace}: give a number of seconds from 0")
