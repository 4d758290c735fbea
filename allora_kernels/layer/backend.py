"""Which backend a call takes, and why."""

import functools
import importlib.util
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from .. import reference

_loaded_ops: ModuleType | None = None
BACKENDS = ("triton", "eager")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """`name` is ``"triton"`` or ``"eager"``; `fallback` is True where a GPU tensor has to do without the kernels."""

    name: str
    reason: str
    fallback: bool = False

    @property
    def in_words(self) -> str:
        """For `repr`: the name, and why where it is a fallback."""
        return f"{self.name!r} ({self.reason})" if self.fallback else repr(self.name)


def interpreted() -> bool:
    """Whether Triton runs its kernels by its interpreter (TRITON_INTERPRET=1), which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose(device: torch.device, dtype: torch.dtype, asked: str | None = None) -> Choice:
    """The backend for a call on `device` in `dtype`.

    Raises:
        ValueError: `asked` is unknown, or is ``"triton"`` where Triton cannot run.
    """
    if asked == "eager":
        return Choice("eager", "backend='eager' was asked for")
    if asked not in ("triton", None):
        raise ValueError(f"backend must be one of {BACKENDS} or None (choose), got {asked!r}")

    on_gpu = device.type == "cuda"
    obstacle = None if TRITON_INSTALLED else "Triton is not installed (pip install triton)"
    if obstacle is None and dtype not in TRITON_DTYPES:
        obstacle = f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if obstacle is None and not on_gpu and not interpreted():
        obstacle = f"{device.type} tensors (the kernels run on CUDA or ROCm devices, or under TRITON_INTERPRET=1)"
    if obstacle is None:
        return Choice("triton", f"{device.type} tensors" if on_gpu else "TRITON_INTERPRET=1")
    if asked == "triton":
        raise ValueError(f"backend='triton' cannot run here: {obstacle}. backend='eager' can")
    return Choice("eager", obstacle, fallback=on_gpu)


@functools.cache
def warn_fallback(reason: str) -> None:
    """Warn, once for each reason, that a GPU call takes the slower path."""
    warnings.warn(f"allora_kernels: using the eager backend on a GPU: {reason}", RuntimeWarning, stacklevel=4)


def steps(name: str) -> ModuleType:
    """The module whose functions are the layer's steps: `reference`, or the Triton ops (loaded on first use)."""
    if name == "eager":
        return reference
    if torch.compiler.is_compiling():
        from . import ops

        return ops
    return _loaded_ops or _load_ops()


def _load_ops() -> ModuleType:
    # The import statement costs a call a microsecond, also where there is nothing to do. What it gives is whole: while one
    # thread imports it, others wait there.
    global _loaded_ops
    from . import ops

    _loaded_ops = ops
    return ops
