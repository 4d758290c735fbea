"""The frozen weight of a quantized layer as a dense one, for as long as a kernel reads it.

Libraries that store a weight in few bits and leave x as it is multiply, from some hundreds of rows on, by a dense copy of the
weight that lives for one product. With the copy in hand that product can be this library's, with the adapter in it.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import bases

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""How many 4-bit weights can share a scale."""


class PackedWeight(NamedTuple):
    """A frozen weight ``[N, K]`` in few bits: `dense()` is it in `dtype`, a new tensor at each call.

    It holds the tensors that the layer had when it was made, so that a backward pass finds its forward pass's weight also where
    the layer has another by then.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    dense: Callable[[], Tensor]
    by: str
    """What makes it dense, in words."""
    returns_dtype_of_x: bool = False
    """Whether the layer's y has x's dtype also where autocast has another."""

    def to(self, dtype: torch.dtype) -> "PackedWeight":
        """Itself: a weight in few bits is read in its own dtype alone."""
        assert dtype == self.dtype, (dtype, self.dtype)
        return self

    def stand_in(self) -> Tensor:
        """A tensor of this shape, dtype and device that takes no memory, to check others against."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def packed_weight(module: nn.Module, dtype: torch.dtype, kernels: bool) -> PackedWeight | None:
    """The weight that `module` would multiply an x of `dtype` by; None where it is not known to multiply by a dense copy.
    `kernels`: whether kernels can make it dense."""
    kind = bases.kind_of(module)
    if kind == "bitsandbytes Linear4bit":
        return _of_linear4bit(module, dtype, kernels)
    if kind is not None and kind.startswith("torchao "):
        return _of_torchao(module.weight, module.bias)
    return None


def _of_linear4bit(module: nn.Module, dtype: torch.dtype, kernels: bool) -> PackedWeight | None:
    weight, shape = module.weight, (module.out_features, module.in_features)
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None or tuple(state.shape) != shape:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.contiguous().view(-1)
    dtype = module.compute_dtype or dtype
    scales = _scales(state) if kernels else None
    if scales is not None:
        args = (packed.view(torch.uint8), state.code, *scales, *shape, dtype)
        dense, by = functools.partial(_by_kernel, args), "a kernel"
    elif packed.numel() == 1:
        # Of a packed weight of one row bitsandbytes gives the transpose, and there is no other way to lay this one.
        return None
    else:
        dense, by = functools.partial(_by_bitsandbytes, packed.view(-1, 1), state, dtype), "bitsandbytes"
    return PackedWeight(shape, dtype, packed.device, dense, by, returns_dtype_of_x=True)


def _by_kernel(args: tuple) -> Tensor:
    from . import ops

    return ops.dequantize_4bit(*args)


def _by_bitsandbytes(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    # Loaded, as it made the layer; this package imports no other library.
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(packed, state)


def _scales(state: Any) -> tuple | None:
    """What `ops.dequantize_4bit` takes of bitsandbytes' QuantState between the code and the shape; None where it is of another
    make than that knows."""
    code, scales, nested = state.code, state.absmax, state.state2
    of_scales = () if nested is None else (nested.code, nested.absmax, state.offset)
    known = state.blocksize in _BLOCKS and code is not None and code.numel() == 16 and scales.is_contiguous()
    known = known and all(t.dtype == torch.float32 and t.is_contiguous() for t in (code, *of_scales))
    if not known or scales.dtype != (torch.float32 if nested is None else torch.uint8):
        return None
    return scales, *(of_scales or (None, None, None)), state.blocksize, 1 if nested is None else nested.blocksize


def _of_torchao(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    if bias is not None and bias.dtype != weight.dtype:
        # Each kind of weight has its own way with that, or none.
        return None
    int8 = type(weight).__name__ == "Int8Tensor"
    if int8:
        # A scale for a whole row is left to what comes out, which rounds less than a dense weight would.
        by_row = weight.block_size[-1] == weight.shape[-1]
        if by_row or getattr(weight, "act_pre_scale", None) is not None:
            return None
    shape, dense = tuple(weight.shape), weight.dequantize
    return PackedWeight(shape, weight.dtype, weight.device, dense, "torchao", returns_dtype_of_x=int8)
