"""Ops that launch again what an earlier call like theirs has launched, without finding out anew what that is.

From a call's arguments a launcher works out plans, block sizes, strides and the number of parts of each sum, all of it from
shapes, strides, dtypes and numbers: some 20 us of Python a launch, more than a small GEMM takes. An early call of each kind is
therefore recorded: the tensors it allocates and the launches, with each pointer as an offset into one of the tensors. Later
calls of that kind allocate and launch, and do nothing else.

Only what allocates, views and launches can be recorded. A call that does more (a GEMM of the vendor's, a fill), or whose inputs
overlap or are empty, runs as if this module did not exist.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import JITFunction
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import batch_invariance
from .launching import ON_ROCM, compile_settings, constexprs, run, watch

MAX_KINDS = 4096
"""How many kinds of call are kept in mind before all are forgotten: some 11 KB each."""

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
_ALIGNMENT = 512

CALLS_BEFORE = 2
"""How many calls of a kind run before one is recorded, which costs as much as three more: where every batch has another number
of rows, most kinds are never seen again."""

_NEVER = -1
_kinds: dict[tuple, "int | Recording"] = {}
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
        kind, addresses, device = kind_of(launcher, args)
        known = _kinds.get(kind, 0)
        if type(known) is not Recording:
            return _first_calls(launcher, args, kind, known)
        if device == torch.cuda.current_device():
            return _replay_on(device, known, addresses)
        with torch.cuda.device(device):
            return _replay_on(device, known, addresses)

    return call


def _replay_on(device: int, recording: "Recording", addresses: list[int]) -> Any:
    stream = driver.active.get_current_stream(device)

    def start(launch: Launch, args: list) -> None:
        run(launch.compiled, launch.grid, args, stream)

    return replay(recording, addresses, start)


def _first_calls(launcher: Callable, args: tuple, kind: tuple, calls: int) -> Any:
    if calls == CALLS_BEFORE and _recording_lock.acquire(blocking=False):
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


def kind_of(launcher: Callable, args: tuple) -> tuple[tuple, list[int], int]:
    """What decides all that a launcher does, the addresses of its tensors, and the number of the first one's device."""
    parts, addresses = [launcher, batch_invariance.enabled(), *compile_settings()], []
    first, wide = None, False
    for argument in args:
        if isinstance(argument, Tensor):
            address, device, dtype = argument.data_ptr(), argument.get_device(), argument.dtype
            parts += (argument.shape, argument.stride(), dtype, device, address % 16)
            addresses.append(address)
            first = device if first is None else first
            wide = wide or dtype is torch.float32
        else:
            parts.append(argument)
    # A microsecond, for the only dtype whose dots it changes.
    parts.append(torch.backends.cuda.matmul.fp32_precision if wide else None)
    return tuple(parts), addresses, first


class Slot(NamedTuple):
    """Where something lies: `offset` bytes from the first element of tensor number `tensor` of a recording."""

    tensor: int
    offset: int
    dtype: torch.dtype


class Result(NamedTuple):
    """A tensor to return: all of tensor number `tensor`, or (`view` not None) that size, stride and offset of it."""

    tensor: int
    view: tuple | None


class Launch(NamedTuple):
    """A launch of `kernel`, or of what was `compiled` for it. `args` lacks its tensors: they lie at `slots`, and those that a
    descriptor reaches at the slots of `descriptors`, each with its position in `args`."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    args: list
    options: dict[str, Any]
    slots: tuple[tuple[int, Slot], ...]
    descriptors: tuple[tuple[int, TensorDescriptor, Slot], ...]


class Recording(NamedTuple):
    """One kind of call. Its tensors are numbered: its inputs, then one for each of `allocated` (size, dtype), whose memory is
    the results', then `scratch_bytes` for all that it allocates and does not return."""

    device: torch.device
    allocated: tuple[tuple[torch.Size, torch.dtype], ...]
    scratch_bytes: int
    launches: tuple[Launch, ...]
    results: Result | tuple[Result, ...] | None


class Address(NamedTuple):
    """What a descriptor needs of the tensor that it describes."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def replay(recording: Recording, addresses: list[int], start: Callable[[Launch, list], None]) -> Any:
    """The recorded call on the inputs at `addresses`; ``start(launch, args)`` starts a launch with all of its arguments."""
    device, allocated, scratch_bytes, launches, results = recording
    made = [torch.empty(size, dtype=dtype, device=device) for size, dtype in allocated]
    inputs = len(addresses)
    addresses += [t.data_ptr() for t in made]
    if scratch_bytes:
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        addresses.append(scratch.data_ptr())
    for launch in launches:
        args = launch.args.copy()
        for position, (tensor, offset, _) in launch.slots:
            args[position] = addresses[tensor] + offset
        for position, descriptor, (tensor, offset, dtype) in launch.descriptors:
            args[position] = _described(descriptor, Address(addresses[tensor] + offset, dtype))
        start(launch, args)
    if results is None:
        return None
    if type(results) is Result:
        return _taken(results, made, inputs)
    return tuple([_taken(result, made, inputs) for result in results])


def _taken(result: Result, made: list[Tensor], inputs: int) -> Tensor:
    whole = made[result.tensor - inputs]
    return whole if result.view is None else whole.as_strided(*result.view)


def _described(descriptor: TensorDescriptor, base: Address) -> TensorDescriptor:
    # What its constructor checks has been checked.
    new = object.__new__(TensorDescriptor)
    new.__dict__.update(descriptor.__dict__, base=base)
    return new


class _Recorder(TorchDispatchMode):
    """Notes what is allocated and launched within it, and holds on to it, so that nothing of it has another's address."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.launches: list[tuple] = []
        self.only_known_steps = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif not (func.is_view and _is_part(result, args[0])):
            self.only_known_steps = False
        return result

    def __enter__(self):
        watch.watcher = lambda *launch: self.launches.append(launch)
        return super().__enter__()

    def __exit__(self, *error):
        watch.watcher = None
        return super().__exit__(*error)


