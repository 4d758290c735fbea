"""Adapters of different ranks, rules and dtypes as groups: their factors in one tensor, and which rows are whose."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..layer.by_group import by_group
from ..layer.host_values import on_device


def check_indices(name: str, t: Tensor) -> None:
    """TypeError unless `t`, called `name`, has a dtype that rows and groups are counted in."""
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {t.dtype}")


class Rule(NamedTuple):
    """The groups from `start` to `stop` train under `norm`, each with its own of `etas`."""

    norm: str | None
    start: int
    stop: int
    etas: tuple[float, ...]

    def inv_etas_squared(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Each group's 1/η² ``[stop - start]``; None where all have the same."""
        return None if len(set(self.etas)) == 1 else _table(tuple(eta**-2 for eta in self.etas), device, dtype)


@dataclass(frozen=True)
class Layout:
    """Where each adapter is among the groups, as constants of a call: nothing here lies on a device.

    Those of one rule stand together. The groups after all adapters are empty, so that a few adapters more or fewer make no
    other shapes."""

    slots: tuple[int, ...]
    """The group of each adapter."""
    ranks: tuple[int, ...]
    rules: tuple[Rule, ...]
    groups: int
    dtype: torch.dtype
    """The widest of the factors'."""

    @classmethod
    def of(cls, adapters: Sequence) -> "Layout":
        """The layout of these `Adapter`s."""
        norms = list(dict.fromkeys(adapter.norm for adapter in adapters))
        by_rule = sorted(range(len(adapters)), key=lambda e: norms.index(adapters[e].norm))
        slots = [0] * len(adapters)
        for slot, e in enumerate(by_rule):
            slots[e] = slot
        groups, rules, start = _padded(len(adapters)), [], 0
        for norm in norms:
            etas = [float(adapters[e].eta) for e in by_rule if adapters[e].norm == norm]
            stop = start + len(etas)
            if norm == norms[-1]:
                # The empty groups are of the last rule.
                stop, etas = groups, etas + etas[-1:] * (groups - stop)
            rules.append(Rule(norm, start, stop, tuple(etas)))
            start = stop
        ranks = tuple(adapter.lora_A.shape[0] for adapter in adapters)
        dtypes = (t.dtype for adapter in adapters for t in (adapter.lora_A, adapter.lora_B))
        return cls(tuple(slots), ranks, tuple(rules), groups, functools.reduce(torch.promote_types, dtypes))

    def rule_of(self, adapter: int) -> tuple[float, str | None]:
        """(eta, norm) of this adapter."""
        slot = self.slots[adapter]
        rule = next(rule for rule in self.rules if rule.start <= slot < rule.stop)
        return rule.etas[slot - rule.start], rule.norm

    def rows(self, row_adapter: Tensor) -> tuple[Tensor, Tensor]:
        """``(order [M], ends [groups])``, both int32, for row_adapter [M]: the rows by group, those of one in their order and
        those without an adapter last."""
        group = row_adapter
        if self.slots != tuple(range(len(self.slots))):
            # -1 is the last entry.
            group = _table((*self.slots, self.groups), row_adapter.device, torch.int64)[row_adapter]
        order, ends = by_group(torch.where(group < 0, self.groups, group), self.groups)
        return order.to(torch.int32), ends

    def rows_of_samples(self, adapters: Sequence[int], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`rows` where sample i has `length` rows in succession and goes through adapter ``adapters[i]``, or -1: without a
        sort."""
        slots = [self.groups if adapter < 0 else self.slots[adapter] for adapter in adapters]
        samples = on_device(sorted(range(len(slots)), key=slots.__getitem__), device, torch.int32)
        ends = [length * sum(slot <= group for slot in slots) for group in range(self.groups)]
        order = samples[:, None] * length + torch.arange(length, device=device, dtype=torch.int32)
        return order.reshape(-1), on_device(ends, device, torch.int32)

    def pack(self, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``A [groups, R, K]`` and ``B [groups, N, R]`` with R the next multiple of 16 over all ranks, so that loads are wide.
        Where an adapter has less they are zero, which changes no norm and no product."""
        rank, k, n = -(-max(self.ranks) // 16) * 16, lora_A[0].shape[1], lora_B[0].shape[0]
        a = lora_A[0].new_zeros(self.groups, rank, k, dtype=self.dtype)
        b = lora_A[0].new_zeros(self.groups, n, rank, dtype=self.dtype)
        own = [(a[slot, :r], b[slot, :, :r]) for slot, r in zip(self.slots, self.ranks)]
        torch._foreach_copy_([part for pair in own for part in pair], [t for pair in zip(lora_A, lora_B) for t in pair])
        return a, b


def _padded(count: int) -> int:
    """`count` rounded up by at most 3, or a quarter: kernels are compiled for a number of groups."""
    step = max(4, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


def _table(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A constant on the device, kept there, so that a step that finds it copies nothing."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        # What is traced may be no real tensor.
        return torch.tensor(values, device=device, dtype=dtype)
    return _kept(values, device, dtype)


@functools.lru_cache(maxsize=256)
def _kept(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        made = on_device(values, device, dtype)
    if device.type == "cuda":
        # All streams read it there, and only this one waits for its copy by itself. No stream that is captured comes here: to
        # make it there was an error.
        torch.cuda.current_stream(device).synchronize()
    return made
