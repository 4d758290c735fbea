"""The sweep over G moves little besides G: the plan counts the bytes of its partial sums and takes the cheapest order."""

import itertools

import pytest
import torch

from allora_kernels import reference
from csrc_triton import sweep_plan

BF16 = (torch.bfloat16, torch.bfloat16)
M, N = 8192, 4096


def plan(norm, R, arch="sm_90", dtypes=BF16, rows=M):
    sums = sweep_plan.sums_over_columns(norm, True, True)
    return sweep_plan.plan_sweep(rows, N, R, norm, sums, True, *dtypes, arch)


@pytest.mark.parametrize("norm", [*reference.WEIGHT_NORMS, "token", None])
@pytest.mark.parametrize("arch, share", [("sm_80", 0.4), ("sm_90", 1.1), ("sm_100", 0.4)])
def test_partial_sums_are_a_share_of_g_and_fit_the_cache(norm, arch, share):
    # On an H200 narrow tiles were the faster ones, though they write more than wide ones: the cache takes it.
    found = plan(norm, 16, arch)
    assert found.partial_bytes <= share * M * N * 2 and found.extra_reads == 0
    tiles, sums = N // found.config.BLOCK_N, sweep_plan.sums_over_columns(norm, True, True)
    assert 4 * sums * tiles * found.chunk_rows * 16 <= 32 * 2**20


def test_a_high_rank_takes_a_pass_of_its_own():
    assert not plan("row", 16).separate
    found = plan("row", 64)
    # G is read for dS and u at once, and for dB; at a rank of two tiles each twice.
    assert found.separate and found.extra_reads == 1
    assert plan("row", 128).separate and plan("row", 128).extra_reads == 3
    segments = M // found.segment_rows
    assert found.extra_bytes(M, N, 2) <= sweep_plan.partial_bytes(M, N, 64, found.config.BLOCK_N, 2, segments)


def test_sums_over_rows_of_short_chunks_have_a_sweep_of_their_own():
    mixed = (torch.bfloat16, torch.float32)
    found = sweep_plan.plan_sweep(M, 128256, 64, "entry", 2, True, *mixed, "sm_90")
    assert found.outer_apart and found.chunk_rows < 64
    for norm, R, rows, columns in itertools.product(reference.NORMS, (16, 64), (512, M, 2**18), (1024, 4096, 16384)):
        sums = sweep_plan.sums_over_columns(norm, True, True)
        assert not sweep_plan.plan_sweep(rows, columns, R, norm, sums, True, *mixed, "sm_90").outer_apart


def test_the_count():
    # Two sums of 3 shares [100, 16] and 5 segments [300, 16], fp32, written and read.
    assert sweep_plan.partial_bytes(100, 300, 16, 128, 2, 5) == 2 * 4 * (2 * 3 * 100 * 16 + 5 * 300 * 16)


def test_chunks_and_segments_cover_all_rows_once():
    for rows in (1, 63, 64, 1000, 2**20 + 1):
        found = plan("row", 16, rows=rows)
        assert found.chunk_rows % found.config.BLOCK_M == 0 and found.segment_rows % found.config.BLOCK_M == 0
        segments = sum(
            -(-min(found.chunk_rows, rows - start) // found.segment_rows) for start in range(0, rows, found.chunk_rows)
        )
        assert segments == sweep_plan.total_segments(rows, found.chunk_rows, found.segment_rows)
