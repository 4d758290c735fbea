"""`use_batch_invariant`: a row of y and dX has the same bits in any batch."""

from .backend import TRITON_INSTALLED

_enabled = False


def enabled() -> bool:
    """Whether `use_batch_invariant` is on."""
    return _enabled


def _enable(on: bool) -> None:
    global _enabled
    if on and not TRITON_INSTALLED:
        raise RuntimeError("batch invariance needs the kernels: Triton is not installed (pip install triton)")
    if on or _enabled:
        from csrc_triton import batch_invariance

        batch_invariance.enable(on)
    _enabled = on


class use_batch_invariant:
    """Make each row of y and of dX independent, bit for bit, of the rows beside it: of their number, order and values.

    For training whose log-probabilities must equal a sampler's. Holds for the whole process, from the call on; as a context
    manager, until its end (keep it on for the backward pass too). A layer call that the kernels cannot take raises, because
    eager torch has no such guarantee. lora_A's and lora_B's gradients are sums over all rows: the same bits every run,
    but not for another batch. `FusedALLoRALinear.explain` says what it costs.

    Args:
        on: True to switch it on, False to switch it off.

    Raises:
        RuntimeError: Triton is not installed.
    """

    def __init__(self, on: bool = True) -> None:
        self._before = _enabled
        _enable(bool(on))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_) -> None:
        _enable(self._before)
