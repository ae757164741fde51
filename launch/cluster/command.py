"""Training on many machines: `clicktrainer cluster launch=slurm launch.nodes=2 [launch.KEY=VALUE …] key=value … [--dry-run]`.

The job's configuration is composed and checked here first. Then `launch=slurm` submits a batch script by sbatch,
`launch=kubernetes` manifests by kubectl; `--dry-run` prints them instead. `launch=torchrun` prints the command to run on every
machine. Exit code: 0, 2 for a mistake, 1 where sbatch or kubectl fails.
"""

import datetime
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_loaders.errors import UserError
from data_loaders.messages import fail, note
from data_loaders.state_files import write_text
from launch import messages
from launch.children import Children
from launch.cluster import kubernetes, options, slurm
from launch.cluster.job import Job, environment, make, torchrun, worker
from launch.cluster.options import Kubernetes, Slurm, Torchrun
from launch.options import split
from trainer.config import arguments

SCRIPT = "job.sh"  # in the run folder


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments.cluster().parse_intermixed_args(argv)
    try:
        own, overrides = split(given.overrides, "launch")
        config = options.read(own, given.config_dir)
        job = make(arguments.job_words(given, overrides), config, datetime.datetime.now())
        text = render(config, job)
        if given.dry_run or isinstance(config, Torchrun):
            return messages.result(text.rstrip("\n"))
        return submit(config, job, text)
    except ValueError as error:
        return fail(error)


def render(config: Torchrun | Slurm | Kubernetes, job: Job) -> str:
    if isinstance(config, Slurm):
        return slurm.script(config, job, Path.cwd())
    if isinstance(config, Kubernetes):
        return yaml.safe_dump_all(kubernetes.manifests(config, job), sort_keys=False, width=120)
    return shlex.join(command(config, job)) + "\n"


def command(config: Torchrun, job: Job) -> list[str]:
    """The same on every machine: who holds the rendezvous, and who is which rank, torchrun finds out."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={config.endpoint}", f"--rdzv-id={job.name}"]
    variables = [f"{name}={value}" for name, value in environment(config).items()]
    restarts = f"--max-restarts={config.max_restarts}"
    return ["env", *variables, *torchrun(config), restarts, *meeting, *worker(job.arguments)]


def submit(config: Slurm | Kubernetes, job: Job, text: str) -> int:
    if isinstance(config, Kubernetes):
        return call(["kubectl", "apply", "--filename=-"], text)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)  # Slurm opens the output there before anything runs
        write_text(job.folder / SCRIPT, text)
    except OSError as error:
        raise UserError(f"run folder {job.folder} cannot be made ({error.strerror}): set run.root or run.dir") from None
    code = call(["sbatch", str(job.folder / SCRIPT)])
    note(f"Run folder: {job.folder}")
    return code


def call(program: list[str], text: str = "") -> int:
    """Runs a scheduler's own program, which prints its own errors."""
    if shutil.which(program[0]) is None:
        raise UserError(f"{program[0]} is not on this machine: run this where it is, or --dry-run to see the job")
    with Children() as children:
        code = children.call(program, text)
    return code if children.stopped else int(code > 0)
