"""What a recording keeps of an adapter: a `Call` of each forward pass, and afterwards all its samples in order, `Kept`."""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layer.host_values import on_device
from .forward_passes import Forward
from .grouped import GroupSamples
from .samples import Samples

_moments = itertools.count()


@dataclass
class Block:
    """When a recording began and ended, among the beginnings and ends of all: those that were open together may be of the same
    samples."""

    began: int = field(default_factory=lambda: next(_moments))
    ended: int | None = None

    def end(self) -> None:
        self.ended = next(_moments)


class Weighing:
    """``sums(w)``: (dA, dB) of samples with the weights w [b], from `tensors`, which must stay as they are until then."""

    def __init__(
        self, sums: Callable[[Tensor], tuple[Tensor | None, Tensor | None]], tensors: Iterable[Tensor | None]
    ) -> None:
        self.sums = sums
        self._versions = [(t, t._version) for t in tensors if t is not None]

    @property
    def is_stale(self) -> bool:
        """Whether one of the tensors was written to since."""
        return any(t._version != version for t, version in self._versions)


@dataclass
class Call:
    """What the backward passes left of the samples that one adapter of a layer had in a forward pass: their gradients `a`
    [b, *A's shape] and `b` [b, *B's shape]; or, where only norms were asked for, their `squares` [b], the gradients' sums
    `totals` (dA, dB), and `weighing`, which sums them with weights later and keeps what that takes."""

    count: int
    """How many samples the forward pass is of."""
    samples: Samples | GroupSamples
    places: tuple[int, ...] | None = None
    """Which of them went through this adapter; None for all."""
    a: Tensor | None = None
    b: Tensor | None = None
    squares: Tensor | None = None
    totals: tuple[Tensor | None, Tensor | None] = (None, None)
    weighing: Weighing | None = None

    @property
    def where(self) -> tuple[int, ...]:
        """`places`, also where they are all."""
        return tuple(range(self.count)) if self.places is None else self.places

    @property
    def factors(self) -> tuple[bool, bool]:
        """Whether there are gradients of lora_A, and of lora_B."""
        of_a, of_b = zip((self.a, self.b), self.totals)
        return any(t is not None for t in of_a), any(t is not None for t in of_b)

    def plus(self, other: "Call", name: str) -> "Call":
        """The gradients of the same samples in two calls, added up.

        Raises:
            ValueError: they are not of the same samples, or norms, which do not add up; of layer `name`.
        """
        if self.count != other.count:
            raise ValueError(f"layer {name!r} ran on {self.count} and on {other.count} samples")
        if self.where != other.where:
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


class Run(NamedTuple):
    """The forward passes of the same `count` samples."""

    forwards: tuple[Forward, ...]
    count: int


@dataclass
class Kept:
    """All that a recording kept of one adapter of a layer: its `calls`, and which of all `count` samples they are of, in
    order; None for all."""

    calls: list[Call]
    count: int
    places: tuple[int, ...] | None = None
    named: bool = False
    """Whether samples named their adapters: then the others went through another one."""
    adapter: weakref.ref | None = None
    """The parameter lora_A: another adapter may have its name by now."""
    block: Block | None = None
    """Of the recording; None of gradients that were read from a file or set by other hands."""

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


def in_order(calls: dict[str, dict[Forward, Call]], runs: Sequence[Run], layer: str) -> dict[str, Kept]:
    """What was kept of each adapter by name, from its `calls` in a layer; the samples of the `runs` follow each other.

    Raises:
        ValueError: as `Call.plus`; or some passes have gradients of a factor and some have not.
    """
    found, total = {}, sum(run.count for run in runs)
    for name, of in calls.items():
        kept, places, start = Kept([], total), [], 0
        for run in runs:
            if own := [of[forward] for forward in run.forwards if forward in of]:
                kept.calls.append(functools.reduce(lambda one, other: one.plus(other, layer), own))
                places += [start + i for i in kept.calls[-1].where]
            start += run.count
        if len({call.factors for call in kept.calls}) > 1:
            raise ValueError(f"a factor of layer {layer!r} was frozen or freed between the passes of one record")
        kept.named = any(call.places is not None for call in kept.calls)
        kept.places = None if places == list(range(total)) else tuple(places)
        found[name] = kept
    return found


records: WeakKeyDictionary[nn.Module, dict[str, Kept]] = WeakKeyDictionary()
"""By layer, what a finished recording kept of its adapters; of gradients that became `grad_sample` no calls."""
