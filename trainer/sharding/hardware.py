"""Clusters by name: ``8xH100``, ``64xA100-40``, ``2x8xH200``, ``2xCPU`` or a YAML, and what their devices have.

Figures of ``GPUS`` are peaks, of the form that is joined by NVLink where there is one (SXM):

* memory: what PyTorch reports of a device ("total capacity" in its errors), less than what is sold: error correction
  and the driver keep some;
* memory_bandwidth, matmul (dense bf16; fp16 where a device has no bf16): NVIDIA's data sheets of A100 (1758950 r4: 312
  TFLOPS, 1,555 and 2,039 GB/s), H100 (1,979 TFLOPS with sparsity, 3.35 TB/s), H200 (1,979, 4.8 TB/s), DGX B200 (36 PFLOPS
  with sparsity and 64 TB/s for eight), L4 (242 with sparsity, 300 GB/s), L40S (362.05 dense, 864 GB/s), V100 (125, 900 GB/s),
  T4 (65, 320 GB/s). Sparsity doubles what is dense;
* within: one way, to the other GPUs of a machine, half of what the same sheets count both ways: NVLink 300 (V100), 600
  (A100), 900 (H100, H200), 1800 GB/s (B200); PCIe x16 32 (3.0, T4) or 64 GB/s (4.0, L4 and L40S);
* between: a GPU's share of its machine's network, and host memory, its share of that: DGX-1 V100, DGX A100 (both sizes),
  DGX H100, H200, B200 user guides; Amazon's g4dn.metal, g6.48xlarge and g6e.48xlarge for T4, L4 and L40S. What differs most
  from place to place: give your own in a YAML.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_loaders import safe_yaml
from data_loaders.errors import UserError
from data_loaders.schema import one_of

GIB = 2**30
GB = 1e9
MAX_RANKS = 4096
# What CUDA's context and NCCL's buffers take of a device before the first tensor (H100: 0.5 to 0.7).
CONTEXT = 0.6 * GIB
FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True)
class Hardware:
    """What one rank has: memory in bytes, bandwidths in bytes a second, one way, ``matmul`` in operations a second.

    ``host_memory`` is its share of the machine's. ``within`` and ``between`` machines are None where nobody knows (TorchRec
    then takes NVLink's and 100 Gb/s), as is ``memory_bandwidth``."""

    name: str
    device: str
    memory: float
    host_memory: float
    memory_bandwidth: float | None = None
    within: float | None = None
    between: float | None = None
    matmul: float | None = None
    bf16: bool = True
    capability: tuple[int, int] | None = None  # CUDA's "compute capability"; None where nobody knows


@dataclass(frozen=True)
class Cluster:
    """``machines`` of ``local`` ranks each."""

    hardware: Hardware
    machines: int
    local: int

    @property
    def ranks(self) -> int:
        return self.machines * self.local

    def __str__(self) -> str:
        machines = f"{self.machines}x" if self.machines > 1 else ""
        return f"{machines}{self.local}x{self.hardware.name}"


def _gpu(
    name: str,
    gib: float,
    host_gib: float,
    gb_per_s: float,
    within: float,
    between: float,
    tflops: float,
    capability: tuple[int, int],
) -> Hardware:
    memory, host, bf16 = gib * GIB - CONTEXT, host_gib * GIB, capability >= FIRST_WITH_BF16
    bandwidths = gb_per_s * GB, within * GB, between * GB
    return Hardware(name, "cuda", memory, host, *bandwidths, tflops * 1e12, bf16, capability)


# FBGEMM has no code for V100 and T4 (trainer.runtime.gpus): a plan for them says so, and shows what their memory would hold.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 39.4, 128, 1555, 300, 25, 312, (8, 0)),
        _gpu("A100-80", 79.2, 256, 2039, 300, 25, 312, (8, 0)),
        _gpu("H100", 79.2, 256, 3350, 450, 50, 989, (9, 0)),
        _gpu("H200", 139.7, 256, 4800, 450, 50, 989, (9, 0)),
        _gpu("B200", 178.3, 256, 8000, 900, 50, 2250, (10, 0)),
        _gpu("L4", 22.0, 96, 300, 32, 1.56, 121, (8, 9)),
        _gpu("L40S", 44.4, 192, 864, 32, 6.25, 362, (8, 9)),
        _gpu("V100", 31.7, 64, 900, 150, 6.25, 125, (7, 0)),
        _gpu("T4", 14.6, 48, 320, 16, 1.56, 65, (7, 5)),
    )
}
# Of a file: figures, in what they are given; how many there are.
SCALES = {
    "memory_gib": GIB,
    "host_memory_gib": GIB,
    "memory_bandwidth": GB,
    "within": GB,
    "between": GB,
    "matmul": 1e12,
}
COUNTS = ("machines", "gpus_per_machine")
PER_MACHINE = 8  # of what a name says nothing of: more GPUs than that are several machines
# Another form of the same chip, or a part of one: other memory, other links.
OTHER_FORM = re.compile(r"PCIE?|NVL|MIG|GH200|GB200", re.IGNORECASE)


