"""A version in memory, known to score as the process that exported it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loaders.errors import UserError
from trainer.serve.artifact import LOGIT, Artifact
from trainer.serve.scorer import Scorer


@dataclass(frozen=True)
class Opened:
    artifact: Artifact
    scorer: Scorer


def open_checked(path: Path, *, hashes: bool) -> Opened:
    """Raises ``UserError`` where the version is damaged (with ``hashes`` every byte is looked at, which also brings the tables
    into memory), or its golden rows get other logits than at export."""
    artifact = Artifact(path, hashes=hashes)
    scorer = Scorer.open(artifact)
    golden = artifact.golden()
    expected = golden.column(LOGIT).to_numpy()
    found = scorer.logits_of_rows(golden.drop_columns([LOGIT]))
    off = np.abs(found - expected)[~np.isnan(expected)]
    most = artifact.serving["tolerance"]
    if (np.isnan(found) != np.isnan(expected)).any() or (len(off) and not off.max() <= most):
        raise UserError(
            f"export {path}: golden rows get logits up to {off.max(initial=0.0):.3g} away from those at export, more than "
            f"{most:g}: export the run again with the program that serves it"
        )
    return Opened(artifact, scorer)
