"""The dense optimizer: one of ``torch.optim``, clipping by global norm, and a schedule that is a function of the step.

Weight decay is for parameters of two or more dimensions, weights of layers, not for biases, normalisation or activation
parameters: the field's convention (DeepCTR regularises names with ``weight`` outside batch normalisation).
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from trainer.config.optim import DENSE_OPTIMIZERS, DenseOptimizerConfig, ScheduleConfig
from trainer.runtime.step_mask import StepMask

_CLASSES = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adadelta": torch.optim.Adadelta,
}
assert set(_CLASSES) == set(DENSE_OPTIMIZERS)

_FUSED = ("adam", "adamw", "sgd")  # one kernel for all parameters, on CPU and CUDA alike
_RESTING = (torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad)
_NOT_OPTIONS = ("params", "lr", "weight_decay")  # these are keys of their own


def make_dense_optimizer(parameters: Mapping[str, nn.Parameter], config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    """A ``torch.optim`` optimizer over named parameters, its state in place from the start (so that a checkpoint has
    the same keys before the first step as after it).

    Raises ``UserError`` for an option that the optimizer does not have, or a value that it refuses.
    """
    kind = _CLASSES[config.name]
    valid = tuple(name for name in inspect.signature(kind).parameters if name not in _NOT_OPTIONS)
    for option in config.options:
        one_of(option, valid, f"optim.dense.options for {config.name}")
    options: dict[str, Any] = dict(config.options)
    if config.name in _FUSED and not {"fused", "foreach", "differentiable"} & set(options):
        options["fused"] = True
    # Without decay all are one group: each group takes kernels of its own.
    decayed = [p for p in parameters.values() if p.ndim >= 2 or not config.weight_decay]
    others = [p for p in parameters.values() if p.ndim < 2 and config.weight_decay]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    try:
        optimizer = kind([group for group in groups if group["params"]], lr=config.lr, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"optim.dense.options {options} for {config.name}: {error}") from error
    materialise_state(optimizer)
    return optimizer


def materialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state that ``torch.optim`` would create in its first step, with the same values, changing nothing
    else.

    (SGD's momentum starts from 0 instead of from the first gradient: the same unless ``dampening`` is set, where
    the first step is then damped like all others.)
    """
    empty = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    if not empty:
        return
    saved = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    for parameter in empty:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(values)
    for parameter in empty:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):  # all start at 0 but NAdam's running product
                value.fill_(1.0 if key == "mu_product" else 0.0)


def leaves_out_masked(optimizer: torch.optim.Optimizer, mask: StepMask) -> bool:
    """Has a fused optimizer leave out a masked step. Whether it is one; others move at a gradient of zero, too."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if fused:
        optimizer.found_inf = mask.skip  # where PyTorch's GradScaler puts it, and the optimizer's step looks for it
    return fused


def rests_without_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient of zero changes nothing but a count of steps."""
    return isinstance(optimizer, _RESTING) and all(
        group.get("eps", 1.0) > 0 and not group["weight_decay"] and not group.get("momentum")
        for group in optimizer.param_groups
    )


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients together to a global norm of at most ``max_norm``; returns the norm before, []. Gradients
    are averages over ranks already, so all ranks scale alike."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def schedule_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor of the learning rate at ``step`` (0 for the first) of a run of ``total_steps``.

    (step + 1) / warmup_steps while warming up, then from 1 to ``final`` at ``total_steps``, along a line or half a
    cosine (Loshchilov and Hutter, 2017, eq. 5, without restarts).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    share = min(share, 1.0)
    if config.decay == "linear":
        return 1.0 - (1.0 - config.final) * share
    if config.decay == "cosine":
        return config.final + (1.0 - config.final) * (1.0 + math.cos(math.pi * share)) / 2.0
    assert config.decay == "constant", config.decay
    return 1.0
