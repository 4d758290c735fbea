"""What a recording keeps of an adapter: a `Call` of each forward pass, and afterwards all its samples in order, `Kept`."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layer.host_values import on_device
from .forward_passes import Forward
from .grouped import GroupSamples
from .samples import Samples


@dataclass
class Call:
    """What the backward passes left of the samples that one adapter of a layer had in a forward pass: their gradients `a`
    [b, *A's shape] and `b` [b, *B's shape]; or, where only norms were asked for, their `squares` [b], the gradients' sums
    `totals`, and `weigh`, which turns weights [b] into the weighted sums (dA, dB) and keeps what that takes."""

    count: int
    """How many samples the forward pass is of."""
    samples: Samples | GroupSamples
    places: tuple[int, ...] | None = None
    """Which of them went through this adapter; None for all."""
    a: Tensor | None = None
    b: Tensor | None = None
    squares: Tensor | None = None
    totals: tuple[Tensor, ...] = ()
    weigh: Callable[[Tensor], tuple[Tensor | None, Tensor | None]] | None = None

    def plus(self, other: "Call", name: str) -> "Call":
        """The gradients of the same samples in two calls, added up.

        Raises:
            ValueError: they are not of the same samples, or norms, which do not add up; of layer `name`.
        """
        if self.count != other.count:
            raise ValueError(f"layer {name!r} ran on {self.count} and on {other.count} samples")
        if self.places != other.places:
            raise ValueError(
                f"layer {name!r} ran twice on the same samples, with other adapters for them: name the same ones in each "
                "adapter_rows, or call backward after each forward pass"
            )
        if self.squares is not None:
            raise ValueError(
                f"layer {name!r} ran twice in one forward pass: norms of its gradients do not add up; record without "
                "norms_only"
            )
        a, b = (None if p is None else p + q for p, q in ((self.a, other.a), (self.b, other.b)))
        return Call(self.count, self.samples, self.places, a, b)


@dataclass
class Kept:
    """All that a recording kept of one adapter of a layer: its `calls`, and which of all `count` samples they are of, in
    order; None for all."""

    calls: list[Call]
    count: int
    places: tuple[int, ...] | None
    adapter: weakref.ref | None = None
    """The parameter lora_A: another adapter may have its name by now."""

    def spread(self, of_samples: Tensor) -> Tensor:
        """`of_samples` [this adapter's] among zeros for the others: [count]."""
        if self.places is None:
            return of_samples
        return of_samples.new_zeros(self.count).index_copy(0, self._index(of_samples), of_samples)

    def own(self, of_all: Tensor) -> Tensor:
        """What this adapter's samples have of `of_all` [count]."""
        return of_all if self.places is None else of_all[self._index(of_all)]

    def _index(self, like: Tensor) -> Tensor:
        return on_device(self.places, like.device, torch.int64)


def in_order(calls: dict[str, dict[Forward, Call]], runs: Sequence[Sequence[Forward]], layer: str) -> dict[str, Kept]:
    """What was kept of each adapter by name, from its `calls`: a run is the forward passes of the same samples, and the samples
    of the `runs` follow each other.

    Raises:
        ValueError: as `Call.plus`.
    """
    found = {name: Kept([], 0, None) for name in calls}
    places: dict[str, list[int]] = {name: [] for name in calls}
    start = 0
    for run in runs:
        count = next(of[forward].count for forward in run for of in calls.values() if forward in of)
        for name, of in calls.items():
            if own := [of[forward] for forward in run if forward in of]:
                call = functools.reduce(lambda one, other: one.plus(other, layer), own)
                found[name].calls.append(call)
                places[name] += [start + i for i in (range(count) if call.places is None else call.places)]
        start += count
    for name, kept in found.items():
        kept.count = start
        if places[name] != list(range(start)):
            kept.places = tuple(places[name])
    return found


records: WeakKeyDictionary[nn.Module, dict[str, Kept]] = WeakKeyDictionary()
"""By layer, what a finished recording kept of its adapters; of gradients that became `grad_sample` no calls."""
