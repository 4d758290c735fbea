"""The ALLoRA coefficient of one layer, computed once per optimizer step and never stale."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of every `torch.optim.Optimizer` of this process, from the first layer on."""

    def __init__(self) -> None:
        self.watching = False
        self.count = 0
        self.captured = False

    def watch(self) -> None:
        if not self.watching:
            register_optimizer_step_post_hook(self._after_step)
            self.watching = True

    def _after_step(self, *_) -> None:
        self.count += 1
        # A captured step is replayed without any Python: from now on parameters may change unseen.
        self.captured = self.captured or _capturing()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_steps = _OptimizerSteps()


class CoefficientCache:
    """Holds C of the weight-dependent rules between backward passes of one optimizer step.

    An entry is valid for the same storages, at the same version counters, under the same rule, on the same stream, until
    any optimizer steps: some write through ``.data``, and sharding libraries keep the counters on purpose. Where a CUDA
    graph has captured this cache or an optimizer step, nothing is remembered any more. A write that torch cannot see
    (through ``.data`` or a NumPy view by hand, or from another process) needs `clear` after it.
    """

    def __init__(self) -> None:
        self._captured = False
        self.clear()
        _steps.watch()

    def clear(self) -> None:
        """Forget the coefficient; the next backward pass computes it."""
        self._entry = (None, None, None)

    def get(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        eta: float,
        norm: str,
        compute: Callable[[Tensor, Tensor, float, str], Tensor],
    ) -> Tensor:
        """C for these factors: remembered, or ``compute(lora_A, lora_B, eta, norm)`` remembered from now on."""
        self._captured = self._captured or (lora_A.is_cuda and _capturing())
        if self._captured or _steps.captured:
            self.clear()
            return compute(lora_A, lora_B, eta, norm)
        try:
            key = (_steps.count, *_stamp(lora_A), *_stamp(lora_B), eta, norm, compute)
        except _Unrecognisable:
            return compute(lora_A, lora_B, eta, norm)
        known, _, value = self._entry
        if key != known:
            value = compute(lora_A, lora_B, eta, norm)
            # The aliases keep both storages alive, so that no other tensor can come to live at a remembered address.
            self._entry = (key, (lora_A.detach(), lora_B.detach()), value)
        return value

    def __deepcopy__(self, memo) -> "CoefficientCache":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class _Unrecognisable(Exception):
    """A tensor that cannot be recognised by where its values lie and how often they were written."""


def _stamp(t: Tensor) -> tuple:
    if type(t) not in (Tensor, nn.Parameter):
        raise _Unrecognisable
    stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else None
    try:
        return t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device, stream
    except RuntimeError:
        # torch.func's tensors look plain, but have no storage; tensors made in inference mode have no version.
        raise _Unrecognisable from None
