"""Launch a kernel. What Triton compiled for a launch is remembered, so that the next like it need not ask which it is.

Triton finds the compiled kernel for a launch by specialising every argument and formatting the options: about 10 us for
ours, which is what a small GEMM takes. Here the key is what decides that specialisation and little more.
"""

import ctypes
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .chain import next_place

MAX_REMEMBERED = 8192
MAX_ROWS = 2**30
"""Rows are counted in 32 bits, in which the sum of two of these numbers has to fit: where a segment begins, and its length."""

ON_ROCM = torch.version.hip is not None
_MAX_INT_32 = 2**31 - 1

_compiled: dict[tuple, Any] = {}
_signatures: dict[int, "Signature"] = {}


class _Watch(threading.local):
    watcher: Callable | None = None


watch = _Watch()
"""Its `watcher` is told of this thread's launches: kernel, grid, args, options, what was compiled (the interpreter: None)."""


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first argument, a tensor or a descriptor of one.

    args: the kernel's tensors, then its numbers; options: its constexprs in their order, but for CHAIN, which is
    the first where there is one, then launch options.

    Raises:
        ValueError: it has more than MAX_ROWS rows, its argument M.
    """
    if "M" in kernel.arg_names and (rows := args[kernel.arg_names.index("M")]) > MAX_ROWS:
        raise ValueError(f"the kernels take at most {MAX_ROWS} rows at a time, got {rows}: split the batch")
    if "CHAIN" in kernel.arg_names:
        place = next_place()
        options = {"CHAIN": place, **options, **({} if place in ("", "first") else {"launch_pdl": True})}
    device = getattr(args[0], "base", args[0]).device
    compiled = None
    if not _is_compiled(kernel, device):
        kernel[grid](*args, **options)
    elif device.index == torch.cuda.current_device():
        compiled = launch_remembered(kernel, grid, args, options, device.index)
    else:
        with torch.cuda.device(device):
            compiled = launch_remembered(kernel, grid, args, options, device.index)
    if watch.watcher is not None:
        watch.watcher(kernel, grid, args, options, compiled)


def _is_compiled(kernel, device: torch.device) -> bool:
    # Kernels built for the interpreter take tensors of any device, and have nothing compiled to remember.
    return device.type == "cuda" and isinstance(kernel, JITFunction)


def launch_remembered(kernel, grid: tuple[int, ...], args: tuple, options: dict[str, Any], device: int) -> Any:
    """`launch` on the current device, number `device`. Returns what was compiled for it."""
    key = specialization_key(kernel, args, options, device)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= MAX_REMEMBERED:
            _compiled.clear()
        compiled = _compiled[key] = kernel[grid](*args, **options)
        if options.get("CHAIN") and hasattr(compiled, "function"):
            _leave_shared_memory(compiled)
    else:
        run = runner(driver.active.get_current_stream(device))
        run(compiled, (*grid, 1, 1)[:3], (*args, *constexprs(kernel, options)))
    return compiled


_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent."""


def _leave_shared_memory(compiled: Any) -> None:
    # The driver divides a multiprocessor's memory between cache and shared memory as the kernel that comes first there needs
    # it, and what comes beside that has to do with the rest.
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    error = library.cuFuncSetAttribute(ctypes.c_void_p(compiled.function), _CARVEOUT, 100)
    if error:
        warnings.warn(f"CUDA error {error}: kernels may not find shared memory to run beside one another", stacklevel=2)


def runner(stream: int) -> Callable[[Any, tuple[int, int, int], Sequence], None]:
    """``run(compiled, grid, args)``: launches what was compiled on this stream of the current device, as Triton itself does it,
    with the hooks as they are now; args: all of the kernel's, a tensor or the address of its first element where it has a
    pointer."""
    enter, leave = _used(knobs.runtime.launch_enter_hook), _used(knobs.runtime.launch_exit_hook)

    def run(compiled, grid: tuple[int, int, int], args: Sequence) -> None:
        metadata = None if enter is None else compiled.launch_metadata(grid, stream, *args)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *args)

    return run


def _used(hook: Callable | None) -> Callable | None:
    # An empty chain of hooks would be called for nothing, and its arguments prepared.
    return hook if getattr(hook, "calls", hook) else None


def is_descriptor(argument: Any) -> bool:
    """Whether it is a tensor descriptor, Triton's or Gluon's."""
    return hasattr(argument, "block_shape")


def constexprs(kernel, options: dict[str, Any]) -> tuple:
    """The kernel's constexprs, without the launch options behind them."""
    return tuple(options.values())[: signature(kernel).constexprs]


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
    return (id(kernel), device, *compile_settings(), *parts, *options.values())


def compile_settings() -> tuple:
    """Triton's settings that change what it compiles."""
    settings = (knobs.runtime.debug, knobs.compilation.instrumentation_mode)
    return (*settings, knobs.amd.use_buffer_ops) if ON_ROCM else settings


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
