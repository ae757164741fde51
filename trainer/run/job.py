"""A job, ready to train: the sharded model and what goes with it, put together from the configuration and the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from data_loaders.schema import Layout
from data_loaders.state_files import write_json
from trainer.checkpoint.saving import Checkpoints
from trainer.config.job import TrainConfig
from trainer.monitoring.alerts import Alerts
from trainer.monitoring.feature_coverage import FeatureCoverage
from trainer.monitoring.metrics_logger import MetricsLogger, print_plan
from trainer.monitoring.row_log import RowLog
from trainer.monitoring.stragglers import StragglerMeter
from trainer.monitoring.trackers import Trackers, make_trackers
from trainer.report.record import Record
from trainer.run import build, training_files
from trainer.run.data import RunData
from trainer.run.early_stopping import EarlyStopping
from trainer.run.evaluator import Evaluator
from trainer.run.resume import checkpoints_folder, resume
from trainer.run.table_files import fill_tables
from trainer.run.training_state import TrainingState
from trainer.runtime import fault_injection, run_folder
from trainer.runtime.distributed import Ranks
from trainer.runtime.progress import Progress
from trainer.runtime.watchdog import Watchdog
from trainer.warm_start.start import warm_start


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that the loop needs."""

    config: TrainConfig
    layout: Layout
    folder: Path
    ranks: Ranks
    data: RunData
    built: build.Built
    row_log: RowLog
    alerts: Alerts
    stragglers: StragglerMeter
    trackers: Trackers
    logger: MetricsLogger
    early_stopping: EarlyStopping
    state: TrainingState
    checkpoints: Checkpoints
    record: Record
    evaluator: Evaluator

    @property
    def progress(self) -> Progress:
        return self.data.progress

    def close(self) -> None:
        self.data.batches.close()
        self.logger.close()


def make_job(
    config: TrainConfig,
    tree: dict[str, Any],
    model: nn.Module,
    data: RunData,
    folder: Path,
    ranks: Ranks,
    watchdog: Watchdog,
) -> Job:
    """Plans, shards and initialises the model, prints the plan, and makes what goes with it."""
    fault_injection.at("build")
    built = build.build(config, model, ranks, data.loader.local_batch_size, data.total_steps)
    if ranks.is_first:
        rows = [table.summary() for table in built.tables]
        write_json(folder / run_folder.PLAN, rows)
        print_plan(rows)
    row_log = RowLog(folder / "ledger", data.files.manifest, ranks.rank)
    alerts = make_alerts(config, model.layout, ranks)
    stragglers = StragglerMeter(watchdog, data.loader, ranks)
    trackers = make_trackers(config.logging, folder, tree, data.progress.step, here=ranks.is_first)
    every_steps = config.log_every_steps or min(50, max(10, data.total_steps // 20))
    logger = MetricsLogger(folder, data.loader, data.total_steps, every_steps, ranks, alerts, stragglers, trackers)
    early_stopping = EarlyStopping(config.early_stopping, config.optim.plateau, built.optimizer)
    state = TrainingState(built, logger, early_stopping)
    record = Record(folder, ranks)
    return Job(
        config=config,
        layout=model.layout,
        folder=folder,
        ranks=ranks,
        data=data,
        built=built,
        row_log=row_log,
        alerts=alerts,
        stragglers=stragglers,
        trackers=trackers,
        logger=logger,
        early_stopping=early_stopping,
        state=state,
        checkpoints=make_checkpoints(config, tree, data, folder, ranks, state, row_log),
        record=record,
        evaluator=make_evaluator(config, data, built, logger, record, ranks, watchdog),
    )


def make_checkpoints(
    config: TrainConfig,
    tree: dict[str, Any],
    data: RunData,
    folder: Path,
    ranks: Ranks,
    state: TrainingState,
    row_log: RowLog,
) -> Checkpoints:
    texts = {
        training_files.DATA: data.files.dumps(),
        run_folder.CONFIG: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
    }
    return Checkpoints(
        checkpoints_folder(config, folder),
        config.checkpoint,
        state,
        data.identity,
        ranks,
        texts=texts,
        before_commit=row_log.flush,
        saved_step=data.saved.progress.step if data.saved is not None else None,
    )


def make_evaluator(
    config: TrainConfig,
    data: RunData,
    built: build.Built,
    logger: MetricsLogger,
    record: Record,
    ranks: Ranks,
    watchdog: Watchdog,
) -> Evaluator:
    return Evaluator(
        pipeline=built.pipeline,
        valid=data.held_out.get("valid"),
        options=config.evaluation,
        epoch_steps=data.loader.steps_per_epoch,
        logger=logger,
        record=record,
        ranks=ranks,
        alive=watchdog.alive,
    )


def make_alerts(config: TrainConfig, layout: Layout, ranks: Ranks) -> Alerts:
    """What learns nothing yet because its rate warms up is not warned of."""
    optim = config.optim
    schedules = [part.schedule for part in (optim.tables, optim.wide, *optim.by_table.values())]
    warmup = max(schedule.warmup_steps for schedule in (optim.dense.schedule, *schedules))
    schema = config.data.schema
    coverage = FeatureCoverage(schema, layout, ranks.device, enabled=config.alerts.enabled)
    return Alerts(config.alerts, schema, warmup, coverage, watched_metrics(config))


def watched_metrics(config: TrainConfig) -> dict[str, list[str]]:
    """Metrics of ``valid`` that something depends on, and the keys that say so."""
    early, plateau, best = config.early_stopping, config.optim.plateau, config.checkpoint.best
    watched = {
        "early_stopping": early.metric if early.patience is not None else None,
        "optim.plateau": plateau.metric if plateau.patience is not None else None,
        "checkpoint.restore_best" if config.checkpoint.restore_best else "checkpoint.best": best,
    }
    found: dict[str, list[str]] = {}
    for key, metric in watched.items():
        if metric is not None:
            found.setdefault(metric, []).append(key)
    return found


def begin(job: Job) -> None:
    """Goes on from the run's own checkpoint, or else from another run's model, where there is one."""
    config, data, ranks = job.config, job.data, job.ranks
    resume(data.saved, job.state, job.row_log.folder, recording=config.debug.ledger, ranks=ranks)
    if data.saved is None and data.warm is None:
        fill_tables(job.built, config.data, data.files.manifest, ranks, job.folder)
    if data.warm is not None:
        pieces, tables = job.state.pieces, job.built.tables
        begun = warm_start(config.warm_start, config, pieces, tables, job.folder, ranks, data.warm)
        job.built.optimizer.restore(0, begun.table_steps, clock_steps=begun.clock_steps)
        job.alerts.compare_with(begun.numbers)
