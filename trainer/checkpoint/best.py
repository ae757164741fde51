"""Which checkpoint is the best one."""

from collections.abc import Mapping
from typing import Any

from data_loaders.messages import warn
from trainer.checkpoint.folder import BEST, read_best, write_best
from trainer.checkpoint.paths import AnyPath
from trainer.config.checks import improvement
from trainer.runtime.distributed import Ranks, from_first


class Best:
    """The best evaluation so far by ``metric``, such as ``valid.auc`` (None: none is looked for), and the note in ``folder``
    that names its checkpoint. All ranks call it at the same steps."""

    def __init__(self, folder: AnyPath, metric: str | None, ranks: Ranks) -> None:
        self._folder, self._metric, self._ranks = folder, metric, ranks
        self._known = from_first(lambda: read_best(folder))

    def is_improved_by(self, step: int, split: str, metrics: Mapping[str, Any]) -> bool:
        """Whether the evaluation of ``split`` at ``step`` is the best one from here on."""
        where, _, name = (self._metric or "").rpartition(".")
        value, known = metrics.get(name), self._known
        if self._metric is None or where != split or value is None:
            return False
        if (
            known is not None
            and known["metric"] == self._metric
            and improvement(self._metric, value, known["value"]) <= 0
        ):
            return False
        self._known = {"step": step, "metric": self._metric, "value": value}
        return True

    def committed(self, step: int) -> None:
        """The checkpoint of ``step`` is there: if that is the best one, the note names it."""
        if self._known is None or self._known["step"] != step:
            return
        known = self._known
        try:
            from_first(lambda: write_best(self._folder, known))
        except OSError as error:  # on all ranks alike
            if self._ranks.is_first:
                warn(f"{self._folder / BEST} could not be written ({error})")
