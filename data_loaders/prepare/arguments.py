"""What `clicktrainer prepare` takes. Imports no engine, so that `--help` is answered at once."""

import importlib.resources
from argparse import ArgumentParser, RawDescriptionHelpFormatter

RECIPES = importlib.resources.files("conf") / "recipe"
HELP = """\
Raw logs to training-ready Parquet, out of core.

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
EXAMPLES = """\
examples:
  clicktrainer prepare recipe=criteo input=/downloads/criteo output=data/criteo memory_limit=8GB
  clicktrainer prepare recipe=shop.yaml input=/logs/day2 output=data/day2 extend=data/day1
  clicktrainer prepare recipe=criteo --print-config"""


def names() -> list[str]:
    """The recipes of ``conf/recipe``."""
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir())


def prepare() -> ArgumentParser:
    parser = ArgumentParser(
        prog="clicktrainer prepare",
        description=HELP,
        epilog=f"recipes: {', '.join(names())}\n\n{EXAMPLES}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--print-config", action="store_true", help="print the complete declaration and stop")
    return parser
