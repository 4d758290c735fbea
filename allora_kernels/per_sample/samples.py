"""How the rows of a batch are cut into samples: equal shares, or ranges of their own (`cu_seqlens`)."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = 64
"""A sample with more than this share of all rows is cut further, so that the chip is full when there are few."""

PIECE_ROWS = 128
"""The shortest such piece."""


@dataclass(frozen=True)
class Samples:
    """`count` samples of `rows` rows in all, none with more than `longest`.

    Ragged ones have `starts` (count + 1 host numbers) and, on the device, `cu_seqlens`, `pieces` and `first`, all int32: where
    each sample and each piece starts, and where a sample was cut into pieces, which is its first one. Nothing of that
    is read back from the device in a training step.
    """

    count: int
    rows: int
    longest: int
    starts: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None
    pieces: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def equal(cls, count: int, length: int) -> "Samples":
        """`count` samples of `length` rows each."""
        return cls(count, count * length, length)

    @classmethod
    def ragged(cls, cu_seqlens: Tensor) -> "Samples":
        """Sample i is the rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, for cu_seqlens [b + 1] (int32); the one place
        that reads it back.

        Raises:
            TypeError: `cu_seqlens` is no int32 tensor.
            ValueError: it has no element or two dimensions, does not start at 0, or decreases.
        """
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
            found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens must be an int32 Tensor [b + 1], got {found}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be [b + 1], got {list(cu_seqlens.shape)}")
        starts = tuple(cu_seqlens.tolist())
        if starts[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {starts[0]}")
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if any(length < 0 for length in lengths):
            i = next(i for i, length in enumerate(lengths) if length < 0)
            raise ValueError(f"cu_seqlens must not decrease, but [{i}] is {starts[i]} and [{i + 1}] is {starts[i + 1]}")
        rows = starts[-1]
        limit = max(PIECE_ROWS, -(-rows // PIECES))
        pieces = [p for start, stop in itertools.pairwise(starts) for p in range(start, max(stop, start + 1), limit)]
        longest = max(lengths, default=0)
        cu_seqlens = cu_seqlens.detach().contiguous()
        if longest <= limit:
            return cls(len(lengths), rows, longest, starts, cu_seqlens, cu_seqlens)
        first = [0]
        for length in lengths:
            first.append(first[-1] + max(1, -(-length // limit)))
        pieces, first = (torch.tensor(t, dtype=torch.int32).to(cu_seqlens.device) for t in ([*pieces, rows], first))
        return cls(len(lengths), rows, longest, starts, cu_seqlens, pieces, first)

    def spread(self, weights: Tensor) -> Tensor:
        """``weights [b]``, each repeated for the rows of its sample: [rows]."""
        if self.cu_seqlens is None:
            return weights.repeat_interleave(self.longest)
        return weights.repeat_interleave(self.cu_seqlens.diff(), output_size=self.rows)


@dataclass(frozen=True)
class Rows:
    """How the rows of a batch lie: `shape` of a layer's input before its last dimension, `dim` of it running over samples."""

    shape: tuple[int, ...]
    dim: int

    def by_sample(self, t: Tensor) -> Tensor:
        """t [rows, ...] with each sample's rows together; t itself where they are."""
        if self.dim == 0:
            return t
        return t.reshape(*self.shape, t.shape[-1]).movedim(self.dim, 0).reshape(t.shape)

    def as_they_lay(self, t: Tensor) -> Tensor:
        """`by_sample` undone."""
        if self.dim == 0:
            return t
        shape = list(self.shape)
        shape.insert(0, shape.pop(self.dim))
        return t.reshape(*shape, t.shape[-1]).movedim(0, self.dim).reshape(t.shape)
