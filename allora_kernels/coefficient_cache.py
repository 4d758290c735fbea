"""The ALLoRA coefficient of one layer, computed once per optimizer step and never stale."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_live_caches: "weakref.WeakSet[CoefficientCache]" = weakref.WeakSet()
_hook_installed = False


def _forget_all(*_) -> None:
    for cache in tuple(_live_caches):
        cache.clear()


class CoefficientCache:
    """Holds C of the weight-dependent rules between backward passes of one optimizer step.

    An entry is valid for the same storage, at the same version counter, under the same rule. Two ways of writing do
    not touch the counter and are covered separately: optimizers that write through ``.data`` (and sharding libraries,
    which keep the counter on purpose) are caught by a hook on every ``torch.optim.Optimizer.step``; a CUDA graph
    replays its optimizer step without any Python, so a cache that has seen a capture never answers again. Writing
    through ``.data`` by hand is invisible: call `clear` after it.
    """

    def __init__(self) -> None:
        global _hook_installed
        self.clear()
        self._captured = False
        _live_caches.add(self)
        if not _hook_installed:
            register_optimizer_step_post_hook(_forget_all)
            _hook_installed = True

    def clear(self) -> None:
        """Forget the coefficient; the next backward pass computes it."""
        self._key = self._alias = self._value = None

    def get(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        eta: float,
        norm: str,
        compute: Callable[[Tensor, Tensor, float, str], Tensor],
    ) -> Tensor:
        """C for these factors: remembered, or ``compute(lora_A, lora_B, eta, norm)`` remembered from now on."""
        if lora_A.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured = True
        if self._captured:
            self.clear()
            return compute(lora_A, lora_B, eta, norm)
        try:
            key = (*_stamp(lora_A), *_stamp(lora_B), eta, norm, compute)
        except _Unrecognisable:
            return compute(lora_A, lora_B, eta, norm)
        if key != self._key:
            self._value = compute(lora_A, lora_B, eta, norm)
            self._key = key
            # Keeps both storages alive, so that no other tensor can come to live at a remembered address.
            self._alias = (lora_A.detach(), lora_B.detach())
        return self._value

    def __deepcopy__(self, memo) -> "CoefficientCache":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class _Unrecognisable(Exception):
    """A tensor that cannot be recognised by where its values lie and how often they were written."""


def _stamp(t: Tensor) -> tuple:
    if type(t) not in (Tensor, nn.Parameter):
        raise _Unrecognisable
    try:
        return t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device
    except RuntimeError:
        # torch.func's tensors look plain, but have no storage; tensors made in inference mode have no version.
        raise _Unrecognisable from None
