"""The answer to "where does the step go", as data and as a small table of milliseconds and per cent by rank."""

from collections.abc import Mapping
from typing import Any

from trainer.monitoring.slowdown import CAUSE

NAMES = {
    "input_wait": "input wait",
    "input_dist": "input dist",
    "lookup": "lookup",
    "dense_forward": "dense forward",
    "backward": "backward (dense)",
    "table_update": "table update",
    "optimizer": "optimizer",
    "comms": "comms",
    "other": "other, idle",
}
WIDTH = 20  # of a rank's column


def as_text(summary: Mapping[str, Any]) -> str:
    """``summary``: ``first_step``, ``last_step``, ``unprofiled_step_ms`` and ``slowed`` (or None) and, by rank, ``step_ms``
    and ``parts_ms``."""
    ranks: Mapping[str, Any] = summary["ranks"]
    slow, before = max(rank["step_ms"] for rank in ranks.values()), summary["unprofiled_step_ms"]
    lines = [f"Where a step goes, of steps {summary['first_step']} to {summary['last_step']}:"]
    lines.append(" " * 16 + "".join(f"{f'rank {rank}':>{WIDTH}}" for rank in ranks))
    for part, name in NAMES.items():
        shares = [_share(rank["parts_ms"][part], rank["step_ms"]) for rank in ranks.values()]
        lines.append(f"{name:16}{''.join(shares)}")
    lines.append(f"{'step':16}{''.join(_share(rank['step_ms'], rank['step_ms']) for rank in ranks.values())}")
    if before is not None:
        lines.append(f"A step took {slow:.1f} ms under the profiler, {before:.1f} ms before it.")
    if slowed := summary["slowed"]:
        lines.append(
            f"Steps slowed from {slowed['before_ms']:.1f} to {slowed['after_ms']:.1f} ms at step {slowed['step']}: {CAUSE}."
        )
    return "\n".join(lines) + "\n"


def _share(milliseconds: float, step_ms: float) -> str:
    return f"{f'{milliseconds:.2f} ms {milliseconds / step_ms:6.1%}':>{WIDTH}}"
