"""``python -m data_loaders.prepare recipe=criteo input=DIR output=DIR [key=value …]``"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_loaders import example_log
from data_loaders.errors import UserError
from data_loaders.prepare import compose
from data_loaders.prepare.engine import EngineError
from data_loaders.prepare.pipeline import Options, prepare, transform
from data_loaders.prepare.prepared import Prepared
from data_loaders.prepare.progress import Progress
from data_loaders.secrets import scrub

HELP = """\
recipe=NAME        a recipe of ours, or the path of a YAML file of your own
prepared=DIR       in its place: make rows to score, with the ids and statistics of this earlier output (no split, no label)
input=DIR          the folder that holds the raw files (or a URI)
output=DIR         the folder to make
engine=duckdb      or spark
memory_limit=4GB   of the whole process; what does not fit goes to disk
threads=N          default: all cores
extend=DIR         an earlier output: its ids and statistics stay, new values are appended
example=DIR        in place of all others: write an example log there, four days of a hotel search (docs/tutorial.md)
evict=N            with extend: values that N days in a row have not had lose their ids, and the others move together
overwrite=true     replace an output that exists
engine_options.K=V a setting of the engine's own (spark: engine_options.spark.executor.memory=8g)
KEY.PATH=VALUE     anything in the recipe: split.hash.valid=0.1 schema.embedding_dim=32 …"""
_FOLDERS = ("prepared", "example", "input", "output", "extend")
_OWN = ("recipe", *_FOLDERS, "engine", "memory_limit", "threads", "evict", "overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data_loaders.prepare",
        description="Raw logs to training-ready Parquet, out of core.",
        epilog=f"{HELP}\n\nrecipes: {', '.join(compose.names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    parser.add_argument("--print-config", action="store_true", help="print the complete declaration and stop")
    options = parser.parse_intermixed_args(argv)
    try:
        run(options.arguments, options.print_config)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(_storage(error), 1)
    except EngineError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes from what is already stored", 130)
    return 0


def run(arguments: Sequence[str], print_config: bool = False) -> None:
    own, overrides = _parse(arguments)
    if own.get("example"):
        return _write_example(Path(own["example"]))
    if own.get("prepared"):
        return _score(own, overrides)
    if "recipe" not in own:
        raise UserError(f"recipe= is missing: one of {', '.join(compose.names())}, or the path of a YAML file")
    declaration = compose.load(own["recipe"], overrides)
    if print_config:
        print(yaml.safe_dump(compose.record(declaration), sort_keys=False, width=120), end="")
        return
    options = _options(own)
    progress = Progress()
    report = prepare(declaration, options, progress)
    rows = ", ".join(f"{name} {count:,}" for name, count in report["rows"].items())
    print(f"{options.output}: {rows} rows. Train on it: --config-dir {options.output} data={declaration.name}")


def _write_example(folder: Path) -> None:
    days = example_log.write(folder)
    print(f"{folder}: the events of a hotel search, {len(days)} days. What to do with them: docs/tutorial.md")


def _score(own: dict[str, Any], overrides: Sequence[str]) -> None:
    if overrides or own.get("recipe") or own.get("extend"):
        raise UserError("prepared= takes the declaration of that output: leave out recipe=, extend= and changes to it")
    options = _options(own)
    rows = transform(Prepared.open(own["prepared"]), options, Progress())
    print(
        f"{options.output}: {rows:,} rows to score. Score them: trainer.predict RUN --input {options.output} --output …"
    )


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


def _fail(error: object, code: int) -> int:
    print(f"error: {scrub(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
