"""``python -m trainer.kernels``: compiles the kernels for this CPU and prints where the library lies."""

import sys

from data_loaders.messages import fail
from trainer.kernels import build


def main() -> int:
    try:
        print(build.ensure())
    except build.BuildError as error:
        return fail(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
