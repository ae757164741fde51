"""A job, ready to train: the sharded model and what goes with it, put together from the configuration and a feed."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from data_loaders.schema import Layout
from data_loaders.state_files import write_json
from trainer.checkpoint.saving import Checkpoints
from trainer.config.job import TrainConfig
from trainer.monitoring.alerts import Alerts
from trainer.monitoring.metrics_logger import Reporter, print_plan
from trainer.monitoring.row_log import Ledger
from trainer.report.record import Record
from trainer.run import build, training_files
from trainer.run.data import Feed
from trainer.run.early_stopping import Judge
from trainer.run.evaluator import Evaluator
from trainer.run.resume import checkpoints_folder, resume
from trainer.run.training_state import TrainingState
from trainer.runtime import fault_injection, run_folder
from trainer.runtime.distributed import Ranks
from trainer.runtime.progress import Progress
from trainer.warm_start.start import warm_start


@dataclass(frozen=True)
class Job:
    """All that the loop needs."""

    config: TrainConfig
    layout: Layout
    folder: Path
    ranks: Ranks
    feed: Feed
    built: build.Built
    ledger: Ledger
    reporter: Reporter
    state: TrainingState
    checkpoints: Checkpoints
    evaluator: Evaluator
    judge: Judge
    record: Record

    @property
    def progress(self) -> Progress:
        return self.feed.progress

    def close(self) -> None:
        self.feed.batches.close()
        self.reporter.close()


def make_job(
    config: TrainConfig, tree: dict[str, Any], model: nn.Module, feed: Feed, folder: Path, ranks: Ranks
) -> Job:
    """Plans, shards and initialises the model, tells the plan, and makes what goes with it."""
    fault_injection.at("build")
    built = build.build(config, model, ranks, feed.loader.local_batch_size, feed.total_steps)
    if ranks.is_first:
        write_json(folder / run_folder.PLAN, built.plan_rows)
        print_plan(built.plan_rows)
    ledger = Ledger(folder / "ledger", feed.chosen.manifest, ranks.rank)
    alerts = make_alerts(config, model.layout, ranks)
    built.task.register_forward_pre_hook(alerts.look)
    every_steps = config.log_every_steps or max(1, min(50, feed.total_steps // 20))
    reporter = Reporter(folder, feed.loader, feed.total_steps, every_steps, ranks, alerts)
    judge = Judge(config.early_stopping, config.optim.plateau, built.optimizer)
    state = TrainingState(built.task, built.optimizer, reporter, built.plan_rows, judge)
    checkpoints = Checkpoints(
        checkpoints_folder(config, folder),
        config.checkpoint,
        state,
        feed.identity,
        ranks,
        texts={
            training_files.DATA: feed.chosen.dumps(),
            run_folder.CONFIG: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
        },
        before_commit=ledger.flush,
    )
    valid, epoch_steps = feed.held_out.get("valid"), feed.loader.steps_per_epoch
    evaluator = Evaluator(built.pipeline, valid, config.evaluation, epoch_steps, reporter, ranks)
    record = Record(folder, ranks)
    evaluator.keep = partial(record.scores, "valid")

    def on_result(progress: Progress, split: str, values: dict[str, Any]) -> bool:
        judge.consider(progress, split, values)  # first: a checkpoint of this step holds what it counts
        checkpoints.consider(progress, split, values)
        return judge.stopped is not None

    evaluator.on_result = on_result
    told = (ledger, reporter, state, checkpoints, evaluator, judge, record)
    return Job(config, model.layout, folder, ranks, feed, built, *told)


def make_alerts(config: TrainConfig, layout: Layout, ranks: Ranks) -> Alerts:
    """What learns nothing yet because its rate warms up is not warned of."""
    tables = (config.optim.tables, config.optim.wide, *config.optim.by_table.values())
    warmup = max(part.schedule.warmup_steps for part in (config.optim.dense, *tables))
    return Alerts(config.alerts, config.data.schema, layout, warmup, ranks.device, watched_metrics(config))


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
    config, feed, ranks = job.config, job.feed, job.ranks
    resume(feed.saved, job.checkpoints, job.ledger.folder, recording=config.debug.ledger, ranks=ranks)
    if feed.warm is not None:
        pieces, plan_rows = job.state.pieces, job.built.plan_rows
        begun = warm_start(config.warm_start, config, pieces, plan_rows, job.folder, ranks, feed.warm)
        job.built.optimizer.restore(0, begun.table_steps)
        if job.reporter.alerts is not None:
            job.reporter.alerts.compare_with(begun.numbers)
