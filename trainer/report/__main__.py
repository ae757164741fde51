"""``clicktrainer report RUN [--output FILE]``: draws the report of a run, ended or not, from its files alone.
Exit code: 0, or 2 for a mistake."""

import sys
from collections.abc import Sequence

from data_loaders.messages import fail
from trainer.config import arguments
from trainer.report.drawing import check_page, draw
from trainer.runtime.run_folder import REPORT


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments.report().parse_intermixed_args(argv)
    output = options.output or options.run / REPORT
    try:
        if options.output:
            check_page("--output", output)
        draw(options.run, output)
    except (ValueError, OSError) as error:
        return fail(error)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
