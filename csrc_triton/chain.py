"""Launches in a chain: on Hopper and newer each may begin before the one in front of it has ended.

The first lets the next begin at once. Each after it waits, before it reads or writes anything, until the one in front has
ended and its writes are seen; then it lets the next one begin. So they see what they would see one after another, whatever
memory they share and whatever else comes between two of them. What is saved is the time from one kernel's end to the start of
the next. (Programmatic dependent launch; CUDA C++ programming guide.)
"""

import contextlib
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


class _Place(threading.local):
    next: str = ""


_place = _Place()


@contextlib.contextmanager
def chained(possible: bool) -> Iterator[None]:
    """This thread's launches of kernels that have a CHAIN are a chain, where that is `possible` (`configs.can_overlap`). One
    within another is a chain of its own."""
    before, _place.next = _place.next, "first" if possible else ""
    try:
        yield
    finally:
        _place.next = before


def next_place() -> str:
    """The CHAIN of the launch that comes now: ``"first"``, then ``"link"``; outside of a chain ``""``."""
    place = _place.next
    if place == "first":
        _place.next = "link"
    return place
