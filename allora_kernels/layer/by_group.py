"""Rows that belong to groups, brought together by group."""

import torch
from torch import Tensor


def by_group(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """``(order [M], ends [groups])`` for the group of each row, group [M]: the order that sorts the rows by group, those of one
    in their own order, and where each group ends among them, int32. What has a number of `groups` or more comes last."""
    found, order = torch.sort(group, stable=True)
    every = torch.arange(groups, device=group.device, dtype=group.dtype)
    return order, torch.searchsorted(found, every, right=True, out_int32=True)
