"""`use_batch_invariant`: a row of y and dX has the same bits in any batch."""

from . import backend as _backend


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
        self._before = _backend.batch_invariant()
        _backend.set_batch_invariant(bool(on))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_) -> None:
        _backend.set_batch_invariant(self._before)
