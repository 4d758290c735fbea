"""Ops that launch again what an earlier call like theirs has launched, without finding out anew what that is.

From a call's arguments a launcher works out plans, block sizes, strides and the number of parts of each sum, all of it from
shapes, strides, dtypes and numbers: some 20 us of Python a launch, more than a small GEMM takes. An early call of each kind is
therefore recorded (`recording`). Later calls of that kind allocate and launch, and do nothing else. What cannot be recorded
runs as if this module did not exist.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from . import batch_invariance
from .chain import turn
from .launching import ON_ROCM, compile_settings, runner
from .recording import Launch, Recording, View, record

MAX_KINDS = 4096
"""How many kinds of call are kept in mind before all are forgotten: some 11 KB each."""

CALLS_BEFORE = 2
"""How many calls of a kind run before one is recorded, which costs as much as three more: where every batch has another number
of rows, most kinds are never seen again."""

_NEVER = -1
_kinds: dict[tuple, int | Recording] = {}
"""By kind: how many calls there were, `_NEVER` if it cannot be recorded, or its `Recording`."""
_recording_lock = threading.Lock()
"""A dispatch mode sets flags of the whole process, which two that begin and end in turns would leave set."""


def forget() -> None:
    """Find out anew from now on: after something that launchers go by has changed."""
    _kinds.clear()


def replayed(launcher: Callable) -> Callable:
    """`launcher` for CUDA tensors, by replay where it can be. It takes tensors, None and what can be hashed, goes by nothing of
    a tensor but its metadata, and returns a tensor, a tuple of them, or None."""
    if ON_ROCM:
        return launcher

    def call(*args):
        kind, tensors, addresses = kind_of(launcher, args)
        known = _kinds.get(kind, 0)
        if type(known) is not Recording:
            return _first_calls(launcher, args, kind, known)
        if known.device.index == torch.cuda.current_device():
            return _replay_on(known.device.index, known, tensors, addresses)
        with torch.cuda.device(known.device):
            return _replay_on(known.device.index, known, tensors, addresses)

    return call


def _first_calls(launcher: Callable, args: tuple, kind: tuple, calls: int) -> Any:
    if calls == CALLS_BEFORE and not _captured() and _recording_lock.acquire(blocking=False):
        try:
            # Unless all goes well: a call that runs out of memory need not hold on to everything the next time.
            _kinds[kind] = _NEVER
            result, recording = record(launcher, args)
            # Neither what it goes by nor what was known has changed meanwhile, in another thread.
            if recording is not None and kind in _kinds and kind_of(launcher, args)[0] == kind:
                _kinds[kind] = recording
            return result
        finally:
            _recording_lock.release()
    if 0 <= calls < CALLS_BEFORE:
        if len(_kinds) >= MAX_KINDS:
            _kinds.clear()
        _kinds[kind] = calls + 1
    return launcher(*args)


def _captured() -> bool:
    """Whether this is for a CUDA graph, for which a launcher may do without what it has elsewhere (`chain.counts`)."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kind_of(launcher: Callable, args: tuple) -> tuple[tuple, list[Tensor], list[int]]:
    """What decides all that a launcher does, its tensors, and their addresses."""
    parts, tensors, addresses = [launcher, batch_invariance.enabled(), *compile_settings()], [], []
    wide = False
    for argument in args:
        if isinstance(argument, Tensor):
            address, dtype = argument.data_ptr(), argument.dtype
            parts += (argument.shape, argument.stride(), dtype, argument.get_device(), address % 16)
            tensors.append(argument)
            addresses.append(address)
            wide = wide or dtype is torch.float32
        else:
            parts.append(argument)
    # A microsecond, for the only dtype whose dots it changes.
    parts.append(torch.backends.cuda.matmul.fp32_precision if wide else None)
    return tuple(parts), tensors, addresses


def _replay_on(device: int | None, recording: Recording, tensors: list[Tensor], addresses: list[int]) -> Any:
    run = runner(driver.active.get_current_stream(device))

    def start(launch: Launch, args: tuple) -> None:
        run(launch.compiled, launch.grid, args)

    with turn:
        return replay(recording, tensors, addresses, start)


def replay(
    recording: Recording, tensors: list[Tensor], addresses: list[int], start: Callable[[Launch, tuple], None]
) -> Any:
    """The recorded call on its inputs `tensors`, which lie at `addresses`; ``start(launch, args)`` starts a launch with all its
    arguments."""
    device, allocated, scratch_bytes, values, slots, descriptors, steps, results = recording
    made = [torch.empty(size, dtype=dtype, device=device) for size, dtype in allocated]
    tensors += made
    addresses += [t.data_ptr() for t in made]
    if scratch_bytes:
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        addresses.append(scratch.data_ptr())
    values = values.copy()
    for number, (tensor, offset, _) in slots:
        values[number] = addresses[tensor] + offset
    for number, known in descriptors:
        values[number] = known.at(addresses[known.slot.tensor] + known.slot.offset)
    for step in steps:
        if type(step) is Launch:
            start(step, step.pick(values))
        else:
            step.function(*[_taken(view, tensors) for view in step.args])
    if results is None:
        return None
    if type(results) is View:
        return _taken(results, tensors)
    return tuple([_taken(view, tensors) for view in results])


def _taken(view: View, tensors: list[Tensor]) -> Tensor:
    whole = tensors[view.tensor]
    if view.geometry is None:
        return whole
    size, stride, offset = view.geometry
    return whole.as_strided(size, stride, whole.storage_offset() + offset)
