"""Tensors that lie inside a larger buffer of NaN: a read past a mask turns the result NaN, a write past it is found."""

import contextlib
from unittest import mock

import torch
from torch import Tensor

_ZONE = 64
_zones: list[tuple[Tensor, Tensor]] = []


def in_red_zone(t: Tensor | None) -> Tensor | None:
    """A copy of `t`, with its strides, in a buffer that is NaN before, after and between its elements."""
    if t is None:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
    buffer = torch.full((span + 2 * _ZONE,), _poison(t.dtype), dtype=t.dtype, device=t.device)
    inside = buffer.as_strided(t.shape, t.stride(), _ZONE)
    inside.copy_(t)
    _remember(buffer, inside)
    return inside


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _remember(buffer: Tensor, inside: Tensor) -> None:
    owned = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
    owned.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(True)
    _zones.append((buffer, owned))


def _poisoned_empty(*size, dtype=None, device=None):
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    like = torch.zeros(shape, dtype=dtype, device=device)
    return in_red_zone(like).fill_(_poison(like.dtype))


@contextlib.contextmanager
def poisoned_outputs():
    """Every `torch.empty` inside is NaN with red zones around it; on leaving, all zones of the test are checked."""
    with mock.patch("torch.empty", _poisoned_empty):
        yield
    for buffer, owned in _zones:
        outside, poison = buffer[~owned], _poison(buffer.dtype)
        untouched = outside.isnan() if buffer.is_floating_point() else outside == poison
        assert untouched.all(), "a kernel wrote outside of its tensor"
    _zones.clear()
