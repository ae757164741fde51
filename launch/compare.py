"""`python -m launch.compare …` is `clicktrainer compare …`."""

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
