"""Launch a kernel. What Triton compiled for a launch is remembered, so that the next like it need not ask which it is.

Triton finds the compiled kernel for a launch by specialising every argument and formatting the options: about 10 us for
ours, which is what a small GEMM takes. Here the key is what decides that specialisation and little more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_REMEMBERED = 8192

ON_ROCM = torch.version.hip is not None
_MAX_INT_32 = 2**31 - 1

_compiled: dict[tuple, Any] = {}
_signatures: dict[int, "Signature"] = {}


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first argument, a tensor or a descriptor of one.

    args: the kernel's tensors, then its numbers; options: its constexprs in their order, then launch options.
    """
    device = getattr(args[0], "base", args[0]).device
    # Kernels built for the interpreter take tensors of any device, and have nothing compiled to remember.
    if device.type != "cuda" or not isinstance(kernel, JITFunction):
        kernel[grid](*args, **options)
    elif device.index == torch.cuda.current_device():
        launch_remembered(kernel, grid, args, options, device.index)
    else:
        with torch.cuda.device(device):
            launch_remembered(kernel, grid, args, options, device.index)


def launch_remembered(kernel, grid: tuple[int, ...], args: tuple, options: dict[str, Any], device: int) -> None:
    """`launch` on the current device, number `device`."""
    key = specialization_key(kernel, args, options, device)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= MAX_REMEMBERED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*args, **options)
    else:
        constexprs = tuple(options.values())[: signature(kernel).constexprs]
        compiled[(*grid, 1, 1)[:3]](*args, *constexprs)


def specialization_key(kernel, args: tuple, options: dict[str, Any], device: int) -> tuple:
    """Equal for two launches only if Triton compiles the same code for both.

    Triton specialises a tensor by dtype and 16-byte alignment (on ROCm also by whether 32-bit offsets reach all of its
    storage), a descriptor by dtype and block, a number by its value or, where the kernel says so, by its width alone. Its
    settings for debugging and instrumentation are options of every launch.
    """
    tensors, unspecialized, _ = signature(kernel)
    parts = [*map(_tensor_part, args[:tensors]), *args[tensors:]]
    for i in unspecialized:
        parts[i] = args[i] >> 31
    settings = (knobs.runtime.debug, knobs.compilation.instrumentation_mode)
    if ON_ROCM:
        settings += (knobs.amd.use_buffer_ops,)
    return (id(kernel), device, *settings, *parts, *options.values())


def _tensor_part(argument: Tensor | TensorDescriptor | None) -> tuple | None:
    if isinstance(argument, Tensor):
        if ON_ROCM:
            return argument.dtype, argument.data_ptr() % 16, argument.untyped_storage().nbytes() > _MAX_INT_32
        return argument.dtype, argument.data_ptr() % 16
    return None if argument is None else (argument.base.dtype, *argument.block_shape)


class Signature(NamedTuple):
    """How many tensors come first, the positions of the numbers that are not specialised, how many constexprs come last."""

    tensors: int
    unspecialized: tuple[int, ...]
    constexprs: int


def signature(kernel) -> Signature:
    """The `Signature` of a kernel of ours, which lives as long as this module."""
    # By its id: a kernel's own hash is that of its source, formatted anew each time.
    found = _signatures.get(id(kernel))
    if found is None:
        found = _signatures[id(kernel)] = _read_signature(kernel)
    return found


def _read_signature(kernel) -> Signature:
    params = kernel.params
    constexprs = sum(p.is_constexpr for p in params)
    assert all(p.is_constexpr for p in params[len(params) - constexprs :]), "constexprs come last"
    tensors = sum(p.name.endswith(("_ptr", "_desc")) for p in params)
    assert all(p.name.endswith(("_ptr", "_desc")) for p in params[:tensors]), "tensors come first"
    unspecialized = tuple(i for i, p in enumerate(params) if p.do_not_specialize and not p.is_constexpr)
    return Signature(tensors, unspecialized, constexprs)
