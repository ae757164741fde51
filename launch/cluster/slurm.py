"""A batch script for Slurm: one torchrun a node; preempted or at its time limit, it saves, is queued again and resumes.

Who requeues: Slurm, where it ends the job at once (`scontrol requeue`, PreemptMode=REQUEUE, a failed node). Where it only sends
SIGTERM and lets the job run on, as shortly before the time limit (--signal) and in a partition's GraceTime, a job that
ends by itself would count as over: there the script asks for it. After `scancel` nobody does.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.cluster.job import Job, environment, torchrun, worker
from launch.cluster.options import Slurm
from trainer.runtime.run_folder import STATUS

# Each node is known by the name Slurm has for it, whatever it calls itself; the first one holds the rendezvous.
NODE = 'export PET_LOCAL_ADDR=$SLURMD_NODENAME PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)); exec "$@"'

TEMPLATE = """\
#!/bin/bash
{options}

{exports}
{setup}
start=$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
endpoint=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}
command=(
  {torchrun}
  --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$start"
  {worker}
)

trap : TERM  # the ranks save and end; this shell waits for them
srun {srun} bash -c {node} torchrun "${{command[@]}}"
code=$?

# Asked to stop while the job itself runs on: Slurm will not requeue it.
status={status}
job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
saved() {{ grep -qsF "\\"run_id\\": \\"$start\\"" "$status" && grep -qsF '"state": "preempted"' "$status"; }}
if [[ $job == *" JobState=RUNNING "* ]] && {{ [[ $job =~ PreemptTime=[0-9] ]] || saved; }}; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def script(config: Slurm, job: Job, cwd: Path) -> str:
    """The batch script, to be submitted from anywhere; it runs in ``cwd``."""
    return TEMPLATE.format(
        options="\n".join(options(config, job, cwd)),
        exports="\n".join(exports(environment(config))),
        setup="".join(f"{line}\n" for line in config.setup),
        port=config.port or "$((20000 + SLURM_JOB_ID % 10000))",
        torchrun=shlex.join([*torchrun(config), f"--max-restarts={config.max_restarts}"]),
        worker="\n  ".join(shlex.quote(argument) for argument in worker(job.arguments)),
        srun=shlex.join(srun(config)),
        node=shlex.quote(NODE),
        status=shlex.quote(str(job.folder / STATUS)),
    )


def options(config: Slurm, job: Job, cwd: Path) -> Iterator[str]:
    ours = {
        "job-name": job.name,
        "nodes": str(config.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(config.gpus_per_node)} if config.gpus_per_node else {}),
        **({"cpus-per-task": str(config.cpus_per_node)} if config.cpus_per_node else {}),
        "chdir": str(cwd),
        "output": str(job.folder).replace("%", "%%") + "/slurm-%j.out",
        "open-mode": "append",  # a job that starts again appends to its output
        "requeue": "true",
        "signal": f"TERM@{config.grace}",  # before the time limit, to the ranks
    }
    for name, value in {**ours, **config.options}.items():
        yield f"#SBATCH --{name}" + ("" if value == "true" else f"={shlex.quote(value)}")


def exports(variables: Mapping[str, str]) -> Iterator[str]:
    for name, value in variables.items():
        yield f"export {name}={shlex.quote(value)}"


def srun(config: Slurm) -> list[str]:
    """A task that ends first must not end the others, whose ranks may be saving."""
    cpus = (
        [f"--cpus-per-task={config.cpus_per_node}"] if config.cpus_per_node else []
    )  # not inherited since Slurm 22.05
    return ["--ntasks-per-node=1", *cpus, "--kill-on-bad-exit=0", f"--wait={config.grace}"]
