"""``clicktrainer prepare recipe=criteo input=DIR output=DIR [key=value …]``"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_loaders import example_log
from data_loaders.errors import UserError
from data_loaders.messages import fail, program
from data_loaders.prepare import arguments, compose
from data_loaders.prepare.engine import EngineError
from data_loaders.prepare.pipeline import Options, prepare, transform
from data_loaders.prepare.prepared import Prepared
from data_loaders.prepare.progress import Progress

_FOLDERS = ("prepared", "example", "input", "output", "extend")
_OWN = ("recipe", *_FOLDERS, "engine", "memory_limit", "threads", "evict", "overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments.prepare().parse_intermixed_args(argv)
    try:
        run(options.overrides, options.print_config)
    except ValueError as error:
        return fail(error)
    except OSError as error:
        return fail(_storage(error), 1)
    except EngineError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; the same command resumes from what is already stored", 130)
    return 0


def run(given: Sequence[str], print_config: bool = False) -> None:
    own, overrides = _parse(given)
    if own.get("example"):
        return _write_example(Path(own["example"]))
    if own.get("prepared"):
        return _score(own, overrides)
    if "recipe" not in own:
        raise UserError(f"recipe= is missing: one of {', '.join(arguments.names())}, or the path of a YAML file")
    declaration = compose.load(own["recipe"], overrides)
    if print_config:
        print(yaml.safe_dump(compose.record(declaration), sort_keys=False, width=120), end="")
        return
    options = _options(own)
    progress = Progress()
    report = prepare(declaration, options, progress)
    rows = ", ".join(f"{name} {count:,}" for name, count in report["rows"].items())
    print(
        f"{options.output}: {rows} rows. Train on it: {program()} train --config-dir {options.output} data={declaration.name}"
    )


def _write_example(folder: Path) -> None:
    days = example_log.write(folder)
    print(f"{folder}: the events of a hotel search, {len(days)} days. What to do with them: docs/tutorial.md")


def _score(own: dict[str, Any], overrides: Sequence[str]) -> None:
    if overrides or own.get("recipe") or own.get("extend"):
        raise UserError("prepared= takes the declaration of that output: leave out recipe=, extend= and changes to it")
    options = _options(own)
    rows = transform(Prepared.open(own["prepared"]), options, Progress())
    print(f"{options.output}: {rows:,} rows to score: {program()} predict RUN --input {options.output} --output FILE")


def _parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    own: dict[str, Any] = {"engine_options": {}}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not an override: write key=value")
        if key in _OWN:
            own[key] = value
        elif key.startswith("engine_options."):
            own["engine_options"][key.removeprefix("engine_options.")] = value
        else:
            overrides.append(argument)
    return own, overrides


def _options(own: dict[str, Any]) -> Options:
    for key in ("input", "output"):
        if not own.get(key):
            raise UserError(
                f"{key}= is missing: {'the folder of the raw files' if key == 'input' else 'the folder to make'}"
            )
    threads = own.get(
        "threads", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    if not threads.isdigit() or int(threads) < 1:
        raise UserError(f"threads={threads}: a whole number of at least 1")
    evict = own.get("evict")
    if evict is not None and (not evict.isdigit() or int(evict) < 1 or not own.get("extend")):
        raise UserError(f"evict={evict}: a whole number of days of at least 1, together with extend=DIR")
    overwrite = str(own.get("overwrite", "false")).lower()
    if overwrite not in ("true", "false"):
        raise UserError(f"overwrite={overwrite}: true or false")
    return Options(
        input=own["input"],
        output=Path(own["output"]),
        engine=own.get("engine", "duckdb"),
        memory_limit=own.get("memory_limit", "4GB"),
        threads=int(threads),
        extend=Path(own["extend"]) if own.get("extend") else None,
        evict=int(evict) if evict is not None else None,
        overwrite=overwrite == "true",
        engine_options=own["engine_options"],
    )


def _storage(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({error}): free space and run the same command again; it resumes, and nothing was lost"
        )
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
