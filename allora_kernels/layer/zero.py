"""Parameters that DeepSpeed's ZeRO-3 has cut up: each process holds a part, and an empty tensor stands in their place.

The engine fills a layer's own parameters for as long as the layer runs. Whatever reads a shape or a value at another time asks
here.
"""

import contextlib
import sys

import torch
from torch import Tensor


def is_cut_up(t: Tensor) -> bool:
    """Whether `t` is a parameter whose values are in several processes now."""
    return hasattr(t, "ds_shape") and t.shape != t.ds_shape


def whole_shape(t: Tensor) -> torch.Size:
    """The shape of all of `t`."""
    return t.ds_shape if is_cut_up(t) else t.shape


def filled(t: Tensor, written: bool = False) -> contextlib.AbstractContextManager:
    """Within, a `t` that is cut up has its values in every process, which all must enter; `written`: what process 0 has written
    to it there is kept."""
    if not is_cut_up(t):
        return contextlib.nullcontext()
    return sys.modules["deepspeed"].zero.GatheredParameters([t], modifier_rank=0 if written else None)


def gives_gradients_away(t: Tensor) -> bool:
    """Whether an engine of DeepSpeed with any ZeRO takes the gradient of the parameter `t` as the backward pass finds it, and
    reads nothing that is written to its `grad` afterwards."""
    return hasattr(t, "_hp_mapping") or hasattr(t, "_z3_optimizer")
