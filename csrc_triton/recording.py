"""What a call of a launcher did, as data: the tensors it allocated, its launches and its products by the vendor's GEMM.

Every pointer of it is an offset into one of the call's tensors, so that `replay` can do the same with other tensors. Only what
allocates, views, launches and adds a product in place can be recorded.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .chain import lives_on
from .configs import cdiv
from .launching import constexprs, is_descriptor, watch

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
_PRODUCTS = (torch.ops.aten.addmm_.default,)
_ALIGNMENT = 512
MAX_DESCRIPTORS = 64
"""How many descriptors of one place are kept: a weight has one, an activation as many as the addresses it takes in turns."""


class Slot(NamedTuple):
    """Where something lies: `offset` bytes from the first element of tensor number `tensor` of a recording."""

    tensor: int
    offset: int
    dtype: torch.dtype


class View(NamedTuple):
    """All of tensor number `tensor` of a recording, or where there is a `geometry` a part of it: size, stride, and how many
    elements after its first one it begins."""

    tensor: int
    geometry: tuple[torch.Size, tuple[int, ...], int] | None


class Described(NamedTuple):
    """A descriptor of what lies at `slot`, with those of it that were made, by the address they are for."""

    descriptor: TensorDescriptor
    slot: Slot
    made: dict[int, TensorDescriptor]

    def at(self, address: int) -> TensorDescriptor:
        """The descriptor for what lies at `address`."""
        found = self.made.get(address)
        if found is None:
            if len(self.made) >= MAX_DESCRIPTORS:
                self.made.clear()
            found = self.made[address] = described(self.descriptor, Address(address, self.slot.dtype))
        return found


class Launch(NamedTuple):
    """A launch of what was `compiled`, or by the interpreter of `kernel` with `options`. Its arguments are those of the
    recording's values that have these `numbers`: `pick` takes them out."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    pick: Callable[[Sequence], tuple]
    numbers: tuple[int, ...]


class Product(NamedTuple):
    """A call of torch's `function` on these tensors, the first of which it changes."""

    function: Callable
    args: tuple[View, ...]


class Recording(NamedTuple):
    """One kind of call. Its tensors are numbered: its inputs, then one for each of `allocated` (size, dtype), whose memory is
    the results', then `scratch_bytes` for all that it allocates and does not return. Its launches take `values`, in which
    addresses and descriptors are left out: those of `slots` and `descriptors`, each with its number."""

    device: torch.device
    allocated: tuple[tuple[torch.Size, torch.dtype], ...]
    scratch_bytes: int
    values: list
    slots: tuple[tuple[int, Slot], ...]
    descriptors: tuple[tuple[int, Described], ...]
    steps: tuple[Launch | Product, ...]
    results: View | tuple[View, ...] | None


class Address(NamedTuple):
    """What a descriptor needs of the tensor that it describes."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def described(descriptor: TensorDescriptor, base: Address) -> TensorDescriptor:
    """`descriptor` for what lies at `base`."""
    # What its constructor checks has been checked.
    new = object.__new__(type(descriptor))
    new.__dict__.update(descriptor.__dict__, base=base)
    return new


def record(launcher: Callable, args: tuple) -> tuple[Any, Recording | None]:
    """``launcher(*args)``, and the recording of it, None where it cannot be recorded."""
    recorder = _Recorder()
    with recorder:
        result = launcher(*args)
    inputs = [argument for argument in args if isinstance(argument, Tensor)]
    try:
        return result, _recording(inputs, recorder, result)
    except LookupError:
        return result, None


class _Recorder(TorchDispatchMode):
    """Notes what is done within it, and holds on to all tensors, so that none has the address of one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.steps: list[Callable[[_Places, _Values], Launch | Product]] = []
        self.unknown: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func in _PRODUCTS and not kwargs:
            self.steps.append(lambda places, values: Product(func, tuple(map(places.view, args))))
        elif not (func.is_view and _is_part(result, args[0])):
            self.unknown = str(func)
        return result

    def __enter__(self):
        watch.watcher = lambda *launch: self.steps.append(lambda places, values: _launch(*launch, places, values))
        return super().__enter__()

    def __exit__(self, *error):
        watch.watcher = None
        return super().__exit__(*error)


class _Place(NamedTuple):
    """The addresses from `start` up to `stop`, of tensor number `tensor`, whose first element is at `origin`."""

    start: int
    stop: int
    tensor: int
    origin: int


