"""Memory, shared memory, limits, cores and clock of this machine, or of the container it is."""

import ctypes
import datetime
import os
import resource
import shutil
from pathlib import Path

import psutil

from trainer import kernels
from trainer.doctor.finding import Finding, at_least, failed, passed, warned

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def memory(cgroup: Path = CGROUP) -> list[Finding]:
    """What is free: of the machine, or of the container's share where that is less."""
    free, limit = psutil.virtual_memory().available, _cgroup_bytes(cgroup, "memory.max")
    where = ""
    if limit is not None:
        used = _cgroup_bytes(cgroup, "memory.current") or 0
        free, where = min(free, max(limit - used, 0)), f" (the container's limit is {limit / GIB:.1f} GiB)"
    remedy = "end other programs, or ask for more memory: a rank takes 1 GiB and its share of the tables"
    return [at_least("memory", free / GIB, 4, 1, f"{free / GIB:.1f} GiB free{where}", remedy)]


def shared_memory(path: Path = Path("/dev/shm")) -> list[Finding]:
    """NCCL's ranks on one machine communicate through it."""
    remedy = "mount it larger: docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir of medium Memory there"
    if not path.is_dir():
        return [warned("shared memory", f"there is no {path}", remedy)]
    free = shutil.disk_usage(path).free / GIB
    return [at_least("shared memory", free, 1, 0, f"{free:.1f} GiB free in {path}", remedy)]


def open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = "any number of" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    value = float("inf") if soft == resource.RLIM_INFINITY else soft
    if hard == resource.RLIM_INFINITY or hard >= 65536:
        remedy = "ulimit -n 65536"
    else:
        remedy = (
            f"ulimit -n {hard}, or raise the hard limit (/etc/security/limits.conf; docker run --ulimit nofile=65536)"
        )
    return [at_least("open files", value, 4096, 256, f"{many} files may be open at once", remedy)]


def cores(cgroup: Path = CGROUP) -> list[Finding]:
    """Those that this process may use, or the container's share of them where that is less."""
    usable, where = float(len(os.sched_getaffinity(0))), f"of {os.cpu_count()} "
    quota = _quota(cgroup)
    if quota is not None and quota < usable:
        usable, where = quota, f"of {os.cpu_count()} by the container's quota "
    message = f"{usable:g} {where}cores may be used; load {os.getloadavg()[0]:.1f}"
    remedy = "give it at least 2 cores a rank: one reads and decodes, one trains"
    return [at_least("cores", usable, 2, 0, message, remedy)]


def clock() -> list[Finding]:
    """A wrong clock breaks signatures of object stores, names of run folders and the order of several machines' logs."""
    now = datetime.datetime.now(datetime.timezone.utc)
    remedy = "set it, and keep it by chrony or systemd-timesyncd (timedatectl set-ntp true)"
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    if now.timestamp() < newest - 86400:
        return [failed("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC is before this program was written", remedy)]
    state = _clock_state()
    message = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if state == UNSYNCHRONISED:
        return [warned("clock", f"{message}; the kernel says that nothing keeps it right", remedy)]
    return [passed("clock", f"{message}{'' if state is None else '; kept right'}")]


def compiled_kernels() -> list[Finding]:
    if kernels.available():
        return [passed("kernels", "compiled for this CPU")]
    remedy = "make setup, or python -m trainer.kernels, on this machine; both need g++ or clang++"
    return [warned("kernels", "none compiled for this CPU, which trains slower without them", remedy)]


def _clock_state() -> int | None:
    """What adjtimex(2) says; None where it may not be asked."""
    try:
        timex = ctypes.create_string_buffer(512)  # more than struct timex; modes 0: only ask
        state = ctypes.CDLL(None).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return state if state >= 0 else None


def _cgroup_bytes(cgroup: Path, name: str) -> int | None:
    """Of cgroup v2; None where there is no limit."""
    text = _read(cgroup / name)
    return int(text) if text is not None and text.isdigit() else None


def _quota(cgroup: Path) -> float | None:
    parts = (_read(cgroup / "cpu.max") or "max").split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
