"""Samples as the segments of a sweep. Pure Python, but for the tensors it carries."""

from typing import NamedTuple

from torch import Tensor

from . import configs
from .configs import cdiv
from .sweep import Cut
from .sweep_plan import rows_of_a_segment


class Segments(NamedTuple):
    """How M rows are cut into samples: `count` of them, none with more than `longest` rows.

    Equal samples have `longest` rows each and no tensors. Ragged ones have `pieces` [P + 1] (int32, on the rows' device):
    where each piece starts, long samples being cut into several; and, where one was cut, `first` [count + 1] (int32):
    each sample's first piece.
    """

    count: int
    longest: int
    pieces: Tensor | None = None
    first: Tensor | None = None

    def cut(self, L: int, R: int, config: configs.Config, arch: str) -> Cut:
        """The launch for columns L: equal long samples cut further, so that they fill the chip; short ones, several to a
        program, so that there are no more programs than keep it busy."""
        tiles = cdiv(L, config.BLOCK_N) * cdiv(R, config.BLOCK_R)
        if self.pieces is not None:
            segments = self.pieces.shape[0] - 1
            return Cut(segments, _per_program(segments, tiles, arch), 0, 1, 0, self.pieces)
        segment_rows = rows_of_a_segment(self.longest, tiles * self.count, config, arch)
        parts = max(1, cdiv(self.longest, segment_rows))
        segments = self.count * parts
        return Cut(segments, _per_program(segments, tiles, arch), self.longest, parts, segment_rows)

    def is_cut(self, cut: Cut) -> bool:
        """Whether a sample has several segments of `cut`."""
        return self.first is not None or cut.parts > 1

    def block_rows(self, config: configs.Config) -> int:
        """A tile no taller than the longest sample needs."""
        return min(config.BLOCK_M, max(32, 1 << (max(self.longest, 1) - 1).bit_length()))


def _per_program(segments: int, tiles: int, arch: str) -> int:
    return max(1, cdiv(segments * tiles, 4 * configs.sms_of(arch)))
