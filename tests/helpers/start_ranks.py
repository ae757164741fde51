"""`python -m tests.helpers.start_ranks [options] MODULE argument …`: starts ranks as `clicktrainer train` does."""

import argparse
import sys

from launch.ranks import Job, choose_num_ranks, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc-per-node", default="auto")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--grace", type=int, default=30)
    options, (module, *words) = parser.parse_known_args()
    num_ranks = choose_num_ranks(options.nproc_per_node, "cpu")
    sys.exit(run(Job(module, words, num_ranks, "cpu", options.max_restarts, options.grace)))
