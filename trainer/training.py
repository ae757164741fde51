"""Trains a click model: ``torchrun --standalone --nproc_per_node=2 -m trainer.train model=deepfm data=trivago data.root=…``.

The life of the process: compose and check the configuration, join the process group, make the run folder, build, train,
evaluate, say how it went.
"""

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.manifest import Manifest
from data_loaders.state_files import read_json, write_json
from trainer.checkpoint import read_best
from trainer.checkpoint.loading import load
from trainer.config.compose import Composed, compose, parse
from trainer.config.job import TrainConfig
from trainer.models.construct import build_model
from trainer.modules import contract
from trainer.monitoring import trackers
from trainer.monitoring.grace_period import GraceCheck
from trainer.monitoring.metrics_logger import print_summary
from trainer.monitoring.profiling.window import window
from trainer.monitoring.sparsity import wide_weights
from trainer.report.drawing import draw_or_warn
from trainer.run import build, loop
from trainer.run.data import open_data
from trainer.run.evaluator import best_possible, evaluate
from trainer.run.job import Job, begin, make_job
from trainer.run.redraw import Redraw
from trainer.run.step_seeds import StepSeeds
from trainer.run.training_state import ModelState
from trainer.runtime import fault_injection, run_folder
from trainer.runtime.distributed import (
    Ranks,
    choose_device,
    from_first,
    grace_seconds,
    identity,
    launch_id,
    make_deterministic,
    unordered_operation_named,
)
from trainer.runtime.process import guarded, is_lost_peer
from trainer.runtime.progress import Progress
from trainer.runtime.rendezvous import process_group
from trainer.runtime.session import Session
from trainer.runtime.step_guard import StepGuard
from trainer.runtime.watchdog import Watchdog


@record
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    guarded(lambda: start(argv))


def start(argv: Sequence[str]) -> None:
    composed = compose(argv)
    if parse(argv)[0].print_config:
        print(composed.text, end="")
        return
    run(composed)


def run(composed: Composed, *, hosted: bool = False) -> Path | None:
    """Everything that can be checked is checked before the process group starts. ``hosted``: in a program that is not ours and
    goes on afterwards, such as a notebook. Returns the run folder; None for a dry run."""
    config = composed.config
    config.check_addresses()
    config.check_world_size(identity()[1])
    trackers.check_installed(config.logging)
    model = build_model(config.model, config.data.schema, config.seed, build.execution(config, identity()[1]))
    if config.deterministic:
        make_deterministic()
    device = choose_device(config.device)
    with process_group(device, config.timeout_seconds, config.rendezvous_timeout_seconds) as ranks:
        if config.warm_start.dry_run:
            dry_run(config, composed.tree, model, ranks)
            return None
        folder = Path(from_first(lambda: str(run_folder.choose(config.run, launch_id()))))
        with Session(folder, ranks, hosted=hosted) as session:
            final = train(config, composed.tree, model, session, ranks)
            if final is not None and ranks.is_first:
                write_json(folder / run_folder.METRICS, final)
                session.close("finished", step=final["train"]["step"], **final.get("selected", {}))
                print_summary(final, folder, config.report)
            if config.report and ranks.is_first:
                draw_or_warn(folder)
        return folder


def dry_run(config: TrainConfig, tree: dict[str, Any], model: nn.Module, ranks: Ranks) -> None:
    """Reports what a warm start would take over, and leaves nothing behind."""
    folder = Path(from_first(lambda: tempfile.mkdtemp(prefix="warm-start-")))
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        train(config, tree, model, Session(folder, ranks), ranks)
    finally:
        if ranks.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def train(
    config: TrainConfig, tree: dict[str, Any], model: nn.Module, session: Session, ranks: Ranks
) -> dict[str, Any] | None:
    """Builds and trains; returns what ``metrics.json`` holds; None for a dry run, and where it was asked to stop and has
    saved."""
    explained = contract.explained(config.model["name"], type(model), is_lost_peer)
    limit = config.hang_timeout_seconds
    with Watchdog(session.path, ranks, limit, session.hang, leave=session.leave) as watchdog, explained:
        data = open_data(config, tree, model.layout, session.path, ranks, watchdog.alive)
        watchdog.alive()
        job = make_job(config, tree, model, data, session.path, ranks, watchdog)
        begin(job)
        if config.warm_start.dry_run:
            job.close()
            return None
        return train_and_evaluate(job, tree, session, watchdog)


@unordered_operation_named()
def train_and_evaluate(job: Job, tree: dict[str, Any], session: Session, watchdog: Watchdog) -> dict[str, Any] | None:
    """From the first step to the last evaluation."""
    config, ranks = job.config, job.ranks
    if job.data.saved is None:  # a checkpoint has the counts
        build.count_ids(job.built.optimizer, config.data, job.layout, config.batch_size, job.data.files.manifest, ranks)
    if ranks.is_first:  # not before: a folder that refuses this configuration keeps its own
        run_folder.write_yaml(job.folder / run_folder.CONFIG, tree)
        job.record.environment()
    with job.trackers:
        before = score_before(job, watchdog)
        stop_signal = run_steps(job, session, watchdog)
        if stop_signal:
            if ranks.is_first:
                reason = signal.Signals(stop_signal).name
                session.close("preempted", step=job.progress.step, retryable=True, reason=reason)
            return None
        session.signals.end_if_asked()
        with watchdog.paused():
            final = final_metrics(job) | ({"before": before} if before else {})
            if config.report:
                job.record.tables(job.progress.step, job.built.tables, job.state.pieces, config.data.schema)
            return final | {"alerts": job.alerts.raised}