def recognised(device_name: str, total_memory: float) -> Hardware | None:
    """The GPU of ``torch.cuda.get_device_name``, distinguished from others of its name by its memory; None for one that is not in
    the table, or in another form."""
    if OTHER_FORM.search(device_name):
        return None
    words = re.split(r"[^A-Za-z0-9]+", device_name.upper())
    same = [gpu for name, gpu in GPUS.items() if name.split("-")[0] in words]
    near = [gpu for gpu in same if abs(gpu.memory + CONTEXT - total_memory) < 0.1 * total_memory]
    return near[0] if near else None


def parse_cluster(text: str, cpu: Hardware) -> Cluster:
    """``8xH100``: 8 GPUs, in machines of 8; ``2x4xH100``: 2 machines of 4; ``H100``: one; a path: see ``from_yaml``.
    ``cpu`` is what ``2xCPU`` means: a rank of this machine. Raises ``UserError``."""
    if text.endswith((".yaml", ".yml")):
        return from_yaml(Path(text), cpu)
    found = re.fullmatch(r"(?:(-?\d+)x)?(?:(-?\d+)x)?([A-Za-z][\w-]*)", text)
    if found is None:
        raise UserError(
            f"topology is '{text}': write <ranks>x<GPU> (8xH100), <machines>x<ranks>x<GPU> (2x8xH200), or a file .yaml"
        )
    first, second, name = found.groups()
    hardware = _by_name(name, cpu)
    if second is not None:
        return cluster(hardware, int(first), int(second))
    return of_ranks(hardware, int(first or 1))


def from_yaml(path: Path, cpu: Hardware) -> Cluster:
    """``gpu: H100`` (a name of the table, or a new one with all figures), ``machines``, ``gpus_per_machine``, and figures
    to replace: ``memory_gib`` and ``host_memory_gib`` of a GPU, ``memory_bandwidth``, ``within``, ``between`` in GB/s,
    ``matmul`` in TFLOPS, ``bf16``. Raises ``UserError``."""
    given = _read(path)
    figures: dict[str, Any] = {
        key.removesuffix("_gib"): _figure(given[key], f"topology={path}: {key}") * scale
        for key, scale in SCALES.items()
        if key in given
    }
    if "bf16" in given:
        figures["bf16"] = bool(given["bf16"])
    counts = [_figure(given.get(key, 1), f"topology={path}: {key}") for key in COUNTS]
    if counts != [int(count) for count in counts]:
        raise UserError(f"topology={path}: {' and '.join(COUNTS)} are {counts}: give whole numbers")
    return cluster(replace(_named_in(given, path, cpu), **figures), *map(int, counts))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"topology={path}: there is no such file; write {', '.join(GPUS)} with a number, such as 8xH100"
        )
    given = safe_yaml.parse(safe_yaml.read_text(path), f"topology={path}")
    if not isinstance(given, dict):
        raise UserError(f"topology={path}: expected a map, such as 'gpu: H100' and 'gpus_per_machine: 8'")
    for key in given:
        one_of(key, ("gpu", *COUNTS, "bf16", *SCALES), f"topology={path}: key")
    return given


def _named_in(given: dict[str, Any], path: Path, cpu: Hardware) -> Hardware:
    """The GPU of a file, before its figures are replaced."""
    name = str(given.get("gpu", ""))
    missing = [key for key in SCALES if key not in given]
    known = name.upper() in ("CPU", *map(str.upper, GPUS))
    if known or not name or len(missing) == len(SCALES):
        return _by_name(name, cpu)
    if missing:
        raise UserError(f"topology={path}: gpu '{name}' is in no table: give {', '.join(missing)} as well")
    return Hardware(name, "cuda", 0, 0)


def cluster(hardware: Hardware, machines: int, local: int) -> Cluster:
    if machines < 1 or local < 1 or machines * local > MAX_RANKS:
        raise UserError(
            f"topology: {machines} machine(s) of {local} {hardware.name} are {machines * local} ranks: give at least one "
            f"machine with one, and at most {MAX_RANKS:,} in all"
        )
    return Cluster(hardware, machines, local)


def of_ranks(hardware: Hardware, ranks: int, per_machine: int = PER_MACHINE) -> Cluster:
    """So many ranks in as few full machines as can be. Raises ``UserError`` for a number that leaves one half empty."""
    if ranks <= per_machine or hardware.device == "cpu":
        return cluster(hardware, 1, ranks)
    if ranks % per_machine:
        raise UserError(
            f"topology: {ranks}x{hardware.name} do not fill machines of {per_machine}: give a multiple of {per_machine}, or "
            f"<machines>x<GPUs of one>x{hardware.name}"
        )
    return cluster(hardware, ranks // per_machine, per_machine)


def _by_name(name: str, cpu: Hardware) -> Hardware:
    known = {key.upper(): gpu for key, gpu in GPUS.items()} | {"CPU": cpu}
    if name.upper() not in known:
        one_of(name, (*GPUS, "CPU"), "topology: GPU")
    return known[name.upper()]


def _figure(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"{where} is {value}: give a positive number")
    return value
