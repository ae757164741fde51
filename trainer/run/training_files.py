"""Which files a run trains on: the part of its state that lies outside the run folder.

A run from scratch takes all files that ``data.train`` names, or (``data.new_since``) those that earlier runs have not
seen. Each checkpoint keeps the list, as ``data.json``. A resumed run compares it with what is there now: a file
that is missing or has changed would change the order of rows, and is an error; files added since wait for the end of
the pass over the data. A run that stopped exactly there takes all that is there into its next one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.messages import note
from data_loaders.schema import Layout
from trainer.checkpoint import FACTS, JOB_FACTS, AnyPath, committed, of_run, parse, place_of, read_json
from trainer.config.job import TrainConfig
from trainer.run import build
from trainer.runtime.checked_json import Mapped, Whole
from trainer.runtime.distributed import Ranks, from_first
from trainer.runtime.progress import Progress

DATA = "data.json"
SAVED_DATA = {"fingerprint": str, "first_epoch": Whole(), "manifest": dict, "before": Mapped(str)}
SAVED_FACTS = {**JOB_FACTS, "identity": {"batch_size": Whole(1)}}
SHOWN = 3


@dataclass(frozen=True)
class TrainingFiles:
    """``manifest``: the files, in reading order. ``first_epoch``: the first epoch that reads exactly these. ``before``:
    footers of the files that the runs before this one have seen, by path relative to ``data.root``."""

    manifest: Manifest
    first_epoch: int
    before: Mapping[str, str]

    def dumps(self) -> str:
        facts = {
            "fingerprint": self.manifest.fingerprint,
            "first_epoch": self.first_epoch,
            "manifest": self.manifest.to_dict(),
            "before": dict(self.before),
        }
        return json.dumps(facts, separators=(",", ":")) + "\n"

    @property
    def seen(self) -> dict[str, str]:
        """All files that are old to a run after this one, as ``before``."""
        return {**self.before, **{self.manifest.relative(file): file.footer for file in self.manifest.files}}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself: which job it is of, how far that had come, and on which files."""

    path: AnyPath
    identity: Mapping[str, Any]
    progress: Progress
    inputs: TrainingFiles

    @classmethod
    def at(cls, path: AnyPath, root: str) -> "Saved":
        """Reads a committed checkpoint's own record, not its tensors. Raises ``UserError`` where it is damaged, or there
        is none."""
        facts, data = read_json(path, FACTS, SAVED_FACTS), read_json(path, DATA, SAVED_DATA)
        progress = Progress()
        progress.load_state_dict(facts["progress"])
        try:
            manifest = Manifest.from_dict(data["manifest"], root)
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {DATA} lists no data files ({error})") from None
        if manifest.fingerprint != data["fingerprint"] or progress.epoch_step > manifest.num_rows:
            raise UserError(f"checkpoint {path}: {DATA} contradicts itself or {FACTS}: another program wrote it")
        return cls(path, facts["identity"], progress, TrainingFiles(manifest, data["first_epoch"], data["before"]))

    @property
    def rows_left(self) -> int:
        """Rows of the current epoch still to train; 0 at its end."""
        return max(0, self.inputs.manifest.num_rows - self.progress.epoch_step * self.identity["batch_size"])


def choose(config: TrainConfig, layout: Layout, saved: Saved | None, ranks: Ranks) -> TrainingFiles:
    """The files to train on from here, the same on all ranks; rank 0 says what is left out. ``saved`` is the checkpoint to
    resume from. Raises ``UserError`` on every rank where the data do not fit it, or ``data.new_since``."""
    present = build.scan(config.data, "train", layout)
    if saved is not None:
        progress = saved.progress
        more = progress.epoch + 1 < config.epochs and (config.steps is None or progress.step < config.steps)
        inputs, notes = continued(present, saved, may_begin_epoch=more and not saved.rows_left)
    elif config.data.new_since is not None:
        new_since, root = config.data.new_since, config.data.root
        inputs, notes = incremental(present, from_first(lambda: Saved.at(find(new_since), root)))
    else:
        inputs, notes = TrainingFiles(present, 0, {}), []
    if ranks.is_first:
        for line in [*notes, *_partly_shuffled(inputs.manifest, config.data.stream.shuffle)]:
            note(line)
    return inputs


