"""How the sweep over G is cut, chosen by counting the bytes it moves besides G itself. Pure Python.

The sweep takes dB, dS and u = G~ B from one read of G. Each block of columns of G gives its own share of dS and of u, and
each segment of rows its own share of dB: fp32 partial sums, written once and read back once. Wide blocks have few
shares but need registers, and a high rank makes every share large. Where the shares outweigh G, dS and u come from a
pass of their own over G, which makes none.
"""

import functools
from dataclasses import dataclass

import torch

from . import configs
from .configs import cdiv


@dataclass(frozen=True)
class SweepPlan:
    """`config` of the sweep; `separate`, whether the sums over columns have a pass of their own; `outer_apart`, whether the sum
    over rows has a sweep of its own, planned without them; rows in a chunk and in a segment; `partial_bytes` of partial sums
    and `extra_reads` of G beyond the first, as counted."""

    config: configs.Config
    separate: bool
    outer_apart: bool
    chunk_rows: int
    segment_rows: int
    partial_bytes: int
    extra_reads: int

    def extra_bytes(self, M: int, L: int, itemsize: int) -> int:
        """Bytes moved besides one read of ``V [M, L]`` and what is as small as S."""
        return self.partial_bytes + self.extra_reads * M * L * itemsize


def partial_bytes(M: int, L: int, R: int, block_l: int, sums: int, segments: int) -> int:
    """Bytes of the partial sums, each written and read in fp32: `sums` of ``[L / block_l, M, R]`` and `segments` of
    ``[L, R]``."""
    return 2 * 4 * R * (sums * cdiv(L, block_l) * M + segments * L)


SCALES_COLUMNS = ("row", "entry")
"""The rules whose C goes along G's columns, so that u = G~ B is another sum over them than dS."""


def sums_over_columns(norm: str | None, need_ds: bool, need_da: bool) -> int:
    """How many [M, R] sums over the columns of G are due: dS, and u where C makes it another one."""
    return int(need_ds) + int(need_da) if norm in SCALES_COLUMNS else int(need_ds or need_da)


@functools.lru_cache(maxsize=4096)
def plan_sweep(
    M: int,
    L: int,
    R: int,
    norm: str | None,
    sums: int,
    outer: bool,
    dtype: torch.dtype,
    compute: torch.dtype,
    arch: str,
) -> SweepPlan:
    """The cheapest way to sweep V [M, L], M >= 1, of `dtype` for `sums` sums over its columns and, where `outer`, the sum
    ``V~ᵀ U~ [L, R]`` over its rows."""
    kind = "sweep_entry" if norm == "entry" else "sweep"
    plans = []
    for op in (kind, f"{kind}_wide"):
        config = configs.pick_config(op, M, L, 0, R, dtype, arch, compute)
        plans.append(_plan(M, L, R, sums, outer, dtype, config, arch))
        # The rule "entry" needs the tile of S Bᵀ beside G's, which only the sweep has.
        if sums and norm != "entry":
            twice = "down_project_twice" if sums == 2 else "down_project"
            projection = configs.pick_config(twice, M, 0, L, R, dtype, arch, compute)
            plans.append(_plan(M, L, R, 0, outer, dtype, config, arch, cdiv(R, projection.BLOCK_R)))
    return min(plans, key=lambda plan: plan.extra_bytes(M, L, dtype.itemsize))


def _plan(M, L, R, sums, outer, dtype, config, arch, projection_reads=0) -> SweepPlan:
    tiles_l, tiles_r = cdiv(L, config.BLOCK_N), cdiv(R, config.BLOCK_R)
    # A long V is swept a chunk of rows at a time, so that the shares take little memory and stay in the L2 cache.
    rows = min(M, configs.SCRATCH_BYTES // (4 * tiles_l * R * sums)) if sums else M
    chunk_rows = round_up(rows, config.BLOCK_M)
    rows = min(M, chunk_rows)
    segment_rows = rows_of_a_segment(rows, tiles_l * tiles_r, config, arch)
    segments = total_segments(M, chunk_rows, segment_rows) if outer else 0
    sweep_reads = tiles_r if outer or sums else 0
    # Every chunk has a sum over its rows: where chunks are short these would be more than V is.
    outer_apart = chunk_rows < M and 4 * segments * R > M * dtype.itemsize
    if outer_apart:
        segments, sweep_reads = 0, 2 * tiles_r
    return SweepPlan(
        config,
        separate=projection_reads > 0,
        outer_apart=outer_apart,
        chunk_rows=chunk_rows,
        segment_rows=segment_rows,
        partial_bytes=partial_bytes(M, L, R, config.BLOCK_N, sums, segments),
        extra_reads=sweep_reads + projection_reads - 1,
    )


def rows_of_a_segment(rows: int, tiles: int, config: configs.Config, arch: str) -> int:
    """Into how long segments to cut a run of `rows` that `tiles` programs side by side sum up."""
    # Every segment costs an [L, R] partial sum: enough of them to fill the chip, no more. Eight warps fill half of a
    # multiprocessor's registers, and one such block keeps enough loads in flight.
    waves = 1 if config.num_warps >= 8 else 2
    parts = configs.num_splits(tiles, rows, 2 * config.BLOCK_M, arch, waves=waves)
    return round_up(cdiv(rows, parts), config.BLOCK_M)


def total_segments(M: int, chunk_rows: int, segment_rows: int) -> int:
    """Segments of M rows; the last chunk may be shorter and have fewer."""
    full = M // chunk_rows
    return full * cdiv(chunk_rows, segment_rows) + cdiv(M - full * chunk_rows, segment_rows)


def round_up(size: int, step: int) -> int:
    """The least multiple of `step` that is at least `size`, and at least one."""
    return max(1, cdiv(size, step)) * step