class _Places:
    """Which of a recording's tensors a tensor of the recorded call belongs to. LookupError where it belongs to none."""

    def __init__(self, inputs: list[Tensor], kept: list[Tensor], scratch: list[Tensor]) -> None:
        self.tensors = [*inputs, *kept]
        self.places = [_Place(*_extent(t), number, t.data_ptr()) for number, t in enumerate(self.tensors)]
        self.scratch_bytes = 0
        for t in scratch:
            # As if the scratch memory began that far before it.
            self.places.append(_Place(*_extent(t), len(self.tensors), t.data_ptr() - self.scratch_bytes))
            self.scratch_bytes += cdiv(t.nbytes, _ALIGNMENT) * _ALIGNMENT
        if any(place.start == place.stop for place in self.places[: len(inputs)]):
            raise LookupError("an empty input")
        if any(a.stop > b.start for a, b in pairwise(sorted(self.places[: len(inputs)]))):
            raise LookupError("inputs that overlap")

    def slot(self, t: Tensor) -> Slot:
        address = t.data_ptr()
        for place in self.places:
            if place.start <= address < place.stop:
                return Slot(place.tensor, address - place.origin, t.dtype)
        raise LookupError("neither an argument nor allocated")

    def view(self, t: Tensor) -> View:
        number, offset, dtype = self.slot(t)
        if number == len(self.tensors) or dtype != self.tensors[number].dtype:
            raise LookupError("not a part of a tensor that there is when it is replayed")
        return _view(t, number, self.tensors[number], offset // dtype.itemsize)


def _recording(inputs: list[Tensor], recorder: _Recorder, result: Any) -> Recording:
    if recorder.unknown is not None:
        raise LookupError(recorder.unknown)
    results = () if result is None else (result,) if isinstance(result, Tensor) else result
    owners = {_storage(t): t for t in recorder.allocated}
    kept = {storage: owners[storage] for storage in map(_storage, results)}
    numbers = {storage: len(inputs) + i for i, storage in enumerate(kept)}
    places = _Places(inputs, list(kept.values()), [t for storage, t in owners.items() if storage not in kept])

    def returned(t: Tensor) -> View:
        # Not by its address, which all that are empty share.
        whole = kept[_storage(t)]
        if t.dtype != whole.dtype:
            raise LookupError("a result in another dtype than was allocated")
        return _view(t, numbers[_storage(t)], whole, t.storage_offset())

    found = tuple(map(returned, results))
    values = _Values()
    steps = tuple(step(places, values) for step in recorder.steps)
    return Recording(
        inputs[0].device,
        tuple((t.shape, t.dtype) for t in kept.values()),
        places.scratch_bytes,
        values.all,
        tuple((number, slot) for slot, number in values.slots.items()),
        tuple(values.descriptors),
        steps,
        None if result is None else found[0] if isinstance(result, Tensor) else found,
    )


class _Values:
    """What the launches of a recording take: `all` but for tensors, each at its number."""

    def __init__(self) -> None:
        self.all: list = []
        self.slots: dict[Slot, int] = {}
        self.descriptors: list[tuple[int, Described]] = []

    def number(self, argument: Any, places: _Places) -> int:
        """The number of a launch's argument. A tensor has one for all launches."""
        if isinstance(argument, Tensor) and not lives_on(argument):
            slot = places.slot(argument)
            if slot not in self.slots:
                self.slots[slot] = self._add(None)
            return self.slots[slot]
        if is_descriptor(argument):
            slot = places.slot(argument.base)
            blank = described(argument, Address(0, slot.dtype))
            self.descriptors.append((self._add(None), Described(blank, slot, {})))
            return self.descriptors[-1][0]
        return self._add(argument)

    def _add(self, value: Any) -> int:
        self.all.append(value)
        return len(self.all) - 1


def _launch(
    kernel,
    grid: tuple[int, ...],
    args: tuple,
    options: dict[str, Any],
    compiled: Any,
    places: _Places,
    values: _Values,
) -> Launch:
    if compiled is None and isinstance(kernel, JITFunction):
        raise LookupError("a hook has kept the compiled kernel to itself")
    args = args if compiled is None else (*args, *constexprs(kernel, options))
    numbers = tuple(values.number(argument, places) for argument in args)
    return Launch(kernel, compiled, (*grid, 1, 1)[:3], options, itemgetter(*numbers), numbers)


def _view(t: Tensor, number: int, whole: Tensor, offset: int) -> View:
    if offset == 0 and t.shape == whole.shape and t.stride() == whole.stride():
        return View(number, None)
    return View(number, (t.size(), t.stride(), offset))


def _extent(t: Tensor) -> tuple[int, int]:
    elements = 0 if t.numel() == 0 else 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + elements * t.itemsize


def _is_part(result: Tensor | Sequence[Tensor], whole: Tensor) -> bool:
    # Of some ops that may be views the schema does not say when they copy.
    parts = (result,) if isinstance(result, Tensor) else result
    return all(_storage(part) == _storage(whole) for part in parts)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
