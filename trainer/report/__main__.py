"""``python -m trainer.report RUN_FOLDER [--output FILE]``: draws the report of a run, ended or still going on, from its
files alone. Exit code: 0, or 2 for a mistake."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_loaders.output_files import check_output, head_of
from trainer.report.drawing import GENERATOR, NAME, draw


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="Draws the report of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help=f"where to; {NAME} in the run folder by default")
    options = parser.parse_intermixed_args(argv)
    output = options.output or options.run / NAME
    try:
        if options.output:
            check_output("--output", output, [".html"], lambda path: GENERATOR in head_of(path))
        draw(options.run, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
