"""The step beside a plain TorchRec loop: ours / plain, in CPU time and in wall time, by model and data.

    python -m bench.train --data-root DIR [--rows deepfm_industrial …] [--quick]
    torchrun --standalone --nproc_per_node=2 -m bench.train --model deepfm [--output bench/results/train.json] [overrides]

The first trains each row of ``ROWS`` in a process of its own, one rank with the launcher's variables, which hold for all sides;
DIR holds criteo39/, ml1m/ and trivago/. The second is one model on several ranks.

Five sides, interleaved in one process, medians of the repeats:

* ours: Parquet on disk -> trained, as ``trainer.train`` does it;
* memory: ours, but for batches already in memory: what reading Parquet on the same cores costs;
* plain: the same model and sizes as torchrec's examples train it, DistributedModelParallel with the planner's table-wise
  plan, fused row-wise AdaGrad for all tables, Adam for the dense part, no pipeline, batches already in memory; torch's own
  operations for the model (DIN's attention, too, is ours without its kernels), in the job's precision;
* plain_fp32: plain in fp32, multiplied by the library that torch takes by itself;
* dense: forward, backward and step of the dense part alone, its looked-up embeddings given: the ceiling.

One model a process tree, so that peak memory is its own.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from bench import harness
from bench.harness import Pass, Rates, take_turns
from data_loaders.batch import Batch
from trainer.config.compose import compose
from trainer.config.data import SyntheticConfig
from trainer.config.job import TrainConfig
from trainer.models.construct import build_model
from trainer.modules.task import ClickTask
from trainer.run import build, loop
from trainer.runtime import cpu
from trainer.runtime.distributed import Ranks, choose_device, peak_memory_mb
from trainer.runtime.process import guarded
from trainer.runtime.progress import Progress
from trainer.runtime.rendezvous import process_group
from trainer.sharding.table_plan import embedding_tables

MODELS = ("wide_deep", "deepfm", "din")
COMPARED = (("ours", "plain_fp32"), ("memory", "plain_fp32"), ("ours", "plain"), ("memory", "plain"), ("ours", "dense"))


# 26 tables of a million rows, one id each, and 13 numbers, in Criteo's columns; a synthetic log of 50 batches.
LOG = SyntheticConfig(train_rows=409_600, valid_rows=8_192, test_rows=8_192)
INDUSTRIAL = (
    "data=criteo39",
    *(f"data.schema.tables.C{n}.num_embeddings=1000000" for n in range(1, 27)),
    "data.train=[train]",
    "data.valid=[valid]",
    "data.test=[test]",
    "batch_size=8192",
)
ROWS: dict[str, tuple[str, ...]] = {
    "deepfm_industrial": ("model=deepfm", "model.hidden_units=[400,400,400]", *INDUSTRIAL),
    "wide_deep_industrial": ("model=wide_deep", *INDUSTRIAL),
    "din_ml1m": ("experiment=din_ml1m", "batch_size=1024"),
    "din_trivago": ("experiment=din_trivago", "batch_size=256"),
    "deepfm_criteo39": ("experiment=deepfm_criteo39", "batch_size=512"),
    "wide_deep_criteo39": ("experiment=wide_deep_criteo39", "batch_size=512"),
}


def main() -> None:
    parser = harness.parser(__doc__, "train.json", overrides=True)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--name", help="of the result; the model's, where none is given")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--data-root", help="holds criteo39/, ml1m/ and trivago/")
    parser.add_argument("--quick", action="store_true", help="rows by 3 repeats of 5 steps")
    parser.add_argument("--steps", type=int, default=40, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.model or options.name:
        guarded(lambda: run(options))
    else:
        run_rows(options)


def run_rows(options: argparse.Namespace) -> None:
    """Each in a process of its own. A synthetic log goes to a folder that is removed."""
    turns = {"steps": 5, "repeats": 3} if options.quick else {"steps": options.steps, "repeats": options.repeats}
    root = harness.data_root(options.data_root, "criteo39/, ml1m/ and trivago/")
    with tempfile.TemporaryDirectory() as folder:
        for row in options.rows:
            of_row = f"{folder}/log" if "industrial" in row else root
            given = [f"--output={options.output}", *(f"--{name}={number}" for name, number in turns.items())]
            started = [sys.executable, "-m", "bench.train", f"--name={row}", *given, *ROWS[row], f"data.root={of_row}"]
            subprocess.run([*started, "device=cpu"], env=cpu.VARIABLES | os.environ, check=True)


def run(options: argparse.Namespace) -> None:
    chosen = [f"model={options.model}"] if options.model else []
    config = compose([*chosen, *options.overrides]).config
    if options.name and "industrial" in options.name:
        config = replace(config, data=replace(config.data, synthetic=LOG))
    with process_group(choose_device(config.device), config.timeout_seconds) as ranks:
        result = measure(config, ranks, options.steps, options.repeats)
        if ranks.is_first:
            name = options.name or options.model
            harness.record(options.output, result, name)
            print(json.dumps({name: result}, indent=2))


def measure(config: TrainConfig, ranks: Ranks, steps: int, repeats: int) -> dict[str, Any]:
    build.ensure_synthetic(config.data)
    ours = Ours(config, ranks, steps)
    ours(0)  # fills the pipeline, settles the allocator, maps pages
    peak = peak_memory_mb(ranks.device)
    batches = in_memory_batches(config, ranks, 8)
    sides: dict[str, Callable[[int], Pass]] = {
        "ours": ours,
        "memory": Ours(config, ranks, steps, cycle(batches)),
        "plain": plain_side(config, ranks, batches, steps),
        "plain_fp32": plain_side(replace(config, precision="fp32"), ranks, batches, steps),
        "dense": dense_side(config, ranks, batches, steps),
    }
    rates = {name: Rates.of(passes) for name, passes in take_turns(sides, repeats).items()}
    return {
        "samples_per_second": {name: rate.rows_per_second for name, rate in rates.items()},
        "cpu_seconds_per_million_rows": {name: rate.cpu_seconds_per_million_rows for name, rate in rates.items()},
        "wall_time_ratios": {f"{a}_over_{b}": rates[a].over(rates[b]).value for a, b in COMPARED},
        "cpu_time_ratios": {f"{a}_over_{b}": rates[a].over(rates[b]).in_cpu_time for a, b in COMPARED},
        "input_wait_fraction": round(statistics.median(ours.waits[-repeats:]), 4),
        "peak_memory_mb": peak,
        "batch_size": config.batch_size,
        "world_size": ranks.world_size,
        "precision": "bf16" if build.autocast_dtype(config.precision, ranks.device) else "fp32",
        "data": config.data.name,
        "steps": steps,
        "repeats": repeats,
    }


def timed(step: Callable[[int], Any], steps: int, config: TrainConfig, ranks: Ranks) -> Pass:
    """``steps`` steps of all ranks, which begin together; CPU seconds are those of this rank times their number."""

    def work() -> int:
        for number in range(steps):
            step(number)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return steps * config.batch_size

    dist.barrier()
    found = harness.timed(work)
    return Pass(found.rows, found.seconds, found.cpu_seconds * ranks.world_size)


class Ours:
    """Trains ``steps`` steps from Parquet (or ``batches``). ``waits``: by call, the share of its time spent on waiting for
    batches."""

    def __init__(self, config: TrainConfig, ranks: Ranks, steps: int, batches: Iterator[Batch] | None = None) -> None:
        model = build_model(config.model, config.data.schema, config.seed, build.execution(config, ranks.world_size))
        self.loader, _ = build.build_train_loader(config.data, model.layout, config.batch_size, config.seed, ranks)
        self.built = build.build(config, model, ranks, self.loader.local_batch_size, total_steps=10**6)
        self.batches = batches or loop.batches_from(self.loader, Progress(), 10**6)
        self.config, self.ranks, self.steps = config, ranks, steps
        self.waits: list[float] = []

    def __call__(self, _: int) -> Pass:
        before = self.loader.wait_seconds
        found = timed(lambda _: self.built.pipeline.progress(self.batches), self.steps, self.config, self.ranks)
        self.waits.append((self.loader.wait_seconds - before) / found.seconds)
        return found


def plain_side(config: TrainConfig, ranks: Ranks, batches: list[Batch], steps: int) -> Callable[[int], Pass]:
    by_torch = build.execution(replace(config, kernels=False), ranks.world_size)
    model = build_model(config.model, config.data.schema, config.seed, by_torch)
    task = build.build_task(model, may_drop=False)
    for module in task.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.02, "eps": 1e-8})
    # Data-parallel tables, which the planner likes on a CPU, would leave the fused optimizer and not be trained at all.
    only = ParameterConstraints(sharding_types=["table_wise"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks.world_size, compute_device=ranks.device.type),
        constraints={table.name: only for table in embedding_tables(task, config.optim)},
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

    def one_pass(_: int) -> Pass:
        ours = torch.get_float32_matmul_precision()  # of the process: building ours may have chosen oneDNN
        torch.set_float32_matmul_precision("highest")
        found = timed(lambda k: step(batches[k % len(batches)]), steps, config, ranks)
        torch.set_float32_matmul_precision(ours)
        return found

    return one_pass


def dense_side(config: TrainConfig, ranks: Ranks, batches: list[Batch], steps: int) -> Callable[[int], Pass]:
    """The head of the model on lookups made once, data-parallel over the ranks."""
    model = (
        build_model(config.model, config.data.schema, config.seed, build.execution(config, ranks.world_size))
        .to_empty(device="cpu")
        .to(ranks.device)
    )
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

    return lambda _: timed(lambda k: step(*inputs[k % len(inputs)]), steps, config, ranks)


def in_memory_batches(config: TrainConfig, ranks: Ranks, count: int) -> list[Batch]:
    layout = build_model(config.model, config.data.schema, config.seed).layout
    loader, _ = build.build_train_loader(config.data, layout, config.batch_size, config.seed, ranks)
    stream = loader.epoch(0)
    batches = list(islice(stream, count))
    stream.close()
    return batches


if __name__ == "__main__":
    main()
