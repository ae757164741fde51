"""Whether the step under way may change anything, decided and obeyed on the device: the host does not wait for the answer.

A loss that is not finite on any rank masks the step on all of them: what backward and the optimizers would write is left
out, and tables, parameters and the optimizers' states stay bit by bit as they are. The host reads the answer one step later
(``trainer.runtime.step_guard``) and ends the run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers, by bytes of an element


class StepMask:
    """``counts`` bool [] and ``skip`` float32 [], its opposite as PyTorch's fused optimizers take it (``found_inf``): the
    same tensors in every step."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.ones((), dtype=torch.bool, device=device)
        self.skip = torch.zeros((), device=device)
        self._zero = torch.zeros((), device=device)
        self._none = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, flag: Tensor) -> None:
        """Masks the step where ``flag`` [] is NaN."""
        torch.eq(flag, flag, out=self.counts)
        torch.ne(flag, flag, out=self.skip)

    def zeroed(self, gradient: Tensor) -> Tensor:
        """``gradient``, or zeros: not a product, since NaN times 0 is NaN."""
        return torch.where(self.counts, gradient, self._zero)

    @torch.no_grad()
    def zero(self, gradients: Sequence[Tensor]) -> None:
        """The same in place, of all of them in one kernel: 0 times the bits of a NaN is 0."""
        for integer, each in _as_integers(gradients).items():
            torch._foreach_mul_(each, self.counts.to(integer))

    def masked_only(self, numbers: Tensor) -> Tensor:
        """``numbers`` int64 where the step is masked, else zeros."""
        return torch.where(self.counts, self._none, numbers)


class Rollback:
    """Puts ``tensors`` back to what they were when ``keep`` was called, where the step is masked.

    For optimizers that cannot leave out an update by themselves. Bits are moved as integers, whose differences are exact,
    so all tensors take four kernels. Tensors on another device than the mask's are left alone: PyTorch counts steps on the
    host, and these counts are one ahead after a masked step."""

    def __init__(self, tensors: Sequence[Tensor], mask: StepMask) -> None:
        self._mask = mask
        self._live = _as_integers([tensor.detach() for tensor in tensors if tensor.device == mask.skip.device])
        self._kept = {integer: [torch.empty_like(each) for each in live] for integer, live in self._live.items()}

    @torch.no_grad()
    def keep(self) -> None:
        for integer, live in self._live.items():
            torch._foreach_copy_(self._kept[integer], live)

    @torch.no_grad()
    def restore(self) -> None:
        for integer, live in self._live.items():
            back = torch._foreach_sub(self._kept[integer], live)
            torch._foreach_mul_(back, self._mask.skip.to(integer))
            torch._foreach_add_(live, back)


def _as_integers(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """The same memory, by the type of integers that it is seen as."""
    return {
        integer: found
        for size, integer in _SAME_SIZE.items()
        if (found := [tensor.view(integer) for tensor in tensors if tensor.element_size() == size])
    }
