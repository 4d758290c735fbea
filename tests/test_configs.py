"""`pick_config` is pure, answers for any architecture, and cuts work so that it fills the chip."""

import itertools

import pytest
import torch

configs = pytest.importorskip("csrc_triton.configs")

ARCHS = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "unheard_of", "interpreter"]
OPS = ["fused_linear", "down_project", "low_rank_add", "sweep", "sweep_wide", "sweep_entry", "sweep_entry_wide"]
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_case_has_a_configuration(op, arch):
    for (dtype, low_rank), r, n in itertools.product(DTYPES, [1, 7, 16, 64, 200, 256], [1, 4096, 50257]):
        config = configs.pick_config(op, 513, n, 4096, r, dtype, arch, low_rank)
        assert config == configs.pick_config(op, 513, n, 4096, r, dtype, arch, low_rank)
        sizes = [size for size in (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R) if size]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        assert min(r, 16) <= config.BLOCK_R and config.num_warps >= 1 and config.num_stages >= 1


@pytest.mark.parametrize(
    "r, limit, expected", [(1, 64, 16), (16, 64, 16), (17, 64, 32), (100, 64, 64), (256, 256, 256)]
)
def test_block_r(r, limit, expected):
    assert configs.block_r(r, limit) == expected


def test_few_tiles_are_split_and_many_are_not():
    assert configs.num_splits(4, 4096, 64, "sm_90") == 64
    assert configs.num_splits(64, 4096, 64, "sm_90") == 2 * 132 // 64
    assert configs.num_splits(10_000, 4096, 64, "sm_90") == 1
    assert configs.num_splits(1, 63, 64, "sm_90") == 1
    assert configs.num_splits(0, 0, 64, "unheard_of") == 1
