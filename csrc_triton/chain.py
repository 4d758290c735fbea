"""Launches in a chain: on Hopper and newer each may begin before the one in front of it has ended.

The first lets the next begin at once. Each after it has one of these places (programmatic dependent launch; CUDA C++
programming guide):

    link    waits, before it reads or writes anything, until the one in front has ended and its writes are seen; then it lets
            the next begin. So all see what they would see one after another, whatever memory they share. What is saved is the
            time from one kernel's end to the start of the next.
    open    lets the next begin, then waits as a link does.
    midway  lets the next begin, and waits where it first reads what the one in front has written.
    late    lets the next begin, and runs beside all that are in front, of which it reads nothing; it ends when they have.

So with the end of a chain's last kernel all of it has ended. What a kernel that is no link writes has to be memory that nothing
else in its chain has used and given back: that may still be in use. Two threads that launch on one stream take turns at it.

A kernel that needs what an earlier one writes may wait for that one alone, or for some rows of it: the earlier one's programs
are counted while they are under way, each before it lets the next kernel begin, so that all have been counted by the time the
later one begins. The counts serve all of a device: what else is counted there makes a kernel wait longer, never shorter, and
ends by itself.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def join_chain(CHAIN: tl.constexpr, under_way_ptr=None, rounds=1):
    """What a kernel does first of all; CHAIN as from `next_place`. With counts this program is counted, for so many rounds."""
    if CHAIN == "link":
        gdc_wait()
    if under_way_ptr is not None:
        before = tl.atomic_add(under_way_ptr, 1)
        for i in range(1, rounds):
            before = tl.minimum(before, tl.atomic_add(under_way_ptr + i, 1))
        if CHAIN != "":  # noqa: SIM102 (a condition of its own decides what is compiled)
            # Always so, but not known before all is counted: the next kernel is let begin after that.
            if before >= 0:
                gdc_launch_dependents()
    elif CHAIN != "":
        gdc_launch_dependents()
    if CHAIN == "open":
        gdc_wait()


@triton.jit
def end_round(under_way_ptr, rounds_left):
    """What a counted program does at the end of a round, after which so many are left."""
    if under_way_ptr is not None:
        tl.debug_barrier()
        tl.atomic_add(under_way_ptr + rounds_left, -1, sem="release")


@triton.jit
def wait_for_counted(under_way_ptr):
    """Wait until no counted program is under way: then what they have written is seen."""
    if under_way_ptr is not None:
        while tl.atomic_add(under_way_ptr, 0, sem="acquire") != 0:
            pass


@triton.jit
def leave_chain(CHAIN: tl.constexpr):
    """What a kernel that may be "late" does last of all: a program of it waits, the others make room."""
    if CHAIN == "late":
        others = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2) - 1
        number = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        if number == others:
            gdc_wait()


class _Places(threading.local):
    left: Iterator[str] = itertools.repeat("")


_places = _Places()
turn = threading.RLock()
"""Held while a chain is launched."""
_counts: dict[torch.device, Tensor] = {}

MAX_ROUNDS = 8
"""Of more rows than these reach the pass ends before the GEMM begins, which costs a large GEMM least."""


class Counted(NamedTuple):
    """Programs that work in `rounds`, one after another, the first on the first `rows` rows of all. `under_way` (int32
    [MAX_ROUNDS]): its element i is how many programs of the device have more than i rounds before them."""

    under_way: Tensor
    rounds: int
    rows: int


def counts(device: torch.device) -> Tensor | None:
    """`Counted.under_way`, the same for all on this device; None while a stream is captured, if there was no need of it before:
    what is allocated then is the graph's."""
    found = _counts.get(device)
    if found is None and device.type == "cuda":
        if not torch.cuda.is_current_stream_capturing():
            # By a thread of its own: what this one allocates may be a graph's, too, that is to be captured next.
            thread = threading.Thread(target=_make_counts, args=(device,))
            thread.start()
            thread.join()
        return _counts.get(device)
    if found is None:
        _make_counts(device)
    return _counts[device]


def _make_counts(device: torch.device) -> None:
    made = torch.zeros(MAX_ROUNDS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        # All streams count there.
        torch.cuda.current_stream(device).synchronize()
    _counts.setdefault(device, made)


def lives_on(t: Tensor) -> bool:
    """Whether `t` has the same address for as long as this module."""
    return any(t is known for known in _counts.values())


@contextlib.contextmanager
def chained(possible: bool, *places: str) -> Iterator[None]:
    """This thread's launches of kernels that have a CHAIN are a chain, where that is `possible` (`configs.can_overlap`): one
    "first", then one at each of `places`, or where there are none given as many links as there are launches. One within
    another is a chain of its own."""
    before = _places.left
    if not possible:
        _places.left = itertools.repeat("")
    else:
        _places.left = itertools.chain(["first"], places or itertools.repeat("link"))
    try:
        with turn if possible else contextlib.nullcontext():
            yield
    finally:
        _places.left = before


def next_place() -> str:
    """The CHAIN of the launch that comes now; outside of a chain ``""``."""
    return next(_places.left)
