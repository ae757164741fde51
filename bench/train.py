"""Samples/s, peak memory and input wait of the three jobs, beside a plain TorchRec loop and the dense part alone.

    torchrun --standalone --nproc_per_node=2 -m bench.train --model deepfm [--output bench/results/train.json] [overrides]

Four sides, interleaved in one process, medians of the repeats:

* ours: Parquet on disk -> trained, as ``trainer.train`` does it;
* memory: ours, but for batches already in memory: what reading Parquet on the same cores costs;
* plain: the same model and sizes as torchrec's examples train it, DistributedModelParallel with the planner's table-wise
  plan, fused row-wise AdaGrad for all tables, Adam for the dense part, no pipeline, batches already in memory;
* dense: forward, backward and step of the dense part alone, its looked-up embeddings given: the ceiling.

One model a process tree, so that peak memory is its own.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data_loaders.batch import Batch
from trainer import build, loop
from trainer.compose import compose
from trainer.config import TrainConfig
from trainer.distributed import Ranks, choose_device, peak_memory_mb
from trainer.modules.task import ClickTask
from trainer.optim.tables import embedding_tables
from trainer.process import guarded
from trainer.progress import Progress
from trainer.rendezvous import process_group

MODELS = ("wide_deep", "deepfm", "din")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--model", choices=MODELS, default="deepfm")
    parser.add_argument("--steps", type=int, default=40, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("bench/results/train.json"))
    options = parser.parse_args()
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    config = compose([f"model={options.model}", *options.overrides]).config
    with process_group(choose_device(config.device), config.timeout_seconds) as ranks:
        result = measure(config, ranks, options.steps, options.repeats)
        if ranks.is_first:
            record(options.output, options.model, result)


def measure(config: TrainConfig, ranks: Ranks, steps: int, repeats: int) -> dict[str, Any]:
    build.ensure_synthetic(config.data)
    ours = Ours(config, ranks, steps)
    ours()  # warm-up: the pipeline fills, the allocator settles, pages are mapped
    peak = peak_memory_mb(ranks.device)
    batches = in_memory_batches(config, ranks, 8)
    memory = Ours(config, ranks, steps, cycle(batches))
    sides: dict[str, Callable[[], float]] = {
        "ours": ours,
        "memory": memory,
        "plain": plain_side(config, ranks, batches, steps),
        "dense": dense_side(config, ranks, batches, steps),
    }
    for name in ("memory", "plain", "dense"):
        sides[name]()
    waits = []
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            dist.barrier()
            before = ours.loader.wait_seconds
            seconds[name].append(side())
            if name == "ours":
                waits.append((ours.loader.wait_seconds - before) / seconds[name][-1])
    rates = {name: steps * config.batch_size / statistics.median(times) for name, times in seconds.items()}
    return {
        "samples_per_second": {name: round(rate) for name, rate in rates.items()},
        "ours_over_plain": round(statistics.median(p / o for o, p in zip(seconds["ours"], seconds["plain"])), 3),
        "memory_over_plain": round(statistics.median(p / m for m, p in zip(seconds["memory"], seconds["plain"])), 3),
        "ours_over_dense_ceiling": round(
            statistics.median(d / o for o, d in zip(seconds["ours"], seconds["dense"])), 3
        ),
        "input_wait_fraction": round(statistics.median(waits), 4),
        "peak_memory_mb": peak,
        "batch_size": config.batch_size,
        "world_size": ranks.world_size,
        "precision": "bf16" if build.autocast_dtype(config.precision, ranks.device) else "fp32",
        "data": config.data.name,
        "steps": steps,
        "repeats": repeats,
    }


class Ours:
    """Trains ``steps`` steps from Parquet (or ``batches``); a call returns the seconds they took."""

    def __init__(self, config: TrainConfig, ranks: Ranks, steps: int, batches: Iterator[Batch] | None = None) -> None:
        model = build.build_model(config.model, config.data.schema, config.seed)
        self.loader, _ = build.build_train_loader(config.data, model.layout, config.batch_size, config.seed, ranks)
        self.built = build.build(config, model, ranks, self.loader.local_batch_size, total_steps=10**6)
        self.batches = batches or loop.batches_from(self.loader, Progress(), 10**6)
        self.steps, self.device = steps, ranks.device

    def __call__(self) -> float:
        return timed(lambda: [self.built.pipeline.progress(self.batches) for _ in range(self.steps)], self.device)


def plain_side(config: TrainConfig, ranks: Ranks, batches: list[Batch], steps: int) -> Callable[[], float]:
    model = build.build_model(config.model, config.data.schema, config.seed)
    task = build.build_task(model, config.precision, ranks.device, may_drop=False)
    for module in task.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.02, "eps": 1e-8})
    # Data-parallel tables, which the planner likes on a CPU, would leave the fused optimizer and not be trained at all.
    only = ParameterConstraints(sharding_types=["table_wise"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks.world_size, compute_device=ranks.device.type),
        constraints={table.name: only for table in embedding_tables(task)},
    )
    sharders = get_default_sharders()
    plan = planner.collective_plan(task, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(task, device=ranks.device, plan=plan, sharders=sharders)
    dense = [p for name, p in sharded.named_parameters() if "embedding" not in name]
    optimizer = torch.optim.Adam(dense, lr=1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss, _ = sharded(batch.to(ranks.device, non_blocking=True))
        loss.backward()
        optimizer.step()

    return lambda: timed(lambda: [step(batches[k % len(batches)]) for k in range(steps)], ranks.device)


def dense_side(config: TrainConfig, ranks: Ranks, batches: list[Batch], steps: int) -> Callable[[], float]:
    """The head of the model on lookups made once, data-parallel over the ranks."""
    model = build.build_model(config.model, config.data.schema, config.seed).to_empty(device="cpu").to(ranks.device)
    build.set_autocast(model, build.autocast_dtype(config.precision, ranks.device))
    inputs: list[tuple[tuple, Batch]] = []
    handle = model.head.register_forward_pre_hook(lambda _, arguments: inputs.append((arguments, batch)))
    for batch in [b.to(ranks.device) for b in batches]:
        with torch.no_grad():
            model(batch)
    handle.remove()
    head: nn.Module = nn.parallel.DistributedDataParallel(copy.deepcopy(model.head))
    loss = ClickTask(model).loss
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)

    def step(arguments: tuple, batch: Batch) -> None:
        optimizer.zero_grad()
        loss(head(*arguments), batch.labels, batch.weights, batch.normalizer).backward()
        optimizer.step()

    return lambda: timed(lambda: [step(*inputs[k % len(inputs)]) for k in range(steps)], ranks.device)


def in_memory_batches(config: TrainConfig, ranks: Ranks, count: int) -> list[Batch]:
    layout = build.build_model(config.model, config.data.schema, config.seed).layout
    loader, _ = build.build_train_loader(config.data, layout, config.batch_size, config.seed, ranks)
    stream = loader.epoch(0)
    batches = list(islice(stream, count))
    stream.close()
    return batches


def timed(action: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def record(path: Path, model: str, result: dict[str, Any]) -> None:
    """Adds one model's result to the file, with the command and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[model] = {**result, "command": command(), "machine": machine()}
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps({model: result}, indent=2))


def command() -> str:
    return f"torchrun --standalone --nproc_per_node={dist.get_world_size()} -m bench.train {' '.join(sys.argv[1:])}"


def machine() -> dict[str, Any]:
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    cpu = next(iter(models), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory": memory,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
