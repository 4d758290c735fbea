"""Rows in groups that are cut into samples: the experts of a mixture, each with the rows of every sample that came to it."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..layer.by_group import by_group


@dataclass(frozen=True)
class GroupSamples:
    """`count` samples in each of E groups: sample i of group e is the rows ``pieces[e * count + i]`` to
    ``pieces[e * count + i + 1]`` (int32 [E * count + 1], on the device), often none; `of_row` [M] is each row's sample.
    Nothing of that is read back."""

    count: int
    pieces: Tensor
    of_row: Tensor

    @classmethod
    def of(cls, group: Tensor, sample: Tensor, groups: int, count: int) -> tuple[Tensor, "GroupSamples"]:
        """(the order [M] that sorts rows by group and sample, the samples of the sorted rows), for each row's `group` and
        `sample` [M]."""
        order, ends = by_group(group * count + sample, groups * count)
        return order, cls(count, F.pad(ends, (1, 0)), sample[order])

    def ends(self, groups: int) -> Tensor:
        """Where each group ends, int32 [groups]."""
        return self.pieces[self.count :: self.count].contiguous() if self.count else self.pieces.new_zeros(groups)

    def spread(self, weights: Tensor) -> Tensor:
        """``weights [count]``, for each row that of its sample: [M]."""
        return weights[self.of_row]
