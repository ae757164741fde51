"""The one optimizer that the training pipeline steps: dense part, data-parallel tables, FTRL; fused tables are updated
inside backward already. Its state goes through torch.distributed.checkpoint.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trainer.config import OptimConfig
from trainer.embeddings import is_wide_table
from trainer.optim.dense import clip_gradients, make_dense_optimizer, materialise_state, schedule_factor
from trainer.optim.ftrl import FTRL
from trainer.optim.tables import (
    count_training_steps_only,
    data_parallel_table_optimizers,
    embedding_tables,
    set_fused_steps,
)

State = dict[str, Tensor | ShardedTensor]


class CombinedOptimizer:
    """All optimizers of a sharded model. All ranks construct it together.

    ``steps`` counts the steps made, and alone decides the dense learning rate; clipping and schedule are for dense
    parameters only. Raises ``ValueError`` for options that an optimizer does not have.
    """

    def __init__(
        self, model: DistributedModelParallel, plan: ShardingPlan, optim: OptimConfig, *, total_steps: int
    ) -> None:
        self.config, self.total_steps = optim.dense, total_steps
        self._model = model
        self._tables, self._table_parameters = data_parallel_table_optimizers(model, plan, optim)
        for optimizer in self._tables:
            materialise_state(optimizer)
        self._dense_parameters = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if parameter.requires_grad and name not in self._table_parameters
        }
        self._dense = make_dense_optimizer(self._dense_parameters, optim.dense) if self._dense_parameters else None
        wide = any(is_wide_table(table.name) for table in embedding_tables(model))
        self._ftrl = FTRL(model, optim.wide) if wide and optim.wide.name == "ftrl" else None
        self._step = torch.zeros((), dtype=torch.int64)
        count_training_steps_only(model)
        self._state = self._live_state()

    @property
    def steps(self) -> int:
        return int(self._step)

    @property
    def lr(self) -> float:
        """The dense learning rate of the next step."""
        return self.config.lr * schedule_factor(self.config.schedule, self.steps, self.total_steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._ordinary():
            optimizer.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """After backward. (``closure`` is there for the pipeline's sake only.)"""
        assert closure is None
        if self._dense is not None:
            if self.config.clip_norm is not None:
                clip_gradients(list(self._dense_parameters.values()), self.config.clip_norm)
            for group in self._dense.param_groups:
                group["lr"] = self.lr
        for optimizer in self._ordinary():
            optimizer.step()
        if self._ftrl is not None:
            self._ftrl.step()
        self._step += 1

    def state_dict(self) -> State:
        """Tensors only, by parameter and state, the same keys on every rank: ``{"dense.<parameter>.<state>",
        "tables.<parameter>.<state>", "steps"}``. They are the optimizer's own memory: loading into them loads it."""
        return dict(self._state)

    def load_state_dict(self, state: State) -> None:
        """Takes over what ``state_dict`` gave, changed in place by torch.distributed.checkpoint or not. Raises
        ``ValueError`` when the keys differ."""
        if set(state) != set(self._state):
            missing, unknown = sorted(set(self._state) - set(state)), sorted(set(state) - set(self._state))
            raise ValueError(f"optimizer state does not fit: missing {missing[:5]}, unknown {unknown[:5]}")
        for key, own in self._state.items():
            _copy(own, state[key])
        set_fused_steps(self._model, self.steps)

    def _ordinary(self) -> list[torch.optim.Optimizer]:
        return [*self._tables, *([self._dense] if self._dense is not None else [])]

    def _live_state(self) -> State:
        state: State = {"steps": self._step}
        if self._dense is not None:
            state |= _ordinary_state("dense", self._dense, self._dense_parameters)
        for optimizer in self._tables:
            state |= _ordinary_state("tables", optimizer, self._table_parameters)
        return dict(sorted((state | _fused_state(self._model)).items()))  # one order on all ranks


def _ordinary_state(prefix: str, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> State:
    found: State = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum
                continue
            assert isinstance(value, Tensor), (name, key, type(value))
            found[f"{prefix}.{name}.{key}"] = value
    return found


def _fused_state(model: DistributedModelParallel) -> State:
    """State of the fused tables. TorchRec names a table-wise table's state on its owner only: the other ranks get an
    empty ShardedTensor of the same layout, so that keys are equal everywhere and comparable with a checkpoint's."""
    state: State = {
        f"tables.{name}.{key.rpartition('.')[2]}": value
        for name, values in model.fused_optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    layouts: list[dict[str, ShardedTensorMetadata]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(layouts, {key: value.metadata() for key, value in state.items()})
    for layout in layouts:
        for key, metadata in layout.items():
            if key not in state:
                state[key] = ShardedTensor._init_from_local_shards_and_global_metadata([], metadata)
    return state


def _copy(own: Tensor | ShardedTensor, loaded: Any) -> None:
    if isinstance(own, ShardedTensor):
        for mine, theirs in zip(own.local_shards(), loaded.local_shards(), strict=True):
            mine.tensor.copy_(theirs.tensor)
    else:
        own.copy_(loaded)
