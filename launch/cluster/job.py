"""The training job itself: composed and checked here, in a second, and the torchrun command that every machine runs."""

import datetime
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_loaders.errors import UserError
from launch.cluster.options import Kubernetes, Nodes
from launch.ranks import worker_environment
from trainer.config.arguments import quoted
from trainer.config.compose import compose
from trainer.runtime.distributed import GRACE


@dataclass(frozen=True)
class Job:
    """``folder``: the run folder, fixed before the job is submitted, so that every start of it resumes there. ``arguments``: the
    trainer's."""

    name: str
    folder: Path
    arguments: list[str]


def make(arguments: Sequence[str], nodes: Nodes, now: datetime.datetime) -> Job:
    """Raises ``UserError`` for what cannot work."""
    config = compose(arguments).config
    config.check_addresses()
    config.check_world_size(nodes.nodes * nodes.ranks_per_node)
    if config.device == "cuda" and not nodes.gpus_per_node:
        raise UserError("device=cuda, but launch.gpus_per_node is 0: give the GPUs of a machine, or device=cpu")
    stamp = now.strftime("%Y%m%d-%H%M%S")
    name = nodes.name or f"{config.run.name}-{stamp}"
    if isinstance(nodes, Kubernetes) and nodes.name is None:
        label = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")[:28].strip("-")
        name = f"run-{label}-{stamp}" if not label[:1].isalpha() else f"{label}-{stamp}"
    folder = Path(config.run.dir or Path(config.run.root) / config.run.name / stamp)
    if isinstance(nodes, Kubernetes):
        check_kept(folder, nodes)
        return Job(name, folder, [*arguments, f"run.dir={quoted(folder)}"])
    return Job(name, folder.absolute(), [*arguments, f"run.dir={quoted(folder.absolute())}"])


def check_kept(folder: Path, nodes: Kubernetes) -> None:
    """Raises ``UserError`` for a run folder that ends with its pod."""
    if not any(folder.is_relative_to(path) for path in nodes.volumes.values()):
        mounted = ", ".join(nodes.volumes.values()) or "nowhere: launch.volumes.CLAIM=/PATH"
        raise UserError(
            f"run folder {folder} is on no volume, so it would end with its pod: give run.root= or run.dir= a place under "
            f"one (mounted: {mounted})"
        )


def environment(nodes: Nodes) -> dict[str, str]:
    """Variables of every rank."""
    ranks = nodes.ranks_per_node
    ours = worker_environment({}, ranks, nodes.gpus_per_node > 0, nodes.cpus_per_node or ranks)
    return {**ours, GRACE: str(nodes.grace), **nodes.env}


def torchrun(nodes: Nodes, python: str | None = None) -> list[str]:
    """torchrun with what does not depend on how the machines meet; ``worker`` follows."""
    return [
        nodes.python or python or sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes.nodes}",
        f"--nproc-per-node={nodes.ranks_per_node}",
        f"--shutdown-timeout={nodes.grace}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    ]


def worker(arguments: Sequence[str]) -> list[str]:
    # The agent fills ${…} templates into arguments; $$ is a plain $.
    return ["-m", "launch.rank", "trainer.train", *(argument.replace("$", "$$") for argument in arguments)]
