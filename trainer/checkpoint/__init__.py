"""Checkpoints: their files (``format``), the folder they lie in (``folder``), on disks (``local``) and in object stores
(``store``; ``place`` chooses); saving beside training (``saving``) and loading by all ranks (``loading``).

What needs a process group is imported from its own module: without it a checkpoint opens sooner.
"""

from trainer.checkpoint.folder import clean as clean
from trainer.checkpoint.folder import committed as committed
from trainer.checkpoint.folder import newest as newest
from trainer.checkpoint.folder import prune as prune
from trainer.checkpoint.folder import read_best as read_best
from trainer.checkpoint.folder import remove as remove
from trainer.checkpoint.folder import write_best as write_best
from trainer.checkpoint.format import Reader as Reader
from trainer.checkpoint.format import build_index as build_index
from trainer.checkpoint.format import verify as verify
from trainer.checkpoint.format import write_commit_files as write_commit_files
from trainer.checkpoint.format import write_pieces as write_pieces
from trainer.checkpoint.manifest import FACTS as FACTS
from trainer.checkpoint.manifest import JOB_FACTS as JOB_FACTS
from trainer.checkpoint.manifest import MANIFEST as MANIFEST
from trainer.checkpoint.manifest import check_identity as check_identity
from trainer.checkpoint.manifest import read_facts as read_facts
from trainer.checkpoint.manifest import read_json as read_json
from trainer.checkpoint.manifest import read_manifest as read_manifest
from trainer.checkpoint.manifest import read_text as read_text
from trainer.checkpoint.paths import AnyPath as AnyPath
from trainer.checkpoint.place import chosen as chosen
from trainer.checkpoint.place import note as note
from trainer.checkpoint.place import of_run as of_run
from trainer.checkpoint.place import parse as parse
from trainer.checkpoint.place import place_of as place_of
