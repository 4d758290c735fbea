"""`pick_config` answers for any architecture, and cuts work so that it fills the chip."""

import itertools

import pytest
import torch

from csrc_triton import configs, plans

ARCHS = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "unheard_of", "interpreter"]
OPS = ["fused_linear", "down_project", "low_rank_add", "sweep", "sweep_wide", "sweep_entry", "sweep_entry_wide"]
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_case_has_a_configuration(op, arch):
    for (dtype, low_rank), r, n in itertools.product(DTYPES, [1, 7, 16, 64, 200, 256], [1, 4096, 50257]):
        config = configs.pick_config(op, 513, n, 4096, r, dtype, arch, low_rank)
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


@pytest.mark.parametrize(
    "capability, count, arch", [((9, 0), 132, "sm_90"), ((9, 0), 114, "sm_90:114"), ((7, 5), 40, "sm_75:40")]
)
def test_a_part_with_fewer_multiprocessors_is_planned_as_it_is(capability, count, arch, monkeypatch):
    class Properties:
        major, minor = capability
        multi_processor_count = count
        gcnArchName = "gfx942"

    monkeypatch.setattr(configs, "_gpu_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    configs._gpu_arch.cache_clear()
    device = torch.device("cuda", 0)
    try:
        assert configs.arch_of(device) == arch and configs.num_sms(device) == count
        assert configs.sms_of(arch) == count
        family = configs.family(arch)
        assert configs.num_splits(1, 10**6, 1, arch) == 2 * count
        assert configs.candidates("fused_linear", 4096, 4096, 16, torch.bfloat16, arch) == configs.candidates(
            "fused_linear", 4096, 4096, 16, torch.bfloat16, family
        )
    finally:
        configs._gpu_arch.cache_clear()


def test_an_estimate_counts_the_multiprocessors_of_the_part():
    # 128 tiles of 128 x 256: one wave of 132, two of 114.
    call = plans.Call("fused_linear", 2048, 2048, 4096, 16, torch.bfloat16, torch.bfloat16)
    plan = plans.options(call, "sm_90")[0]
    assert plan.config.BLOCK_M * plan.config.BLOCK_N == 128 * 256
    whole, two_waves = (plans.estimate(call, plan, arch) for arch in ("sm_90", "sm_90:114"))
    assert two_waves > 1.9 * whole
    assert plans.estimate(call, plan, "sm_90:132") == whole
