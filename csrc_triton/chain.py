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
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def join_chain(CHAIN: tl.constexpr):
    """What a kernel does first of all; CHAIN as from `next_place`."""
    if CHAIN == "link":
        gdc_wait()
    if CHAIN != "":
        gdc_launch_dependents()
    if CHAIN == "open":
        gdc_wait()


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
_turn = threading.RLock()


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
        with _turn if possible else contextlib.nullcontext():
            yield
    finally:
        _places.left = before


def next_place() -> str:
    """The CHAIN of the launch that comes now; outside of a chain ``""``."""
    return next(_places.left)
