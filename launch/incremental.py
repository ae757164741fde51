"""Day after day: `clicktrainer incremental output=DIR data.days=… [recipe=NAME] [evict=N] [options] key=value …`.

Each day is warm-started from the model of the day before: its rows are scored before they are trained (progressive validation),
then trained. One run folder a day, ``output/runs/<day>``; with ``recipe=`` the days are raw logs, which are
prepared first, each extending the vocabularies of the day before (``output/data/<day>``). A table by day ends it, also in
``output/report.json``.

The same command again skips finished days and resumes; with more days it trains those, too.
"""

import glob
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from data_loaders.errors import UserError
from data_loaders.messages import fail, note
from data_loaders.secrets import redact_override
from data_loaders.state_files import read_json, write_json
from launch import messages
from launch.children import Children
from launch.folder import check_settings, locked
from launch.rank import command as rank_command
from trainer.config import arguments
from trainer.config.arguments import quoted
from trainer.report.run_record import RunRecord

OWN = ("output", "data.days", "recipe", "evict")
# A recipe's own split is for a single data set; here each day is trained whole, and scored before.
NO_SPLIT = tuple(f"split.{rule}=null" for rule in ("time", "hash", "last", "column"))


@dataclass(frozen=True)
class Day:
    """``path``: a file or folder, as ``data.train`` (relative to ``data.root``) or ``input=`` takes it."""

    name: str
    path: str


@dataclass
class Plan:
    """What the command line says. ``ranks``: options of how a day's ranks are started, ``overrides``: the
    trainer's, ``prepare``: those of ``clicktrainer prepare``."""

    output: Path
    days: list[Day]
    recipe: str | None
    evict: str | None
    ranks: list[str]
    overrides: list[str] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the command is given again."""
        asked = {"overrides": self.overrides, "prepare": self.prepare}
        plain = {key: [redact_override(text) for text in texts] for key, texts in asked.items()}
        return {"recipe": self.recipe, "evict": self.evict, **plain}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        plan = parse(sys.argv[1:] if argv is None else argv)
        with locked(plan.output, "output"):
            check_settings(plan.output, "output", plan.settings)
            return run(plan)
    except ValueError as error:
        return fail(error)
    except KeyboardInterrupt:
        note("interrupted; the same command resumes")
        return 130


def parse(argv: Sequence[str]) -> Plan:
    """Raises ``UserError`` for what is missing, and for days that are not there."""
    options = arguments.incremental().parse_intermixed_args(list(argv))
    rest = options.overrides
    own = {key: value for key, equals, value in (argument.partition("=") for argument in rest) if equals and key in OWN}
    for key in ("output", "data.days"):
        if not own.get(key):
            raise UserError(f"{key}= is missing: {'the folder to make' if key == 'output' else 'which days to train'}")
    if own.get("evict") and not own.get("recipe"):
        raise UserError("evict= needs recipe=: ids are taken from vocabularies that are prepared day by day")
    others = [argument for argument in rest if argument.partition("=")[0] not in OWN]
    prepare = [argument.removeprefix("prepare.") for argument in others if argument.startswith("prepare.")]
    overrides = [argument for argument in others if not argument.startswith("prepare.")]
    root = next((value for key, _, value in map(_halves, reversed(overrides)) if key == "data.root"), ".")
    days = find_days(own["data.days"], root)
    plan = (Path(own["output"]).absolute(), days, own.get("recipe"), own.get("evict"))
    return Plan(*plan, arguments.rank_words(options), arguments.job_words(options, overrides), prepare)


def find_days(text: str, root: str) -> list[Day]:
    """In the order given (a list), or of names (a glob). Raises ``UserError`` for none, and for two of one name."""
    if text.startswith("["):
        paths = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    else:
        paths = sorted(glob.glob(text, root_dir=root))
    days = [Day(Path(path).name.partition(".")[0], path) for path in paths]
    if not days:
        raise UserError(f"data.days={text} names nothing under {root}: give a glob, such as 'day-*', or a list, [a,b]")
    names = [day.name for day in days]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"data.days: two days are called {repeated[0]}: a day is known by its file's or folder's name")
    return days


def run(plan: Plan) -> int:
    """Returns the exit code of the first step that fails, which the same command tries again."""
    rows: list[dict[str, Any]] = []
    previous: Day | None = None
    for day in plan.days:
        if not finished(plan, day):
            code = train_day(plan, day, previous)
            if code or not finished(plan, day):  # a run that was asked to stop ends well, but is not at its end
                note(f"day {day.name} has not finished: the same command resumes it")
                return code or 1
        rows.append(facts_of(plan, day))
        write_json(plan.output / "report.json", rows)
        previous = day
    print_report(rows)
    return 0


def finished(plan: Plan, day: Day) -> bool:
    return RunRecord(run_folder(plan, day)).status.get("state") == "finished"


def train_day(plan: Plan, day: Day, previous: Day | None) -> int:
    """Prepares (raw days), then scores, then trains. What was begun is resumed."""
    started = time.monotonic()
    words = [*plan.overrides, f"run.dir={quoted(run_folder(plan, day))}"]
    if plan.recipe:
        code = prepare_day(plan, day, previous)
        if code:
            return code
        folder = data_folder(plan, day)
        name = next(folder.glob("data/*.yaml")).stem
        words = ["--config-dir", str(folder), f"data={name}", *_without_root(words)]
    else:
        words.append(f"data.train=[{quoted(day.path)}]")
    words += ["data.valid=[]", "data.test=[]", "evaluation.before_training=true"]
    if previous is not None:
        before = quoted(run_folder(plan, previous))
        words.append(f"warm_start.path={before}")
        if not plan.recipe:  # prepared days have roots of their own, in which names of files repeat
            words.append(f"data.new_since={before}")
    note(f"day {day.name}: training")
    code = _call(["launch.run", *plan.ranks, *words])
    if not code:
        path = run_folder(plan, day) / "day.json"
        write_json(path, {"day": day.name, "seconds": round(time.monotonic() - started, 2)})
    return code


def prepare_day(plan: Plan, day: Day, previous: Day | None) -> int:
    """Makes ``output/data/<day>`` unless it is there, whole."""
    folder = data_folder(plan, day)
    if (folder / "report.json").exists():
        return 0
    note(f"day {day.name}: preparing")
    words = [f"recipe={plan.recipe}", f"input={_input(plan, day)}", f"output={folder}", *NO_SPLIT, *plan.prepare]
    if previous is not None:
        words.append(f"extend={data_folder(plan, previous)}")
        if plan.evict:
            words.append(f"evict={plan.evict}")
    return _call(["data_loaders.prepare", *words])


def facts_of(plan: Plan, day: Day) -> dict[str, Any]:
    """A day's row of the report."""
    folder = run_folder(plan, day)
    metrics = RunRecord(folder).final
    before, train = _map(metrics, "before"), _map(metrics, "train")
    timing: dict[str, Any] = read_json(folder / "day.json", {})
    row = {
        "day": day.name,
        "rows": before.get("rows"),
        **{f"before_{name}": before.get(name) for name in ("auc", "logloss", "ne", "calibration")},
        "trained_rows": train.get("rows_trained"),
        "seconds": timing.get("seconds"),
    }
    if plan.recipe:
        reports = _map(read_json(data_folder(plan, day) / "report.json", {}), "vocabularies").values()
        row["ids"] = {key: sum(r.get(key, 0) for r in reports) for key in ("values", "added", "aged", "evicted")}
    return row


