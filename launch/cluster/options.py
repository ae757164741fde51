"""The launcher's part of the command line: `launch=NAME` (a file of conf/launch) and `launch.KEY=VALUE`; the rest: the job's."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_loaders.errors import UserError
from launch.options import load, merge

MISSING = "???"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLAIN = re.compile(r"[^\n\r\0]*")
# Of the batch script itself: an option that said otherwise would break requeueing, resuming or the rendezvous.
SLURM_OURS = (
    *("chdir", "cpus-per-task", "error", "gpus-per-node", "job-name", "nodes", "no-requeue", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "requeue", "signal"),
)
KUBERNETES_NAME = re.compile(r"[a-z]([-a-z0-9]{0,43}[a-z0-9])?")  # pods are called <name>-node-0-<index>-<5 letters>


@dataclass
class Nodes:
    """What every kind of job has."""

    kind: str = MISSING
    """``torchrun``, ``slurm`` or ``kubernetes``; set by the file that ``launch=`` names."""
    name: str | None = None
    """Name of the job; by default ``<run.name>-<date-time>``."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 8
    """GPUs of a machine; 0 is a job on CPUs."""
    nproc_per_node: int | None = None
    """Ranks of a machine; by default ``gpus_per_node``."""
    cpus_per_node: int | None = None
    """Cores of a machine, shared by the threads of its ranks."""
    max_restarts: int = 0
    """Restarts of all ranks after a crash, from the newest checkpoint."""
    grace: int = 120
    """Seconds from a request to stop until ranks are killed, for a last checkpoint."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks."""
    python: str | None = None
    """Python on the machines; by default this one, in a container ``python``."""

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "nproc_per_node": 1, "cpus_per_node": 1, "max_restarts": 0, "grace": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UserError(f"launch.{name} is {value}: give a number from {smallest}")
        if self.nproc_per_node is None and not self.gpus_per_node:
            raise UserError(
                "launch.gpus_per_node is 0, so launch.nproc_per_node has no value: give the ranks a machine"
            )
        if self.nproc_per_node is not None and 0 < self.gpus_per_node < self.nproc_per_node:
            raise UserError(
                f"launch.nproc_per_node is {self.nproc_per_node}, launch.gpus_per_node {self.gpus_per_node}: one rank a GPU, "
                "so give at most as many; or launch.gpus_per_node=0 and device=cpu"
            )
        for name in self.env:
            if not VARIABLE.fullmatch(name) or name.startswith("PET_"):
                raise UserError(
                    f"launch.env.{name} is no variable for the ranks: a plain name, not torchrun's own PET_…"
                )

    @property
    def ranks_per_node(self) -> int:
        return self.nproc_per_node or self.gpus_per_node


@dataclass
class Torchrun(Nodes):
    """Machines on which the command is started by hand or by another scheduler."""

    endpoint: str = MISSING
    """HOST:PORT of the rendezvous: one of the machines, by a name that all resolve, and a free port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(f"launch.endpoint is {self.endpoint!r}: give HOST:PORT, such as node1:29500")


@dataclass
class Slurm(Nodes):
    """A batch job."""

    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch without dashes, such as ``partition``, ``account``, ``time``; ``true`` for one without
    a value."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run first on the first node, such as ``ulimit -n 65536``."""
    port: int | None = None
    """Port of the rendezvous on the first node; by default from the job's number, 20000 to 29999."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None and not 0 < self.port < 1 << 16:
            raise UserError(f"launch.port is {self.port}: give a port from 1 to 65535, or leave it out")
        for name, value in self.options.items():
            if not re.fullmatch(r"[a-z][a-z-]+", name) or not PLAIN.fullmatch(value):
                raise UserError(
                    f"launch.options.{name} is no option of sbatch: give its long name, and a value of one line"
                )
            if name in SLURM_OURS:
                raise UserError(
                    f"launch.options.{name} is set by the script: see launch.name, nodes, gpus_per_node, cpus_per_node, grace"
                )


@dataclass
class Kubernetes(Nodes):
    """A TrainJob of Kubeflow."""

    image: str = MISSING
    """Image with this program installed."""
    namespace: str | None = None
    """Namespace; by default kubectl's."""
    runtime: str | None = None
    """ClusterTrainingRuntime to use; by default a TrainingRuntime of the job's own, which also restarts it."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Persistent volume claim -> mount point."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm."""
    memory: str | None = None
    """Memory of a machine."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variable -> ``secret/key``."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that the machines must have."""
    service_account: str | None = None
    """Service account of the pods; by default the namespace's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not KUBERNETES_NAME.fullmatch(self.name):
            raise UserError(
                f"launch.name is {self.name!r}: give a-z, 0-9 and '-', a letter first, 45 characters at most"
            )
        if self.runtime and self.max_restarts:
            raise UserError(
                "launch.max_restarts and launch.runtime: a runtime of the cluster's has restarts of its own"
            )
        for claim, path in self.volumes.items():
            if not path.startswith("/") or path == "/":
                raise UserError(f"launch.volumes.{claim} is {path!r}: give the absolute path where it is mounted")
        for name, value in self.secrets.items():
            if not VARIABLE.fullmatch(name) or not all(value.partition("/")):
                raise UserError(
                    f"launch.secrets.{name} is {value!r}: give SECRET/KEY, of a secret in the job's namespace"
                )


KINDS = {"torchrun": Torchrun, "slurm": Slurm, "kubernetes": Kubernetes}


def read(own: dict[str, str], config_dirs: Sequence[str]) -> Torchrun | Slurm | Kubernetes:
    """The file that ``launch=`` names, and each ``launch.KEY``. Raises ``UserError``."""
    if "launch" not in own:
        raise UserError(
            f"launch= is missing: {', '.join(KINDS)}, or a file of your own in DIR/launch with --config-dir DIR"
        )
    if "launch.kind" in own:
        raise UserError("launch.kind is what launch= chooses")
    tree = load("launch", own["launch"], config_dirs)
    kind = tree.get("kind")
    if kind not in KINDS:
        raise UserError(f"launch={own['launch']}: its kind is {kind!r}: choose {', '.join(KINDS)}")
    return merge("launch", tree, own, KINDS[kind])
