"""Checkpoints: tensors through torch.distributed.checkpoint, facts in JSON, a manifest of checksums, a rename as commit.

A checkpoint is written to ``checkpoints/.tmp-step-N-<hex>/`` and renamed to ``checkpoints/step-N/`` once every file is on
disk and listed in ``MANIFEST.json`` with its size and SHA-256. Only ``step-N`` folders whose manifest holds are loaded, so
a crash at any instant leaves the previous checkpoint the newest one.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainer.config import CheckpointConfig
from trainer.distributed import Ranks, from_first, on_all_ranks
from trainer.progress import Progress
from trainer.run_folder import write_json, write_text

MANIFEST = "MANIFEST.json"
FACTS = "state.json"
COMMITTED = re.compile(r"step-(\d+)")
OURS_TO_CLEAN = re.compile(r"\.(tmp|trash)-step-\d+-[0-9a-f]{8}")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Checkpoints:
    """Saves at its own cadence and loads the newest whole checkpoint of a folder.

    ``tensors`` are saved and loaded through DCP, sharded as they lie; ``identity`` is what must not change between
    saving and resuming (schema, model, batch size …), compared key by key on load; ``texts`` are further files of every
    checkpoint, by name. ``before_commit`` runs on every rank of a save: what a checkpoint vouches for and does not hold
    itself must be on disk when it returns; an ``OSError`` there fails the save.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        tensors: dict[str, Stateful],
        identity: dict[str, Any],
        ranks: Ranks,
        *,
        texts: Mapping[str, str] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.config, self.tensors, self.identity, self.ranks = folder, config, tensors, identity, ranks
        self.texts, self.before_commit = texts or {}, before_commit
        self._last_step = -1
        self._last_time = time.monotonic()

    def maybe_save(self, progress: Progress) -> None:
        """Saves when ``every_steps`` or ``every_minutes`` is due; rank 0's clock decides for all."""
        every, minutes = self.config.every_steps, self.config.every_minutes
        due = every is not None and progress.step % every == 0
        if (
            not due and minutes is not None and progress.step % 16 == 0
        ):  # the clock is asked rarely: it costs a broadcast
            due = from_first(lambda: time.monotonic() - self._last_time >= 60 * minutes)
        if due:
            self.save(progress)

    def save(self, progress: Progress) -> Path:
        """Writes ``step-N``; all ranks together. A ``step-N`` that this run neither wrote nor loaded is a damaged one that
        was passed over: it is replaced. Raises ``OSError`` on every rank when any rank could not write."""
        final = self.folder / f"step-{progress.step}"
        if self._last_step == progress.step:
            return final
        part = Path(from_first(lambda: str(_fresh(self.folder, "tmp", final.name))))
        self._agree(self._write_tensors(part), part)
        verdict = None
        if self.ranks.is_first:
            verdict = self._commit(part, final, progress)
        self._agree(verdict, part)
        self._last_step, self._last_time = progress.step, time.monotonic()
        return final

    def load(self, path: Path, progress: Progress | None = None) -> dict[str, Any]:
        """Loads a committed checkpoint in place, strictly both ways, and returns its facts.

        With ``progress`` the whole job goes on from it; without, only the parts in ``tensors`` are read (scoring).
        Raises ``ValueError`` when it is damaged, belongs to another model, schema or data, or its keys differ.
        """
        problem = from_first(lambda: verify(path))
        if problem:
            raise ValueError(f"checkpoint {path}: {problem}")
        facts = json.loads((path / FACTS).read_text())
        if progress is not None:
            check_identity(path, facts["identity"], self.identity)
        state = {name: stateful.state_dict() for name, stateful in self.tensors.items()}
        _check_keys(path, state, all_parts=progress is not None)
        dcp.load(state, checkpoint_id=str(path))
        for name, stateful in self.tensors.items():
            stateful.load_state_dict(state[name])
        if progress is not None:
            progress.load_state_dict(facts["progress"])
            self._last_step = progress.step
        return facts

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over and named on rank 0's stderr."""
        return from_first(lambda: newest(self.folder))

    def _write_tensors(self, part: Path) -> str | None:
        state = {name: stateful.state_dict() for name, stateful in self.tensors.items()}
        try:
            # One thread: with more, DCP's writer can report success after a failed write.
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part, thread_count=1, overwrite=False))
            self.before_commit()
        except CheckpointException as error:  # a BaseException, so `except Exception` would miss it
            return next((f"{type(e).__name__}: {e}" for e in (f[0] for f in error.failures.values())), str(error))
        except OSError as error:
            return str(error)
        return None

    def _commit(self, part: Path, final: Path, progress: Progress) -> str | None:
        try:
            write_json(part / FACTS, self._facts(progress))
            for name, text in self.texts.items():
                write_text(part / name, text)
            files = [path for path in sorted(part.iterdir()) if path.is_file()]
            write_json(part / MANIFEST, {path.name: _fingerprint(path) for path in files})
            for path in (*files, part / MANIFEST):
                fsync(path)
            fsync(part)
            if final.exists():
                _remove(final)
            os.rename(part, final)
            fsync(self.folder)
            self._prune()
        except OSError as error:
            return str(error)
        return None

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {"progress": progress.state_dict(), "identity": self.identity, "world_size": self.ranks.world_size}

    def _agree(self, error: str | None, part: Path) -> None:
        verdict = on_all_ranks(error)
        if verdict is None:
            return
        if self.ranks.is_first:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"checkpoint could not be written to {self.folder} ({verdict}); earlier checkpoints are untouched"
        )

    def _prune(self) -> None:
        for path in committed(self.folder)[self.config.keep :]:
            _remove(path)


