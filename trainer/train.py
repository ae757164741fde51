"""Trains a click model: ``torchrun --standalone --nproc_per_node=2 -m trainer.train model=deepfm data=trivago data.root=…``.

The life of the process: compose and check the configuration, join the process group, make the run folder, build, train,
evaluate, say how it went.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.manifest import Manifest
from data_loaders.order import ORDER_VERSION
from trainer import build, loop, run_folder, sharding
from trainer.checkpoint import Checkpoints
from trainer.compose import compose, parse
from trainer.config import TrainConfig
from trainer.distributed import Ranks, choose_device, from_first, launch_id, process_group
from trainer.process import guarded
from trainer.progress import Progress
from trainer.reporting import Reporter, print_plan, print_summary
from trainer.scoring import Evaluator, best_possible, evaluate


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
    model = build.build_model(config.model, config.data.schema, config.seed)
    device = choose_device(config.device)
    with process_group(device, config.timeout_seconds) as ranks:
        folder = Path(from_first(lambda: str(run_folder.choose(config.run, launch_id()))))
        with Folder(folder, ranks) as status:
            final = train(config, composed.tree, model, folder, ranks)
            if ranks.is_first:
                run_folder.write_json(folder / "metrics.json", final)
                status.update("finished", step=final["train"]["step"])
                print_summary(final, folder)


class Folder:
    """Holds the run folder's lock and ``status.json`` for as long as the run lives."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.status = run_folder.Status(folder, launch_id()[0])
        self._lock = None
        from_first(self._open)

    def __enter__(self) -> run_folder.Status:
        return self.status

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            # Whichever rank meets the error knows the reason; the file is replaced whole.
            self.status.update("failed", reason=" ".join(str(error).split())[:2000], rank=self.ranks.rank)

    def _open(self) -> None:
        self._lock = run_folder.lock(self.folder)
        self.status.update("running", world_size=self.ranks.world_size)


def train(config: TrainConfig, tree: dict[str, Any], model: nn.Module, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Builds and trains; returns what ``metrics.json`` holds."""
    data = config.data
    build.ensure_synthetic(data)
    loader, fingerprint = build.build_train_loader(data, model.layout, config.batch_size, config.seed, ranks)
    total_steps = min(config.steps or sys.maxsize, config.epochs * loader.steps_per_epoch)
    held_out = held_out_loaders(config, model.layout, ranks)
    built = build.build(config, model, ranks, loader.local_batch_size, total_steps)
    if ranks.is_first:
        run_folder.write_json(folder / "plan.json", built.plan_rows)
        print_plan(built.plan_rows)

    progress = Progress()
    identity = job_identity(config, tree, fingerprint)
    tensors = {"model": built.task, "optimizer": built.optimizer}
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, tensors, identity, ranks)
    resume(config, checkpoints, progress, ranks)
    if ranks.is_first:  # not before: a folder that refuses this configuration keeps its own
        run_folder.write_yaml(folder / "config.yaml", tree)
    reporter = Reporter(folder, loader, total_steps, config.log_every_steps, ranks)
    evaluator = Evaluator(
        built.pipeline, held_out.get("valid"), config.evaluation.every_steps, loader.steps_per_epoch, reporter, ranks
    )
    batches = loop.batches_from(loader, progress, total_steps)
    check = once(lambda: sharding.check_pipelined(built.pipeline, built.task))
    try:
        loop.run(built.pipeline, batches, progress, reporter, checkpoints, evaluator, check)
    finally:
        batches.close()
        reporter.close()
    checkpoints.save(progress)
    return final_metrics(config, built, reporter, evaluator, progress, held_out, ranks)


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


def job_identity(config: TrainConfig, tree: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: else rows would be lost or repeated, or tensors misread."""
    stream = config.data.stream
    return {
        "model": tree["model"],
        "schema": tree["data"]["schema"],
        "data": fingerprint,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "stream": {"shards": stream.shards, "shuffle": stream.shuffle, "shuffle_rows": stream.shuffle_rows},
        "order": ORDER_VERSION,
    }


def resume(config: TrainConfig, checkpoints: Checkpoints, progress: Progress, ranks: Ranks) -> None:
    """Goes on from the newest whole checkpoint of the run folder, if ``resume=auto`` and there is one."""
    checkpoints.clean()
    path = checkpoints.newest() if config.resume == "auto" else None
    if path is None:
        return
    checkpoints.load(path, progress)
    if ranks.is_first:
        print(f"Resumed from {path}: step {progress.step}, {progress.rows:,} rows trained", flush=True)


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
