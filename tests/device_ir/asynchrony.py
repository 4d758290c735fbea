"""What runs beside a program's threads, as late and as early as it may: copies by the tensor memory unit, matrix products.

ttsem 0.1.0 does such a step at once, so that a wait too few changes nothing. Here a copy spoils what it overwrites when it is
begun and brings its data when its barrier is waited for; a product's sum is NaN until it is waited for, and its operands must
then be what they were; a store's buffer must not change before that is waited for. What counted programs write
(`csrc_triton.chain`) is NaN to each program of a later kernel until it has waited for the round that writes it.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Container, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from ttsem import ops


class Unordered(AssertionError):
    """Nothing orders two steps of which one needs the other."""


@dataclasses.dataclass(eq=False)
class Reading:
    """Something that reads these buffers, in which this was when it began."""

    buffers: list[np.ndarray]
    before: list[np.ndarray]
    finish: Any = None

    @classmethod
    def of(cls, buffers, finish=None):
        return cls(buffers, [b.copy() for b in buffers], finish)

    def end(self, what: str) -> None:
        for buffer, before in zip(self.buffers, self.before):
            if buffer.tobytes() != before.tobytes():
                raise Unordered(f"what {what} reads is overwritten before it has read it")
        if self.finish is not None:
            self.finish()


@dataclasses.dataclass(eq=False)
class Arriving:
    """A copy to `buffer`, of which `barrier` is told."""

    buffer: np.ndarray
    data: np.ndarray
    barrier: Any


@dataclasses.dataclass
class ByRounds:
    """What counted programs write: `tensors` of as many rows each, `rows` of these a round in `rounds` rounds, counted at
    the address `counts`."""

    tensors: list[torch.Tensor]
    rows: int
    rounds: int
    counts: int

    def row_of(self, addresses: np.ndarray) -> np.ndarray:
        """Which row each address lies in, -1 where in none."""
        found = np.full(addresses.shape, -1)
        for t in self.tensors:
            offset = addresses - t.data_ptr()
            found = np.where((offset >= 0) & (offset < t.nbytes), offset // (t.stride(0) * t.itemsize), found)
        return found


@dataclasses.dataclass
class ByTiles:
    """What some tiles of a GEMM write for the others: `tensor`, `rows` of it a tile, of which each has its count in `counts`,
    1 until it is written; its last element is how many tiles `programs` have taken. Programs run one after another, so a launch
    runs twice: first all waits end at once, and what they wait for is NaN to all; the second time it is what the first has
    written. They get their tiles as if they took turns."""

    tensor: torch.Tensor
    rows: int
    counts: torch.Tensor
    programs: int
    is_written: bool = False
    ended: int = 0

    @property
    def tiles(self) -> int:
        """How many write what the others need."""
        return len(self.counts) - 1

    def tile_counted_at(self, address: int) -> int | None:
        """The tile whose count is at this address; `tiles` where that of the taken ones is."""
        offset = address - self.counts.data_ptr()
        return offset // 4 if 0 <= offset < self.counts.nbytes else None

    def rows_at(self, addresses: np.ndarray) -> np.ndarray:
        """The rows of `tensor` that these addresses lie in."""
        offsets = addresses - self.tensor.data_ptr()
        inside = (offsets >= 0) & (offsets < self.tensor.nbytes)
        return offsets[inside] // (self.tensor.stride(0) * self.tensor.itemsize)


class UnderWay:
    """All that one program has begun, and how much of it there has been."""

    def __init__(self) -> None:
        self.copies: list[Arriving] = []
        self.products: list[Reading] = []
        self.stores: list[Reading] = []
        self.sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.unfenced: list[np.ndarray] = []
        self.read_by_some: list[np.ndarray] = []
        self.waited_for_kernel_in_front = False
        self.rows_there = 0
        self.tiles_there: set[int] = set()
        self.written_rows: set[int] = set()
        self.written_by_some = False
        self.taken: list[int] = []

    def end(self) -> None:
        for what in ("copies", "products", "stores"):
            if getattr(self, what):
                raise Unordered(f"the program ends before its {what} do")


def overlap(buffers: list[np.ndarray], buffer: np.ndarray) -> bool:
    return any(np.shares_memory(buffer, other) for other in buffers)


@contextlib.contextmanager
def not_a_race(memory) -> Iterator[None]:
    """What is read within is ordered by what ttsem does not know of."""
    before, memory.access_log, memory.access_spans = (memory.access_log, memory.access_spans), None, None
    try:
        yield
    finally:
        memory.access_log, memory.access_spans = before


class Asynchrony:
    """Handlers of the operations that begin something or wait for it. `after_kernel_in_front`: the addresses of what the
    kernel in front of this one writes."""

    def __init__(self) -> None:
        self.now = UnderWay()
        self.after_kernel_in_front: Container[int] = range(0)
        self.by_rounds: ByRounds | None = None
        self.by_tiles: ByTiles | None = None
        self.counts = {"copies": 0, "products": 0, "stores": 0, "programs": 0}

    def load(self, interp, op, args):
        desc, coords, _, barrier, dest, pred = ops._segments(op, args, 6)
        if pred and not bool(np.asarray(pred[0])):
            return []
        desc, buffer = ops._desc(op, desc), ops._md(op, dest).data
        if overlap([copy.buffer for copy in self.now.copies], buffer):
            raise Unordered("two copies to one buffer")
        if overlap(self.now.read_by_some, buffer):
            raise Unordered("a copy to what other warps may still read")
        if int(desc.base) in self.after_kernel_in_front and not self.now.waited_for_kernel_in_front:
            raise Unordered("a copy of what the kernel in front may not have written")
        if overlap(self.now.unfenced, ops._md(op, barrier).data):
            raise Unordered("a copy that tells a barrier which the tensor memory unit may not see yet")
        of_tiles = self.by_tiles is not None and int(desc.base) == self.by_tiles.tensor.data_ptr()
        with not_a_race(interp.memory) if of_tiles else contextlib.nullcontext():
            data = ops._desc_block(interp, desc, *ops._desc_pointers(desc, coords), buffer.dtype)
        if self.by_rounds is not None:
            rows = self.by_rounds.row_of(np.asarray(int(desc.base)))
            if rows >= 0:
                first = int(rows) + int(np.asarray(coords[0]))
                data = data.copy()
                data.view(np.uint16)[max(0, self.now.rows_there - first) :] = 0xFFFF
        if of_tiles and int(np.asarray(coords[0])) // self.by_tiles.rows not in self.now.tiles_there:
            data = data.copy()
            data.view(np.uint16)[...] = 0xFFFF
        buffer.view(np.uint16)[...] = 0xFFFF  # NaN, in either 16-bit type
        self.now.copies.append(Arriving(buffer, data, ops._barrier(interp, op, barrier)))
        self.counts["copies"] += 1
        return []

    def make_barrier(self, interp, op, args):
        self.now.unfenced.append(ops._md(op, args).data)
        return ops_before["ttng.init_barrier"](interp, op, args)

    def wait_barrier(self, interp, op, args):
        alloc, phase, *_ = ops._segments(op, args, 4)
        barrier, parity = ops._barrier(interp, op, alloc), ops._scalar(phase[0]) & 1
        for copy in [copy for copy in self.now.copies if copy.barrier is barrier]:
            if barrier.passes(parity):
                break
            copy.buffer[...] = copy.data
            barrier.complete_tx(copy.buffer.nbytes)
            self.now.copies.remove(copy)
        if not barrier.passes(parity):
            raise Unordered("a wait for what nothing before it brings")
        return []

    def multiply(self, interp, op, args):
        a, b, acc = args[:3]
        if any(overlap(self.now.unfenced, t.data) for t in (a, b) if isinstance(t, ops.MemDesc)):
            raise Unordered("a product of what the matrix unit may not see yet")
        _, acc = self.now.sums.get(id(acc), (None, acc))
        operands = [t.data for t in (a, b) if isinstance(t, ops.MemDesc)]
        (total,) = ops_before["ttng.warp_group_dot"](interp, op, [a, b, acc, *args[3:]])
        shown = np.full_like(total, np.nan)

        def finish():
            del self.now.sums[id(shown)]
            shown[...] = total
            self.now.read_by_some += operands

        self.now.sums[id(shown)] = (shown, total)
        self.now.products.append(Reading.of(operands, finish))
        self.counts["products"] += 1
        return [shown]

    def wait_products(self, interp, op, args):
        self._wait(self.now.products, op, "a product")
        return list(args[: len(op.result_types)])

    def store_shared(self, interp, op, args):
        written = [t.data for t in args if isinstance(t, ops.MemDesc)]
        if any(overlap(self.now.read_by_some, buffer) for buffer in written):
            raise Unordered("a write to what other warps may still read")
        self.now.unfenced += written
        return ops_before["ttg.local_store"](interp, op, args)

    def fence(self, interp, op, args):
        self.now.unfenced.clear()
        return []

    def store(self, interp, op, args):
        buffer = ops._md(op, args, len(args) - 1).data
        if overlap(self.now.unfenced, buffer):
            raise Unordered("a store of what the tensor memory unit may not see yet")
        self.now.stores.append(Reading.of([buffer]))
        self.counts["stores"] += 1
        return ops_before["ttng.async_tma_copy_local_to_global"](interp, op, args)

    def wait_stores(self, interp, op, args):
        self._wait(self.now.stores, op, "a store")
        return []

    def _wait(self, under_way, op, what):
        pendings = int(ops._attr(op, "pendings", 0))
        while len(under_way) > pendings:
            under_way.pop(0).end(what)

    def barrier(self, interp, op, args):
        self.now.read_by_some.clear()
        self.now.written_by_some = False
        return []

    def global_store(self, interp, op, args):
        if self.by_tiles is not None:
            addresses = np.asarray(args[0], dtype=np.int64)
            if len(args) > 2:
                addresses = addresses[np.broadcast_to(np.asarray(args[2], bool), addresses.shape)]
            rows = self.by_tiles.rows_at(addresses)
            self.now.written_rows.update(rows.ravel().tolist())
            self.now.written_by_some |= rows.size > 0
        return ops_before["tt.store"](interp, op, args)

    def global_load(self, interp, op, args):
        (found,) = ops_before["tt.load"](interp, op, args)
        if self.by_rounds is None:
            return [found]
        rows = self.by_rounds.row_of(np.asarray(args[0], dtype=np.int64))
        if len(args) > 1:
            # What is masked out may point anywhere.
            rows = np.where(np.asarray(args[1], bool), rows, -1)
        nan = np.frombuffer(b"\xff" * found.itemsize, found.dtype)[0]
        return [np.where(rows < self.now.rows_there, found, nan)]

    def atomic(self, interp, op, args):
        tile = None if self.by_tiles is None else self._tile_counted_at(int(np.asarray(args[0])))
        if tile is not None and tile < self.by_tiles.tiles:
            self._counted_down(tile)
        (found,) = ops_before["tt.atomic_rmw"](interp, op, args)
        if tile is not None and tile == self.by_tiles.tiles:
            programs = self.by_tiles.programs
            number = self.by_tiles.ended % programs + len(self.now.taken) * programs
            self.now.taken.append(number)
            return [np.full_like(found, number)]
        if self.by_rounds is not None and not np.any(np.asarray(args[1])):
            self.polled(int(np.asarray(args[0])), found)
        return [found]

    def polled(self, address, found):
        if np.any(found):
            raise Unordered("a wait for a program that has not ended its round")
        rounds_left = (address - self.by_rounds.counts) // 4
        self.now.rows_there = max(self.now.rows_there, (self.by_rounds.rounds - rounds_left) * self.by_rounds.rows)

    def _tile_counted_at(self, address):
        if address in self.after_kernel_in_front and not self.now.waited_for_kernel_in_front:
            raise Unordered("a count that the kernel in front may not have written")
        return self.by_tiles.tile_counted_at(address)

    def _counted_down(self, tile):
        rows = self.by_tiles.rows
        if self.now.tiles_there:
            raise Unordered("what waits for a tile comes before one that others wait for")
        if self.now.written_by_some:
            raise Unordered("other warps may not have written what is said to be there")
        if not self.now.written_rows.issuperset(range(tile * rows, min((tile + 1) * rows, len(self.by_tiles.tensor)))):
            raise Unordered("what is said to be there is not written")

    def assembly(self, interp, op, args):
        if "ld.acquire.gpu" in op.text:
            address = np.asarray(args[0], np.int64)
            found = interp.memory.atomic("add", address, np.zeros((), np.int32), None)
            if self.by_tiles is not None:
                self.now.tiles_there.add(self._tile_counted_at(int(address)))
                if self.by_tiles.is_written and found > 0:
                    raise Unordered("a wait for a tile that is not written")
                return [np.zeros_like(found)]
            self.polled(int(address), found)
            return [found]
        if "griddepcontrol" not in op.text:
            return ops_before["tt.elementwise_inline_asm"](interp, op, args)
        if self.by_tiles is not None and "launch_dependents" in op.text:
            self._let_next_begin()
        if "griddepcontrol.wait" in op.text:
            self.now.waited_for_kernel_in_front, self.now.rows_there = True, sys.maxsize
        return [np.zeros((), np.int32)]

    def _let_next_begin(self):
        # The others may have taken no later ones.
        if self.now.taken[-1] + self.by_tiles.programs < self.by_tiles.tiles:
            raise Unordered("the next kernel may begin before all that it waits for is taken")

    def end(self, interp, op, args):
        self.now.end()
        self.now = UnderWay()
        self.counts["programs"] += 1
        if self.by_tiles is not None:
            self.by_tiles.ended += 1
        return ops_before["tt.return"](interp, op, args)


ops_before = dict(ops.OPS)


@contextlib.contextmanager
def as_late_as_allowed() -> Iterator[Asynchrony]:
    """Kernels launched within run so; `Unordered` where that shows."""
    found = Asynchrony()
    handlers = {
        "ttng.async_tma_copy_global_to_local": found.load,
        "ttng.init_barrier": found.make_barrier,
        "ttng.wait_barrier": found.wait_barrier,
        "ttng.warp_group_dot": found.multiply,
        "ttng.warp_group_dot_wait": found.wait_products,
        "ttg.local_store": found.store_shared,
        "ttng.fence_async_shared": found.fence,
        "ttng.async_tma_copy_local_to_global": found.store,
        "ttng.async_tma_store_wait": found.wait_stores,
        "ttg.barrier": found.barrier,
        "gpu.barrier": found.barrier,
        "tt.elementwise_inline_asm": found.assembly,
        "tt.load": found.global_load,
        "tt.store": found.global_store,
        "tt.atomic_rmw": found.atomic,
        "tt.return": found.end,
    }
    with mock.patch.dict(ops.OPS, handlers):
        yield found