def run_steps(job: Job, session: Session, watchdog: Watchdog) -> int:
    """Trains, and saves at the end. Returns the number of the signal that ended it early, or 0."""
    data, logger, checkpoints = job.data, job.logger, job.checkpoints
    guard = StepGuard(
        job.ranks,
        lambda: session.signals.asked,
        watchdog,
        session.restarts,
        data.files.manifest,
        job.built.mask,
        lambda: job.alerts.culprits(data.loader.magnitudes),
    )
    with job.stragglers, session.signals.deferred(), profiled(job, watchdog) as profile:
        logger.begin()
        try:
            if job.early_stopping.stopped is None:  # else the checkpoint it resumed from was the last one
                loop.run(
                    batches=data.batches,
                    pipeline=job.built.pipeline,
                    progress=job.progress,
                    guard=guard,
                    watchdog=watchdog,
                    row_log=job.row_log,
                    coverage=job.alerts.coverage,
                    logger=logger,
                    evaluator=job.evaluator,
                    early_stopping=job.early_stopping,
                    checkpoints=checkpoints,
                    grace=GraceCheck(checkpoints, grace_seconds(), job.ranks),
                    profile=profile,
                    seeds=StepSeeds(job.config.seed, job.ranks),
                    redraw=Redraw(
                        job.built,
                        job.config,
                        data.files.manifest,
                        job.ranks,
                        epoch_steps=data.loader.steps_per_epoch,
                        total_steps=data.total_steps,
                    ),
                )
        finally:
            job.close()
        with watchdog.paused():
            waited = checkpoints.seconds
            checkpoints.save(job.progress)
            logger.outside(checkpoints.seconds - waited)
    return guard.stop_signal


def profiled(job: Job, watchdog: Watchdog) -> AbstractContextManager[Callable[[int], None]]:
    """What to call before each step: the window of ``profile=true``, or nothing."""
    if not job.config.profile:
        return nullcontext(lambda step: None)
    return window(job.config.profiling, job.folder, job.ranks, watchdog, job.logger.outside)


def score_before(job: Job, watchdog: Watchdog) -> dict[str, Any] | None:
    """Metrics of the rows to be trained, by the model as it is before the first step; a resumed run has them from
    its beginning (``before.json``), or never had them."""
    config, ranks, path = job.config, job.ranks, job.folder / run_folder.BEFORE
    if not config.evaluation.before_training:
        return None
    if job.progress.step:
        return from_first(lambda: read_json(path, {}) or None)
    data, batch_size = config.data, config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(
        job.data.files.manifest,
        data.schema,
        job.layout,
        batch_size,
        data.stream,
        ranks,
        group_by=config.evaluation.columns,
    )
    values = evaluate(job.built.pipeline, loader, config.evaluation, ranks, under_way=False, alive=watchdog.alive)
    job.logger.outside(values["seconds"])
    job.logger.write("before", values, job.progress, loader)
    if ranks.is_first:
        write_json(path, values)
    return values


def final_metrics(job: Job) -> dict[str, Any]:
    """What ``metrics.json`` holds: of training, and of what was held out."""
    progress, logger, held_out, data = job.progress, job.logger, job.data.held_out, job.config.data
    fault_injection.at("evaluation", step=progress.step)
    train_metrics = {"step": progress.step, "epoch": progress.epoch, **logger.training_metrics()}
    logger.write("final", train_metrics, progress)
    final: dict[str, Any] = {"train": train_metrics}
    if "valid" in held_out:
        final["valid"] = loop.evaluate(progress, job.evaluator, job.early_stopping, job.checkpoints)
    selected = restore_best(job) if job.config.checkpoint.restore_best else None
    if selected is not None:
        progress = Progress()
        progress.load_state_dict(selected.pop("progress"))
        final["selected"] = selected
        if progress != job.progress and "valid" in held_out:
            final["valid"] = job.evaluator.score("valid", held_out["valid"], progress.step)
    if (wide := wide_weights(job.built.task, job.built.tables, job.ranks)) is not None:
        final["wide"] = wide
    if "test" in held_out:
        final["test"] = job.evaluator.score("test", held_out["test"], progress.step)
        logger.write("test", final["test"], progress, held_out["test"])
    if data.probability and job.ranks.is_first:
        columns = (data.schema.label, data.probability)
        final["best"] = {
            split: best_possible(Manifest.scan(getattr(data, split), data.root, columns), *columns)
            for split in held_out
        }
    return final


def restore_best(job: Job) -> dict[str, Any] | None:
    """Puts the weights of the best checkpoint in place. Returns the step they are of, by what it is the best, why training
    stopped (None: it came to its end), and the progress of then; None where no evaluation has named a best one."""
    folder = job.checkpoints.folder
    best = from_first(lambda: read_best(folder))
    if best is None:
        return None
    facts = load(folder / f"step-{best['step']}", ModelState(job.built), job.ranks, weights_only=True)
    selected = {
        "best_step": best["step"],
        "metric": best["metric"],
        "value": best["value"],
        "stopped": job.early_stopping.stopped,
    }
    return selected | {"progress": facts["progress"]}
