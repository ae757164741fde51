"""The folder that runs and checkpoints go to, and the place that the data come from."""

import contextlib
import mmap
import os
import shutil
import time
import uuid
from pathlib import Path

from data_loaders.messages import one_line
from trainer.doctor.finding import Finding, at_least, failed, passed, warned

GIB = 2**30
CHUNK = 16 << 20  # bytes
MOST_BYTES = 1 << 30
SECONDS = 3.0
CLOCK_SECONDS = 5.0  # that a file server's clock may differ


def disk(folder: Path) -> list[Finding]:
    """Writes for up to ``SECONDS`` seconds as checkpoints are written, past the page cache."""
    remedy = f"name a folder that can be written (--folder), or mend its rights: ls -ld {folder}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        speed, skew = _write(path)
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return [failed("disk", f"{folder} cannot be written ({error.strerror or error})", remedy)]
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()
    slow = (
        "use a local NVMe disk for run.dir, or checkpoint.root on an object store; checkpoint.asynchronous=true helps"
    )
    room = "make room: two checkpoints, each of the tables and their optimizer state, must fit"
    return [
        at_least("disk speed", speed, 200, 0, f"{speed:,.0f} MB/s written to {folder}", slow),
        at_least("disk space", free, 10, 1, f"{free:,.1f} GiB free in {folder}", room),
        *([] if abs(skew) < CLOCK_SECONDS else [_skewed(folder, skew)]),
    ]


def data_root(root: str) -> list[Finding]:
    """A folder or a URI: whether it answers. (A large bucket is not listed.)"""
    from data_loaders.storage import Storage, is_uri, root_name  # here, as pyarrow may be broken

    try:
        name = root_name(root)
        Storage(root).stat(name)
        empty = not is_uri(name) and not any(Path(name).iterdir())
    except (OSError, ValueError) as error:
        remedy = "look at the path, its rights, the network and the credentials"
        return [failed("data.root", f"{root} cannot be read: {one_line(error, 300)}", remedy)]
    if empty:
        return [warned("data.root", f"{root} is empty", "put data there, or name another place (--data-root)")]
    return [passed("data.root", f"{root} can be read")]


def _write(path: Path) -> tuple[float, float]:
    """MB/s of a file of up to ``MOST_BYTES``, until it is on disk; and how far the file's own time is ahead of ours."""
    from trainer.checkpoint.direct_file import DirectFile  # here, as torch may be broken

    data = mmap.mmap(-1, CHUNK)  # aligned to pages
    data.write(os.urandom(CHUNK))  # no disk compresses it
    began = time.perf_counter()
    with DirectFile(path) as file:
        while file.size < MOST_BYTES and time.perf_counter() - began < SECONDS:
            file.write(memoryview(data))
        ahead = path.stat().st_mtime - time.time()
    return file.size / 1e6 / (time.perf_counter() - began), ahead


def _skewed(folder: Path, seconds: float) -> Finding:
    message = f"files in {folder} are stamped {abs(seconds):.0f} s {'after' if seconds > 0 else 'before'} this machine's clock"
    return warned("clock of the disk", message, "set both clocks right (chrony, systemd-timesyncd)")
