"""Trains a click model: ``torchrun --standalone --nproc_per_node=2 -m trainer.train model=deepfm data=trivago data.root=…``.

The life of the process: compose and check the configuration, join the process group, make the run folder, build, train,
evaluate, say how it went.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.loader import BatchIterator, Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Layout
from trainer import build, faults, inputs, loop, run_folder, sharding
from trainer.checkpoint import AnyPath, note, read_best
from trainer.checkpoint.saving import Checkpoints
from trainer.compose import compose, parse
from trainer.config import TrainConfig
from trainer.distributed import Ranks, choose_device, from_first, grace_seconds, identity, launch_id, process_group
from trainer.grace import GraceCheck
from trainer.guard import Guard
from trainer.inputs import Inputs, Saved
from trainer.judge import Judge
from trainer.ledger import Ledger
from trainer.pace import Pace
from trainer.process import guarded
from trainer.progress import Progress
from trainer.reporting import Reporter, print_plan, print_summary
from trainer.resuming import checkpoints_folder, job_identity, resumable, resume, starting_point
from trainer.scoring import Evaluator, best_possible, evaluate
from trainer.session import Session
from trainer.state import ModelState, TrainingState
from trainer.warm_start.start import warm_start, whole_checkpoint
from trainer.watchdog import Watchdog
from trainer.wide_weights import wide_weights


@record
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    guarded(lambda: start(argv))


def start(argv: Sequence[str]) -> None:
    """Everything that can be checked is checked before the process group starts."""
    composed = compose(argv)
    if parse(argv)[0].print_config:
        print(yaml.safe_dump(composed.tree, sort_keys=False), end="")
        return
    config = composed.config
    config.check_world_size(identity()[1])
    model = build.build_model(config.model, config.data.schema, config.seed)
    device = choose_device(config.device)
    with process_group(device, config.timeout_seconds, config.rendezvous_timeout_seconds) as ranks:
        if config.warm_start.dry_run:
            return dry_run(config, composed.tree, model, ranks)
        folder = Path(from_first(lambda: str(run_folder.choose(config.run, launch_id()))))
        with Session(folder, ranks) as session:
            final = train(config, composed.tree, model, session, ranks)
            if final is not None and ranks.is_first:
                run_folder.write_json(folder / "metrics.json", final)
                session.close("finished", step=final["train"]["step"], **final.get("selected", {}))
                print_summary(final, folder)


def dry_run(config: TrainConfig, tree: dict[str, Any], model: nn.Module, ranks: Ranks) -> None:
    """Tells what a warm start would take over, and leaves nothing behind."""
    folder = Path(from_first(lambda: tempfile.mkdtemp(prefix="warm-start-")))
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        train(config, tree, model, Session(folder, ranks), ranks)
    finally:
        if ranks.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Feed:
    """What the run reads, and from where on: ``saved`` is the checkpoint it goes on from, if any; ``identity`` what must be
    the same in it; ``warm``, where it goes on from none, another run's checkpoint to begin with; ``batches`` are those
    still to train, ``held_out`` the loaders of ``valid`` and ``test``."""

    identity: dict[str, Any]
    saved: Saved | None
    warm: AnyPath | None
    chosen: Inputs
    progress: Progress
    loader: Loader
    held_out: dict[str, Loader]
    total_steps: int
    batches: BatchIterator


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

    @property
    def progress(self) -> Progress:
        return self.feed.progress

    def close(self) -> None:
        self.feed.batches.close()
        self.reporter.close()


def train(
    config: TrainConfig, tree: dict[str, Any], model: nn.Module, session: Session, ranks: Ranks
) -> dict[str, Any] | None:
    """Builds and trains; returns what ``metrics.json`` holds; None for a dry run, and where it was asked to stop and has
    saved."""
    with Watchdog(session.path, ranks, config.hang_timeout_seconds, session.hang) as watchdog:
        feed = open_feed(config, tree, model.layout, session.path, ranks)
        watchdog.alive()
        job = make_job(config, tree, model, feed, session.path, ranks)
        job.built.task.register_forward_pre_hook(lambda *_: watchdog.alive())  # an evaluation may take its time
        begin(job)
        if config.warm_start.dry_run:
            job.close()
            return None
        return train_and_judge(job, tree, session, watchdog)


def train_and_judge(job: Job, tree: dict[str, Any], session: Session, watchdog: Watchdog) -> dict[str, Any] | None:
    """From the first step to the last evaluation."""
    config, ranks = job.config, job.ranks
    if job.feed.saved is None:  # a checkpoint has the counts
        build.count_ids(
            job.built.optimizer, config.data, job.layout, config.batch_size, job.feed.chosen.manifest, ranks
        )
    if ranks.is_first:  # not before: a folder that refuses this configuration keeps its own
        run_folder.write_yaml(job.folder / "config.yaml", tree)
    before = score_before(job)
    stop_signal = run_steps(job, session, watchdog)
    if stop_signal:
        if ranks.is_first:
            reason = signal.Signals(stop_signal).name
            session.close("preempted", step=job.progress.step, retryable=True, reason=reason)
        return None
    session.signals.end_if_asked()
    with watchdog.paused():
        return final_metrics(job) | ({"before": before} if before else {})


def open_feed(config: TrainConfig, tree: dict[str, Any], layout: Layout, folder: Path, ranks: Ranks) -> Feed:
    """Finds the checkpoint to go on from and the files to read, and begins to read them."""
    build.ensure_synthetic(config.data)
    identity = job_identity(config, tree)
    place = checkpoints_folder(config, folder)
    saved = from_first(lambda: resumable(config, place, identity))
    from_first(lambda: note(folder, place))
    source = config.warm_start.path if saved is None else None  # a run that goes on has its own state
    warm = from_first(lambda: whole_checkpoint(source)) if source is not None else None
    chosen = inputs.choose(config, layout, saved, ranks)
    progress = starting_point(saved, chosen)
    loader, _ = build.build_train_loader(
        config.data,
        layout,
        config.batch_size,
        config.seed,
        ranks,
        chosen.manifest,
        record_origin=config.debug.ledger,
    )
    total_steps = progress.total_steps(config.epochs, loader.steps_per_epoch, config.steps)
    held_out = held_out_loaders(config, layout, ranks)
    batches = loop.batches_from(loader, progress, total_steps)  # reading begins, while the model is built
    return Feed(identity, saved, warm, chosen, progress, loader, held_out, total_steps, batches)


def make_job(
    config: TrainConfig, tree: dict[str, Any], model: nn.Module, feed: Feed, folder: Path, ranks: Ranks
) -> Job:
    """Plans, shards and initialises the model, tells the plan, and makes what goes with it."""
    faults.at("build")
    built = build.build(config, model, ranks, feed.loader.local_batch_size, feed.total_steps)
    if ranks.is_first:
        run_folder.write_json(folder / "plan.json", built.plan_rows)
        print_plan(built.plan_rows)
    ledger = Ledger(folder / "ledger", feed.chosen.manifest, ranks.rank)
    reporter = Reporter(folder, feed.loader, feed.total_steps, config.log_every_steps, ranks)
    judge = Judge(config.early_stopping, config.optim.plateau, built.optimizer)
    state = TrainingState(built.task, built.optimizer, reporter, built.plan_rows, judge)
    checkpoints = Checkpoints(
        checkpoints_folder(config, folder),
        config.checkpoint,
        state,
        feed.identity,
        ranks,
        texts={
            inputs.DATA: feed.chosen.dumps(),
            "config.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
        },
        before_commit=ledger.flush,
    )
    valid, epoch_steps = feed.held_out.get("valid"), feed.loader.steps_per_epoch
    evaluator = Evaluator(built.pipeline, valid, config.evaluation, epoch_steps, reporter, ranks)

    def on_result(progress: Progress, split: str, values: dict[str, Any]) -> bool:
        judge.consider(progress, split, values)  # first: a checkpoint of this step holds what it counts
        checkpoints.consider(progress, split, values)
        return judge.stopped is not None

    evaluator.on_result = on_result
    return Job(config, model.layout, folder, ranks, feed, built, ledger, reporter, state, checkpoints, evaluator, judge)


def begin(job: Job) -> None:
    """Goes on from the run's own checkpoint, or else from another run's model, where there is one."""
    config, feed, ranks = job.config, job.feed, job.ranks
    resume(feed.saved, job.checkpoints, job.ledger.folder, recording=config.debug.ledger, ranks=ranks)
    if feed.warm is not None:
        pieces, plan_rows = job.state.pieces, job.built.plan_rows
        begun = warm_start(config.warm_start, config, pieces, plan_rows, job.folder, ranks, feed.warm)
        job.built.optimizer.restore(0, begun.table_steps)


def run_steps(job: Job, session: Session, watchdog: Watchdog) -> int:
    """Trains, and saves at the end. Returns the number of the signal that ended it early, or 0."""
    ranks, feed, built = job.ranks, job.feed, job.built
    grace = GraceCheck(job.checkpoints, grace_seconds(), ranks)

    def before_step(step: int) -> None:
        grace.look()
        loop.seed_dropout(job.config.seed, ranks, step)

    check = once(lambda: sharding.check_pipelined(built.pipeline, built.task))
    with Pace(watchdog, feed.loader, ranks) as pace, session.signals.deferred():
        job.reporter.further = pace.report
        guard = Guard(ranks, lambda: session.signals.asked, watchdog, session.attempts, feed.chosen.manifest)
        guard.attach(built.task)
        try:
            if job.judge.stopped is None:  # else the checkpoint it goes on from had the last word
                loop.run(
                    built.pipeline,
                    feed.batches,
                    job.progress,
                    job.ledger,
                    job.reporter,
                    job.checkpoints,
                    job.evaluator,
                    guard,
                    before_step,
                    check,
                )
        finally:
            job.close()
        with watchdog.paused():
            job.checkpoints.save(job.progress)
    return guard.stop_signal


def score_before(job: Job) -> dict[str, Any] | None:
    """Metrics of the rows to be trained, by the model as it is before the first step; a run that goes on has them from
    its beginning (``before.json``), or never had them."""
    config, ranks, path = job.config, job.ranks, job.folder / "before.json"
    if not config.evaluation.before_training:
        return None
    if job.progress.step:
        return from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    data, batch_size = config.data, config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(
        job.feed.chosen.manifest,
        data.schema,
        job.layout,
        batch_size,
        data.stream,
        ranks,
        keys=config.evaluation.columns,
    )
    values = evaluate(job.built.pipeline, loader, config.evaluation, ranks, under_way=False)
    job.reporter.outside(values["seconds"])
    job.reporter.write("before", values, job.progress)
    if ranks.is_first:
        run_folder.write_json(path, values)
    return values


def held_out_loaders(config: TrainConfig, layout: Any, ranks: Ranks) -> dict[str, Any]:
    """Loaders of ``valid`` and ``test``, where the data has them; made before training, so that a wrong path shows at once."""
    data = config.data
    batch_size = config.evaluation.batch_size or config.batch_size
    return {
        split: build.build_ordered_loader(
            build.scan(data, split, layout),
            data.schema,
            layout,
            batch_size,
            data.stream,
            ranks,
            keys=config.evaluation.columns,
        )
        for split in ("valid", "test")
        if getattr(data, split)
    }


def final_metrics(job: Job) -> dict[str, Any]:
    """What ``metrics.json`` holds: of training, and of what was held out."""
    progress, reporter, held_out, data = job.progress, job.reporter, job.feed.held_out, job.config.data
    faults.at("evaluation", step=progress.step)
    train_metrics = {"step": progress.step, "epoch": progress.epoch, **reporter.training_metrics()}
    reporter.write("final", train_metrics, progress)
    final: dict[str, Any] = {"train": train_metrics}
    if "valid" in held_out:
        final["valid"] = job.evaluator.evaluate(progress)
    selected = restore_best(job) if job.config.checkpoint.restore_best else None
    if selected is not None:
        progress = Progress(**selected.pop("progress"))
        final["selected"] = selected
        if progress != job.progress and "valid" in held_out:
            final["valid"] = evaluate(job.built.pipeline, held_out["valid"], job.config.evaluation, job.ranks)
    if (wide := wide_weights(job.built.task, job.ranks)) is not None:
        final["wide"] = wide
    if "test" in held_out:
        final["test"] = evaluate(job.built.pipeline, held_out["test"], job.config.evaluation, job.ranks)
        reporter.write("test", final["test"], progress)
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
    state = ModelState(job.built.task, job.built.optimizer)
    checkpoints = Checkpoints(folder, job.config.checkpoint, state, {}, job.ranks)
    facts = checkpoints.load(folder / f"step-{best['step']}")
    told = {"best_step": best["step"], "metric": best["metric"], "value": best["value"], "stopped": job.judge.stopped}
    return told | {"progress": facts["progress"]}


def once(action: Any) -> Any:
    """A function that acts the first time it is called."""
    pending = [action]
    return lambda: pending.pop()() if pending else None


if __name__ == "__main__":
    main()