def _partly_shuffled(manifest: Manifest, shuffle: bool) -> list[str]:
    """A note where some files are shuffled by ``prepare`` and others are not."""
    unmarked = [manifest.relative(file) for file in manifest.files if not file.shuffled]
    if not shuffle or not 0 < len(unmarked) < len(manifest.files):
        return []
    return [
        f"{len(unmarked)} of {len(manifest.files)} file(s) were not shuffled by prepare ({_some(unmarked)}): all rows are "
        "shuffled within data.stream.shuffle_rows, as if none was"
    ]


def continued(present: Manifest, saved: Saved, *, may_begin_epoch: bool) -> tuple[TrainingFiles, list[str]]:
    """The checkpoint's own files in its own order; or, where there are more by now and ``may_begin_epoch``, all that are
    there. And notes about it. Raises ``UserError`` where one of its files is missing or has changed."""
    inputs, where = saved.inputs, f"checkpoint {saved.path}"
    present = present.select(_unseen(present, inputs.before, where))
    changes = present.changes(inputs.manifest)
    found = {"missing, or no longer named by data.train": changes.missing, "changed": changes.changed}
    if any(found.values()):
        shown = "; ".join(f"{len(paths)} {what}: {_some(paths)}" for what, paths in found.items() if paths)
        raise UserError(
            f"{where} was trained on files under '{present.root}' that have changed or are missing ({shown}): restore them, "
            "or start anew with another run.dir"
        )
    added = f"{len(changes.added)} file(s) were added to the data since {where}: {_some(changes.added)}."
    if changes.added and may_begin_epoch:
        return TrainingFiles(present, saved.progress.epoch + 1, inputs.before), [
            f"{added} The epoch that begins includes them."
        ]
    notes = [f"{added} This pass over the data does not include them."] if changes.added else []
    return replace(inputs, manifest=_in_order_of(present, inputs.manifest)), notes


def incremental(present: Manifest, saved: Saved) -> tuple[TrainingFiles, list[str]]:
    """The files that the run of ``saved`` and those before it have not seen, and notes about it. Raises
    ``UserError`` where there is none, or one that they have seen has changed."""
    where = f"data.new_since={saved.path}"
    before = saved.inputs.seen
    new = _unseen(present, before, where)
    if not new:
        raise UserError(
            f"{where}: that run, or one before it, has seen all {len(present.files)} file(s) of data.train; add new ones, "
            "or name an earlier checkpoint"
        )
    old = len(present.files) - len(new)
    notes = [f"{len(new)} file(s) are new since {saved.path}: {_some(new)}. {old} file(s) seen before are left out."]
    if saved.progress.epoch == saved.inputs.first_epoch and saved.rows_left:
        notes.append(
            f"warning: {saved.path} stands within the first pass over its files: {saved.rows_left:,} of their rows are "
            "trained neither there nor here, unless that run is resumed"
        )
    return TrainingFiles(present.select(new), 0, before), notes


def find(new_since: str) -> AnyPath:
    """The checkpoint that a path or URI names, or the newest one of the run that it names."""
    path = parse(new_since)
    if place_of(path).is_checkpoint(path):
        return path
    found = committed(of_run(path))
    if not found:
        raise UserError(
            f"data.new_since={new_since} is neither a checkpoint nor the folder of a run that has saved one: correct the "
            "path, or leave it out to train on all files"
        )
    return found[0]


def _in_order_of(present: Manifest, saved: Manifest) -> Manifest:
    """The files of ``saved``, in its order, as they are now."""
    paths = [saved.relative(file) for file in saved.files]
    own = present.select(paths)
    files = {own.relative(file): file for file in own.files}
    return replace(own, files=tuple(files[path] for path in paths))


def _unseen(present: Manifest, before: Mapping[str, str], where: str) -> list[str]:
    """The relative paths that are not among ``before``."""
    footers = {present.relative(file): file.footer for file in present.files}
    changed = [path for path, footer in footers.items() if before.get(path, footer) != footer]
    if changed:
        raise UserError(
            f"{where}: {len(changed)} file(s) that an earlier run has seen have changed ({_some(changed)} "
            f"under '{present.root}'): restore them, and write new rows to files of their own"
        )
    return [path for path in footers if path not in before]


def _some(paths: Iterable[str]) -> str:
    paths = list(paths)
    return ", ".join(f"'{path}'" for path in paths[:SHOWN]) + (", …" if len(paths) > SHOWN else "")
