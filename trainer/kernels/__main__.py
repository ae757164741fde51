"""``python -m trainer.kernels``: compiles the kernels for this CPU and prints where the library lies."""

import sys

from trainer.kernels import build


def main() -> int:
    try:
        print(build.ensure())
    except build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