def _map(facts: dict[str, Any], key: str) -> dict[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, dict) else {}


def print_report(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Day by day: each day's rows scored by the model of the days before", title_justify="left")
    names = ("day", "rows", "AUC before", "log loss before", "NE", "calibration", "seconds")
    for name in names:
        table.add_column(name, justify="left" if name == "day" else "right")
    has_ids = any("ids" in row for row in rows)
    if has_ids:
        table.add_column("ids added", justify="right")
        table.add_column("evicted", justify="right")
    for row in rows:
        numbers = [row["before_auc"], row["before_logloss"], row["before_ne"], row["before_calibration"]]
        rows_scored = "–" if row["rows"] is None else f"{row['rows']:,}"
        cells = [row["day"], rows_scored, *("–" if n is None else f"{n:.4f}" for n in numbers)]
        cells.append("–" if row["seconds"] is None else f"{row['seconds']:.0f}")
        if has_ids:
            cells += [f"{row['ids'][key]:,}" for key in ("added", "evicted")]
        table.add_row(*cells)
    messages.show(table)


def run_folder(plan: Plan, day: Day) -> Path:
    return plan.output / "runs" / day.name


def data_folder(plan: Plan, day: Day) -> Path:
    return plan.output / "data" / day.name


def _input(plan: Plan, day: Day) -> str:
    root = next((value for key, _, value in map(_halves, reversed(plan.overrides)) if key == "data.root"), ".")
    return os.path.join(root, day.path)


def _without_root(words: Sequence[str]) -> list[str]:
    """Prepared days lie where they were written, not where the raw logs are."""
    return [word for word in words if not word.startswith("data.root=")]


def _call(command: Sequence[str]) -> int:
    with Children() as children:
        return children.call(rank_command(command[0], command[1:]))


def _halves(argument: str) -> tuple[str, str, str]:
    return argument.partition("=")


if __name__ == "__main__":
    sys.exit(main())
