"""`python -m launch.cluster …` is `clicktrainer cluster …`."""

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["cluster", *sys.argv[1:]]))
