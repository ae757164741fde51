"""``python -m trainer.report RUN_FOLDER [--output FILE]``: draws the report of a run, ended or not, from its files alone.
Exit code: 0, or 2 for a mistake."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.report.drawing import check_page, draw
from trainer.runtime.run_folder import REPORT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="Draws the report of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help=f"where to; {REPORT} in the run folder by default")
    options = parser.parse_intermixed_args(argv)
    output = options.output or options.run / REPORT
    try:
        if options.output:
            check_page("--output", output)
        draw(options.run, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
