"""From ``warm_start.path`` to a model initialized from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders import configuration, safe_yaml, secrets
from data_loaders.errors import UserError
from data_loaders.state_files import write_json
from trainer.checkpoint import FACTS, AnyPath, Reader, committed, of_run, parse, place_of, read_json, read_text
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.verification import verify_together
from trainer.config.job import TrainConfig
from trainer.config.warm_start import WarmStartConfig
from trainer.models import load_model_class
from trainer.runtime.checked_json import Optional, Whole, check_form, get_form
from trainer.runtime.distributed import Ranks, from_first
from trainer.sharding.table_plan import TablePlan
from trainer.warm_start.plan import make_plan
from trainer.warm_start.report import make_console, make_report
from trainer.warm_start.sides import new_side, old_side
from trainer.warm_start.vocabularies import Vocabularies

REPORT = "warm_start.json"
OLD_FACTS = {"identity": dict, "optimizer_steps": Whole()}
NUMBERS = {"alerts": {"numbers": dict}}  # in its metrics; earlier versions have none
CONFIG = "config.yaml"  # among the texts of a checkpoint


@dataclass(frozen=True)
class Begun:
    """``table_steps``: the steps that the tables' optimizers have made already (Adam's bias correction counts them); 0
    where none of their state is kept. ``clock_steps``: those of the row clock, which counts on in any case. ``numbers``: how
    large the old run's dense features were (``trainer.monitoring.alerts``)."""

    report: dict[str, Any]
    table_steps: int
    clock_steps: int
    numbers: dict[str, Any]


def warm_start(
    rules: WarmStartConfig,
    config: TrainConfig,
    pieces: Sequence[Piece],
    tables: Iterable[TablePlan],
    folder: Path,
    ranks: Ranks,
    path: AnyPath,
) -> Begun:
    """Reports what comes from the old run and, unless this is a dry run, writes it into ``pieces`` (of an initialised model
    and its optimizers) and the report into ``folder``. ``path`` is the old run's checkpoint (``whole_checkpoint``). All
    ranks call it together.

    Raises ``UserError`` on every rank where a difference is explained by no rule, before anything is written.
    """
    facts, reader = read_json(path, FACTS, OLD_FACTS), Reader(path)
    name = config.model["name"]
    model_class = load_model_class(name)
    old = old_side(reader, facts, name, model_class)
    new = new_side(pieces, config.data.schema, {table.name: table.optimizer.name for table in tables}, model_class)
    plan = make_plan(rules, old, new, vocabularies_of(rules, path, config.data.prepared))
    table_steps = facts.get("table_steps", 0)
    check_form(table_steps, Whole(-(1 << 53)), f"checkpoint {path}: {FACTS}: table_steps")
    steps = facts["optimizer_steps"] + table_steps
    earlier = facts.get("clock_steps", table_steps)
    check_form(earlier, Whole(), f"checkpoint {path}: {FACTS}: clock_steps")
    clock_steps = facts["optimizer_steps"] + earlier
    report = make_report(plan, secrets.as_asked(str(path)), steps)
    if ranks.is_first:
        report.print(make_console(stderr=not rules.dry_run))  # of a dry run it is the result
    if not rules.dry_run:
        plan.apply(pieces, reader, config.optim.wide)
        if ranks.is_first:
            write_json(folder / REPORT, report.to_dict())
    metrics = get_form(facts, "metrics", NUMBERS)
    numbers = metrics["alerts"]["numbers"] if metrics else {}
    return Begun(report.to_dict(), steps if plan.keeps_table_state else 0, clock_steps, numbers)


def whole_checkpoint(path: str, ranks: Ranks, alive: Callable[[], None] = lambda: None) -> AnyPath:
    """The checkpoint at ``path``, or the newest of the run that ``path`` is the folder of, its bytes hashed by all ranks
    together. Raises ``UserError`` on all of them where there is none or it is damaged. ``alive`` is called now and then."""
    found = from_first(lambda: source_checkpoint(path))
    problem = verify_together(found, ranks, alive)
    if problem:
        raise UserError(f"warm_start.path={found}: {problem}; name another checkpoint")
    return found


def source_checkpoint(path: str) -> AnyPath:
    """As ``whole_checkpoint``, not yet read."""
    found = parse(path)
    if not place_of(found).is_checkpoint(found):
        saved = committed(of_run(found))
        if not saved:
            raise UserError(
                f"warm_start.path={path} is neither a checkpoint nor the folder of a run that has saved one: correct the path"
            )
        found = saved[0]
    return found


def vocabularies_of(rules: WarmStartConfig, path: AnyPath, prepared: str | None) -> Vocabularies:
    """``prepared`` is the new run's folder; the old run's is named by ``warm_start.prepared`` or the checkpoint's own
    configuration. Raises ``UserError`` for a folder that is not there."""
    old = rules.prepared
    if old is None:
        where = f"{path}: {CONFIG}"
        old = configuration.value_at(safe_yaml.parse(read_text(path, CONFIG), where), "data.prepared", where)
        check_form(old, Optional(str), f"{where}: data.prepared")
    folders = {"warm_start.prepared": old, "data.prepared": prepared}
    for key, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{key}={folder} (the vocabularies of a run) is no folder: correct it")
    before, now = (None if folder is None else Path(folder) for folder in folders.values())
    return Vocabularies(before, now)
