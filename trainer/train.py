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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.manifest import Manifest
from data_loaders.order import ORDER_VERSION
from trainer import build, checkpoint, inputs, loop, run_folder, sharding
from trainer.attempts import Attempts
from trainer.checkpoint.saving import Checkpoints
from trainer.compose import compose, parse
from trainer.config import TrainConfig
from trainer.distributed import Ranks, choose_device, from_first, identity, launch_id, process_group
from trainer.guard import Guard
from trainer.inputs import Inputs, Saved
from trainer.ledger import Ledger, cut
from trainer.process import StopSignals, guarded, is_lost_peer, is_retryable, one_line
from trainer.progress import Progress
from trainer.reporting import Reporter, print_plan, print_summary
from trainer.scoring import Evaluator, best_possible, evaluate
from trainer.state import TrainingState
from trainer.warm_start.start import warm_start
from trainer.watchdog import Watchdog


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
    with process_group(device, config.timeout_seconds) as ranks:
        if config.warm_start.dry_run:
            return dry_run(config, composed.tree, model, ranks)
        folder = Path(from_first(lambda: str(run_folder.choose(config.run, launch_id()))))
        with Folder(folder, ranks) as opened:
            final = train(config, composed.tree, model, opened, ranks)
            if final is not None and ranks.is_first:
                run_folder.write_json(folder / "metrics.json", final)
                opened.close("finished", step=final["train"]["step"])
                print_summary(final, folder)


def dry_run(config: TrainConfig, tree: dict[str, Any], model: nn.Module, ranks: Ranks) -> None:
    """Tells what a warm start would take over, and leaves nothing behind."""
    folder = Path(from_first(lambda: tempfile.mkdtemp(prefix="warm-start-")))
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        train(config, tree, model, Folder(folder, ranks), ranks)
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


class Folder:
    """Holds the run folder's lock, ``status.json`` and ``attempts.txt`` for as long as the run lives, and hears the signals
    that ask it to stop."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path, self.ranks = folder, ranks
        self.status = run_folder.Status(folder, launch_id()[0])
        self.attempts = Attempts(folder)
        self.signals = StopSignals(
            # Hearsay: torchrun stops a rank by SIGTERM, too, when another one failed.
            lambda name: self._end("preempted", hearsay=True, reason=f"{name} while there was nothing to save")
        )
        self._lock = None
        from_first(self._open)

    def __enter__(self) -> "Folder":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            lost = is_lost_peer(error)
            reason = "lost contact with another rank" if lost else one_line(error)[:2000]
            facts = {"reason": reason, "rank": None if lost else self.ranks.rank}
            self._end("failed", hearsay=lost, retryable=is_retryable(error), **facts)
        else:
            self.signals.__exit__()

    def close(self, state: str, **facts: Any) -> None:
        """Rank 0 says how the run ended."""
        self.attempts.end(state)
        self.status.update(state, **facts)

    def hang(self, rank: int, step: int, message: str) -> None:
        """The watchdog's verdict."""
        self.status.end("failed", reason=message, rank=rank, step=step, retryable=True)

    def _end(self, state: str, *, hearsay: bool = False, retryable: bool = True, **facts: Any) -> None:
        self.attempts.end(state)
        self.status.end(state, hearsay=hearsay, step=self.attempts.step, retryable=retryable, **facts)

    def _open(self) -> None:
        self._lock = run_folder.lock(self.path)
        try:
            self.attempts.begin()
        except ValueError as error:
            self.status.end("failed", reason=one_line(error), retryable=False)
            raise
        self.status.update("running", world_size=self.ranks.world_size)