def record(launcher: Callable, args: tuple) -> tuple[Any, Recording | None]:
    """``launcher(*args)``, and the recording of it, None where it cannot be recorded."""
    recorder = _Recorder()
    with recorder:
        result = launcher(*args)
    inputs = [argument for argument in args if isinstance(argument, Tensor)]
    return result, _recorded(inputs, recorder, result) if recorder.only_known_steps else None


def _recorded(inputs: list[Tensor], recorder: _Recorder, result: Any) -> Recording | None:
    results = () if result is None else (result,) if isinstance(result, Tensor) else result
    owners = {_storage(t): t for t in recorder.allocated}
    if not all(_storage(t) in owners and t.dtype == owners[_storage(t)].dtype for t in results):
        return None
    kept = list(dict.fromkeys(_storage(t) for t in results))
    numbers = {storage: len(inputs) + i for i, storage in enumerate(kept)}
    places = [Place(*_extent(t), i, t.data_ptr()) for i, t in enumerate(inputs)]
    ordered = sorted(places)
    if any(place.start == place.stop for place in places) or any(a.stop > b.start for a, b in pairwise(ordered)):
        return None

    scratch_bytes = 0
    for storage, t in owners.items():
        if storage in numbers:
            places.append(Place(*_extent(t), numbers[storage], t.data_ptr()))
        else:
            places.append(Place(*_extent(t), len(inputs) + len(kept), t.data_ptr() - scratch_bytes))
            scratch_bytes += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT

    def slot(t: Tensor) -> Slot:
        address = t.data_ptr()
        for place in places:
            if place.start <= address < place.stop:
                return Slot(place.tensor, address - place.origin, t.dtype)
        raise LookupError("neither an argument nor allocated")

    try:
        launches = tuple(_launch(*launch, slot) for launch in recorder.launches)
    except LookupError:
        return None
    found = [Result(numbers[_storage(t)], _view(t, owners[_storage(t)])) for t in results]
    return Recording(
        inputs[0].device,
        tuple((owners[storage].shape, owners[storage].dtype) for storage in kept),
        scratch_bytes,
        launches,
        None if result is None else found[0] if isinstance(result, Tensor) else tuple(found),
    )


class Place(NamedTuple):
    """The addresses from `start` up to `stop`, which belong to tensor number `tensor` with its first element at `origin`."""

    start: int
    stop: int
    tensor: int
    origin: int


def _extent(t: Tensor) -> tuple[int, int]:
    elements = 0 if t.numel() == 0 else 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + elements * t.itemsize


def _is_part(result: Tensor | Sequence[Tensor], whole: Tensor) -> bool:
    # Of some ops that may be views the schema does not say when they copy.
    parts = (result,) if isinstance(result, Tensor) else result
    return all(_storage(part) == _storage(whole) for part in parts)


def _launch(
    kernel, grid: tuple[int, ...], args: tuple, options: dict[str, Any], compiled: Any, slot: Callable[[Tensor], Slot]
) -> Launch:
    if compiled is None and isinstance(kernel, JITFunction):
        raise LookupError("a hook has kept the compiled kernel to itself")
    slots = tuple((i, slot(a)) for i, a in enumerate(args) if isinstance(a, Tensor))
    described = [(i, a, slot(a.base)) for i, a in enumerate(args) if isinstance(a, TensorDescriptor)]
    descriptors = tuple((i, _described(a, Address(0, place.dtype)), place) for i, a, place in described)
    bare = [None if isinstance(a, (Tensor, TensorDescriptor)) else a for a in args]
    args = bare if compiled is None else [*bare, *constexprs(kernel, options)]
    return Launch(kernel, compiled, (*grid, 1, 1)[:3], args, options, slots, descriptors)


def _storage(t: Tensor) -> int:
    # Its address would be the same for all that are empty.
    return t.untyped_storage()._cdata


def _view(t: Tensor, whole: Tensor) -> tuple | None:
    if t.shape == whole.shape and t.stride() == whole.stride() and t.storage_offset() == 0:
        return None
    return t.size(), t.stride(), t.storage_offset()
