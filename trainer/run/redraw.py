"""Tables that begin anew in each epoch, while the network stays (``redraw_tables``): MEDA ("Multi-Epoch Learning with
Data Augmentation for Deep Click-Through Rate Prediction", arXiv:2407.01607, its non-incremental form).

From the second epoch on, rows that have seen their few clicks fit these by heart. What a network learns of other rows of each id
does not overfit: an epoch with other initial values is like more data.
"""

from data_loaders.manifest import Manifest
from data_loaders.messages import note
from trainer.config.job import TrainConfig
from trainer.modules.embeddings import initial_values_of_tables
from trainer.run.build import Built
from trainer.run.table_files import fill_tables
from trainer.runtime.distributed import Ranks
from trainer.runtime.progress import Progress
from trainer.sharding.initialize import initialize_tables


class Redraw:
    """Draws all tables of ``built`` anew before the first step of each epoch but the first, so that what is evaluated and saved
    at the end of an epoch is what that has trained. A function of (seed, epoch) alone: a resumed run draws the same."""

    def __init__(
        self, built: Built, config: TrainConfig, trained: Manifest, ranks: Ranks, *, epoch_steps: int, total_steps: int
    ) -> None:
        self._built, self._config, self._trained, self._ranks = built, config, trained, ranks
        self._epoch_steps, self._total_steps = epoch_steps, total_steps

    def is_due(self, progress: Progress) -> bool:
        """Before the step after ``progress``, if there is one. (``Progress.begin_epoch`` may have begun the epoch already.)"""
        begins = progress.epoch_step == 0 or progress.epoch_step >= self._epoch_steps
        return self._config.redraw_tables and begins and 0 < progress.step < self._total_steps

    def tables(self, progress: Progress) -> None:
        epoch = progress.epoch + (progress.epoch_step > 0)
        initial = initial_values_of_tables(self._config.data.schema)
        initialize_tables(self._built.task, self._built.tables, self._config.seed, initial, epoch=epoch)
        fill_tables(self._built, self._config.data, self._trained, self._ranks)
        self._built.optimizer.forget_tables()
        if self._ranks.is_first:
            note(f"Tables drawn anew for epoch {epoch + 1}")