def train(
    config: TrainConfig, tree: dict[str, Any], model: nn.Module, opened: Folder, ranks: Ranks
) -> dict[str, Any] | None:
    """Builds and trains; returns what ``metrics.json`` holds; None for a dry run, and where it was asked to stop and has
    saved."""
    folder = opened.path
    data = config.data
    build.ensure_synthetic(data)
    job = job_identity(config, tree)
    saved = from_first(lambda: resumable(config, folder / "checkpoints", job))
    chosen = inputs.choose(config, model.layout, saved, ranks)
    progress = starting_point(saved, chosen)
    loader, _ = build.build_train_loader(
        data,
        model.layout,
        config.batch_size,
        config.seed,
        ranks,
        chosen.manifest,
        record_origin=config.debug.ledger,
    )
    total_steps = progress.total_steps(config.epochs, loader.steps_per_epoch, config.steps)
    held_out = held_out_loaders(config, model.layout, ranks)
    batches = loop.batches_from(loader, progress, total_steps)  # reading begins, while the model is built
    built = build.build(config, model, ranks, loader.local_batch_size, total_steps)
    if ranks.is_first:
        run_folder.write_json(folder / "plan.json", built.plan_rows)
        print_plan(built.plan_rows)

    ledger = Ledger(folder / "ledger", chosen.manifest, ranks.rank)
    reporter = Reporter(folder, loader, total_steps, config.log_every_steps, ranks)
    state = TrainingState(built.task, built.optimizer, reporter, built.plan_rows)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        config.checkpoint,
        state,
        job,
        ranks,
        texts={inputs.DATA: chosen.dumps(), "config.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)},
        before_commit=ledger.flush,
    )
    resume(saved, checkpoints, ledger.folder, recording=config.debug.ledger, ranks=ranks)
    if saved is None and config.warm_start.path is not None:  # a run that goes on has its own state
        begun = warm_start(config.warm_start, config, state.pieces, built.plan_rows, folder, ranks)
        built.optimizer.restore(0, begun.table_steps)
        if config.warm_start.dry_run:
            batches.close()
            reporter.close()
            return None
    if ranks.is_first:  # not before: a folder that refuses this configuration keeps its own
        run_folder.write_yaml(folder / "config.yaml", tree)
    evaluator = Evaluator(
        built.pipeline, held_out.get("valid"), config.evaluation.every_steps, loader.steps_per_epoch, reporter, ranks
    )
    evaluator.on_result = checkpoints.consider
    before = score_before(config, built, model.layout, chosen.manifest, folder, progress, reporter, ranks)
    seed = partial(loop.seed_dropout, config.seed, ranks)
    check = once(lambda: sharding.check_pipelined(built.pipeline, built.task))
    with Watchdog(folder, ranks, config.hang_timeout_seconds, opened.hang) as watchdog, opened.signals.deferred():
        guard = Guard(ranks, lambda: opened.signals.asked, watchdog, opened.attempts, chosen.manifest)
        guard.attach(built.task)
        try:
            loop.run(built.pipeline, batches, progress, ledger, reporter, checkpoints, evaluator, guard, seed, check)
        finally:
            batches.close()
            reporter.close()
        with watchdog.paused():
            checkpoints.save(progress)
    if guard.stop_requested:
        if ranks.is_first:
            reason = signal.Signals(guard.stop_signal).name
            opened.close("preempted", step=progress.step, retryable=True, reason=reason)
        return None
    opened.signals.end_if_asked()
    final = final_metrics(config, built, reporter, evaluator, progress, held_out, ranks)
    return final | ({"before": before} if before else {})


