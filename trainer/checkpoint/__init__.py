"""Checkpoints: their files (``format``), the folder they lie in (``folder``), on disks (``local``) and in object stores
(``store``; ``place`` chooses), saving and loading them (``saving``).

``Checkpoints`` is imported from ``saving``: it brings TorchRec along, without which a checkpoint opens sooner.
"""

from trainer.checkpoint.folder import (
    BEST,
    clean,
    committed,
    newest,
    prune,
    read_best,
    remove,
    step_of,
    write_best,
)
from trainer.checkpoint.format import Reader, Written, build_index, verify, write_commit_files, write_pieces
from trainer.checkpoint.manifest import (
    FACTS,
    INDEX,
    JOB_FACTS,
    MANIFEST,
    check_identity,
    read_facts,
    read_json,
    read_manifest,
    read_text,
)
from trainer.checkpoint.paths import AnyPath
from trainer.checkpoint.place import chosen, note, of_run, parse, place_of

__all__ = [
    "AnyPath",
    "BEST",
    "FACTS",
    "INDEX",
    "JOB_FACTS",
    "MANIFEST",
    "Reader",
    "Written",
    "build_index",
    "check_identity",
    "chosen",
    "clean",
    "committed",
    "newest",
    "note",
    "of_run",
    "parse",
    "place_of",
    "prune",
    "read_best",
    "read_facts",
    "read_json",
    "read_manifest",
    "read_text",
    "remove",
    "step_of",
    "verify",
    "write_best",
    "write_commit_files",
    "write_pieces",
]