def clean(folder: Path) -> None:
    """Removes what a crashed save left behind in ``folder``. Only the run that owns it may call this, on one rank."""
    for path in folder.iterdir():
        if OURS_TO_CLEAN.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def committed(folder: Path) -> list[Path]:
    """``step-N`` folders, newest first (links are not followed)."""
    found = [p for p in folder.glob("step-*") if COMMITTED.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; prints a line for every damaged one that it passes over."""
    for path in committed(folder):
        problem = verify(path)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is passed over: {problem}", flush=True)
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where nothing is: every file of the manifest, its size and SHA-256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}, which is not a plain file name"
            if _fingerprint(path / name) != expected:
                return f"{name} differs from {MANIFEST}: damaged or replaced"
        if not {FACTS, ".metadata"} <= set(manifest):
            return f"{MANIFEST} lists no {FACTS} or .metadata"
    except (OSError, ValueError, AttributeError) as error:
        return f"not a whole checkpoint ({error})"
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """``progress``, ``identity`` and ``world_size`` of a committed checkpoint. Raises ``ValueError`` as ``read_text``."""
    return json.loads(read_text(path, FACTS))


def read_text(path: Path, name: str) -> str:
    """One text file of a committed checkpoint, held against its manifest; tensors are not looked at. Raises
    ``ValueError`` where the checkpoint lacks it or it is damaged."""
    try:
        expected = json.loads((path / MANIFEST).read_text())
        if name not in expected:
            raise ValueError(
                f"checkpoint {path} has no {name}: another version of this program wrote it; start anew with another "
                "run.dir"
            )
        if _fingerprint(path / name) != expected[name]:
            raise ValueError(f"checkpoint {path}: {name} differs from {MANIFEST}: damaged or replaced")
        return (path / name).read_text()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error})") from None


def check_identity(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises ``ValueError``, with every difference, unless a job goes on as the one that saved ``path``."""
    current = json.loads(json.dumps(current))
    changed = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {_difference(saved.get(key), current.get(key))}" for key in changed)
        raise ValueError(
            f"checkpoint {path} belongs to another job ({shown}): restore these settings, or start anew with another "
            "run.dir"
        )


def _check_keys(path: Path, state: dict[str, dict[str, Any]], all_parts: bool) -> None:
    """DCP ignores what the program does not ask for: compare both ways."""
    saved = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    if not all_parts:
        saved = {key for key in saved if key.partition(".")[0] in state}
    wanted = {f"{name}.{key}" for name, part in state.items() for key in _flat_keys(part)}
    if saved != wanted:
        raise ValueError(
            f"checkpoint {path} does not fit the model: missing {sorted(wanted - saved)[:5]}, "
            f"unknown {sorted(saved - wanted)[:5]}"
        )


def _flat_keys(state: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in state.items():
        keys += _flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys


def _difference(saved: Any, current: Any, prefix: str = "") -> str:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
        return ", ".join(_difference(saved.get(key), current.get(key), f"{prefix}{key}.") for key in keys[:5])
    return f"{prefix.rstrip('.')} was {saved!r}, is {current!r}".strip()


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _fresh(folder: Path, prefix: str, name: str) -> Path:
    return folder / f".{prefix}-{name}-{secrets.token_hex(4)}"


def _remove(path: Path) -> None:
    """Renamed first, so that no half of a checkpoint is ever seen under its name."""
    trash = _fresh(path.parent, "trash", path.name)
    os.rename(path, trash)
    shutil.rmtree(trash)


def fsync(path: Path) -> None:
    """Returns once a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
