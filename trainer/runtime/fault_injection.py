"""Faults on purpose: the one hook through which tests break a running job at a chosen rank, step and place.

``TRAINER_FAULTS="rank=1,step=3,phase=before_rename,action=kill9;…"``, read once, when this module is imported. A rule without
``rank``, ``step`` or ``attempt`` (the number of restarts by the launcher) acts on all of them. Without the variable the
hook costs a call and a look at an empty list.

Phases: ``build`` (before the model is sharded), ``step_begin``, ``forward`` (before the guard's collective), ``evaluation``
(before what is held out is scored at the end), ``before_snapshot``, ``during_write``,
``before_manifest``, ``before_rename``, ``before_fsync``, ``during_prune``, ``reader`` (before a batch is handed to the
pipeline). Actions: ``kill9``; ``exit=CODE``; ``raise``; ``sleep=SECONDS``; ``wait=PATH`` (until that file exists);
``enospc``; ``stop`` (SIGTERM to itself); ``nan``, for the caller to carry out.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

from data_loaders.errors import UserError
from trainer.runtime.distributed import identity, launch_id, planned_faults

PHASES = (
    "build",
    "step_begin",
    "forward",
    "evaluation",
    "before_snapshot",
    "during_write",
    "before_manifest",
    "before_rename",
    "before_fsync",
    "during_prune",
    "reader",
)
ACTIONS = ("kill9", "exit", "raise", "sleep", "wait", "enospc", "stop", "nan")


@dataclass(frozen=True)
class Rule:
    """What happens (``action``, with ``argument`` where it takes one) and where; None: everywhere."""

    phase: str
    action: str
    argument: str
    rank: int | None
    step: int | None
    attempt: int | None

    def matches(self, phase: str, step: int | None, rank: int) -> bool:
        return (
            phase == self.phase
            and self.rank in (None, rank)
            and self.step in (None, step)
            and self.attempt in (None, launch_id()[1])
        )


def parse(text: str) -> list[Rule]:
    """Raises ``UserError`` for what is not a rule."""
    return [_rule(part.strip()) for part in text.split(";") if part.strip()]


def at(phase: str, *, step: int | None = None, rank: int | None = None) -> bool:
    """Does what the rules say of this place (``rank``: this process's by default). Whether the caller should make its loss
    NaN. Raises ``RuntimeError`` (``raise``) or ``OSError`` (``enospc``), or does not return."""
    if not RULES:
        return False
    here = identity()[0] if rank is None else rank
    return any(_act(rule, step) for rule in RULES if rule.matches(phase, step, here))


def _rule(part: str) -> Rule:
    pairs = dict(item.strip().partition("=")[::2] for item in part.split(","))
    action, _, argument = pairs.pop("action", "").partition("=")
    phase = pairs.pop("phase", "")
    if phase not in PHASES or action not in ACTIONS or not set(pairs) <= {"rank", "step", "attempt"}:
        raise UserError(
            f"TRAINER_FAULTS: '{part}' is no rule: write rank=N,step=N,attempt=N,phase=PHASE,action=ACTION with a phase of "
            f"{', '.join(PHASES)} and an action of {', '.join(ACTIONS)}; rank, step and attempt may be left out"
        )
    rank, step, attempt = (int(pairs[name]) if name in pairs else None for name in ("rank", "step", "attempt"))
    return Rule(phase, action, argument or "1", rank, step, attempt)


def _act(rule: Rule, step: int | None) -> bool:
    where = f"fault injected at {rule.phase}, step {step}"
    match rule.action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(int(rule.argument))
        case "raise":
            raise RuntimeError(where)
        case "sleep":
            time.sleep(float(rule.argument))
        case "wait":
            while not os.path.exists(rule.argument):
                time.sleep(0.01)
        case "enospc":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({where})")
        case "stop":
            os.kill(os.getpid(), signal.SIGTERM)
    return rule.action == "nan"


RULES = parse(planned_faults())
