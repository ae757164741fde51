"""A Slurm of two nodes on this machine, for as long as a test runs: Debian's slurm-wlm and munge, with configuration, key and
spool in a folder of the test's, and daemons in a process namespace of their own, which ends with all that is in it."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import warm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "unshare")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
# cred_expire: for as long a requeued job waits, at least. KillWait: from a preemption to the end, for the last checkpoint.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=patient Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
DAEMONS = """\
munged --force --foreground --socket=munge.socket --key-file=key --log-file=munged.log --pid-file=munged.pid --seed-file=seed &
until [ -S munge.socket ]; do sleep 0.1; done
slurmctld -D -c & slurmd -D -N {host} & slurmd -D -N {host}-b & wait
"""


@dataclass(frozen=True)
class Cluster:
    """``environment``: in which Slurm's commands find it."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands answers."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=warm.PATIENCE)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if os.name != "posix" or os.getuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host(), None)
        return None
    return f"{host()} is no name that this machine resolves"


def host() -> str:
    return socket.gethostname().partition(".")[0]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Raises ``TimeoutError`` where it does not start, with the end of its logs."""
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host(), folder=folder, ports=free_ports(3)))
    cluster = Cluster(folder, {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")})
    with open(folder / "daemons.log", "wb") as log:
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", DAEMONS.format(host=host())],
            cwd=folder,
            env=cluster.environment,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    try:
        idle = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
        run = lambda: subprocess.run(idle, env=cluster.environment, capture_output=True, text=True).stdout.strip()  # noqa: E731
        until(lambda: run() == "2", 30, lambda: (folder / "daemons.log").read_text()[-2000:])
        yield cluster
    finally:
        process.kill()  # unshare's child, the namespace's first process, dies with it, and everything in it with that
        process.wait()


def until(true: Callable[[], object], seconds: float, why_not: Callable[[], str] = lambda: "") -> None:
    """Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {why_not()}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