def score_before(
    config: TrainConfig,
    built: build.Built,
    layout: Any,
    manifest: Manifest,
    folder: Path,
    progress: Progress,
    reporter: Reporter,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Metrics of the rows to be trained, by the model as it is before the first step; a run that goes on has them from
    its beginning (``before.json``), or never had them."""
    path = folder / "before.json"
    if not config.evaluation.before_training:
        return None
    if progress.step:
        return from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    data, batch_size = config.data, config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(manifest, data.schema, layout, batch_size, data.stream, ranks)
    values = evaluate(built.pipeline, loader, ranks, under_way=False)
    reporter.outside(values["seconds"])
    reporter.write("before", values, progress)
    if ranks.is_first:
        run_folder.write_json(path, values)
    return values


def held_out_loaders(config: TrainConfig, layout: Any, ranks: Ranks) -> dict[str, Any]:
    """Loaders of ``valid`` and ``test``, where the data has them; made before training, so that a wrong path shows at once."""
    data = config.data
    batch_size = config.evaluation.batch_size or config.batch_size
    return {
        split: build.build_ordered_loader(
            build.scan(data, split, layout), data.schema, layout, batch_size, data.stream, ranks
        )
        for split in ("valid", "test")
        if getattr(data, split)
    }


def job_identity(config: TrainConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: else rows would be lost or repeated, or tensors misread.
    (The data are a matter of their own: ``trainer.inputs``.)"""
    stream = config.data.stream
    return {
        "model": tree["model"],
        "schema": tree["data"]["schema"],
        "new_since": config.data.new_since,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "stream": {"shards": stream.shards, "shuffle": stream.shuffle, "shuffle_rows": stream.shuffle_rows},
        "order": ORDER_VERSION,
    }


def resumable(config: TrainConfig, folder: Path, identity: dict[str, Any]) -> Saved | None:
    """The newest whole checkpoint in ``folder``; None where there is none. Raises ``ValueError`` where it belongs to
    another job, and where ``resume=never`` meets a checkpoint."""
    checkpoint.clean(folder)
    if config.resume == "never" and (found := checkpoint.committed(folder)):
        raise ValueError(
            f"resume=never, but {folder} holds {found[0].name}, which a run from scratch would get mixed up with: choose "
            "another run.dir, or take its checkpoints away"
        )
    path = checkpoint.newest(folder, config.checkpoint.on_corrupt)
    if path is None:
        return None
    checkpoint.check_identity(path, checkpoint.read_facts(path)["identity"], identity)
    return Saved.at(path, config.data.root)


def starting_point(saved: Saved | None, chosen: Inputs) -> Progress:
    progress = Progress() if saved is None else replace(saved.progress)
    if progress.epoch < chosen.first_epoch:  # its files are of this epoch on, so the last one is over
        progress.begin_epoch()
    return progress


def resume(saved: Saved | None, checkpoints: Checkpoints, ledger: Path, *, recording: bool, ranks: Ranks) -> None:
    """Goes on from ``saved``, if there is one. The ledger loses the steps that will be trained again."""
    step = saved.progress.step if saved else 0
    recorded = from_first(lambda: cut(ledger, step))
    if saved is None:
        return
    checkpoints.load(saved.path, saved.progress)
    if ranks.is_first:
        print(f"Resumed from {saved.path}: step {step}, {saved.progress.rows:,} rows trained", flush=True)
        if recording and recorded < step:
            print(f"warning: steps {recorded + 1} to {step} are not in the ledger: debug.ledger was off", flush=True)


def final_metrics(
    config: TrainConfig,
    built: build.Built,
    reporter: Reporter,
    evaluator: Evaluator,
    progress: Progress,
    held_out: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    train_metrics = {"step": progress.step, "epoch": progress.epoch, **reporter.training_metrics()}
    reporter.write("final", train_metrics, progress)
    final: dict[str, Any] = {"train": train_metrics}
    if "valid" in held_out:
        final["valid"] = evaluator.evaluate(progress)
    if "test" in held_out:
        final["test"] = evaluate(built.pipeline, held_out["test"], ranks)
        reporter.write("test", final["test"], progress)
    data = config.data
    if data.probability and ranks.is_first:
        columns = (data.schema.label, data.probability)
        final["best"] = {
            split: best_possible(Manifest.scan(getattr(data, split), data.root, columns), *columns)
            for split in held_out
        }
    return final


def once(action: Any) -> Any:
    """A function that acts the first time it is called."""
    pending = [action]
    return lambda: pending.pop()() if pending else None


if __name__ == "__main__":
    main()
