"""The GEMM in Gluon, which begins and awaits its copies and products itself: in order, whatever they take."""

import contextlib

import pytest
import torch
from asynchrony import as_late_as_allowed
from comparing import doubles
from matrix import BF16, F16, F32
from planting import module, plant
from ttsem.sanitize import Unjudged

from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, plans
from csrc_triton.chain import chained, next_place


def check(args, config, place=""):
    x, weight, _, s, _ = args
    y = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    with as_late_as_allowed() as ran:
        if place == "midway":
            ran.after_kernel_in_front = range(s.data_ptr(), s.data_ptr() + s.nbytes)
        with chained(place != "", "midway"):
            if place == "midway":
                next_place()
            module("fused_linear_pipelined").launch_pipelined(*args, y, config, place != "")
    assert_close(y, reference.fused_linear(*args), reference.fused_linear(*doubles(*args)), "y")
    return ran.counts


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("shape", [(300, 520, 136, 16), (1, 8, 8, 8), (130, 264, 512, 72), (400, 1032, 64, 24)])
@pytest.mark.parametrize("product", ["y", "dx"])
@pytest.mark.parametrize("place", ["", "first", "midway"])
def test_whatever_copies_and_products_take(shape, product, place, few_sms):
    dtype = F16 if few_sms else BF16
    x, weight, bias, a, b, g = make_inputs(*shape, dtype)
    if product == "y":
        args = (x, weight, bias, reference.down_project(x, a, dtype), b)
    else:
        args = (g, weight.mT, None, reference.down_project(g, b.mT, dtype), a.mT)
    M, N, K, R = len(x), args[1].shape[0], args[0].shape[1], shape[3]
    for config in configs.candidates("fused_linear_pipelined", N, K, R, dtype, "sm_90"):
        counts = check(args, config, place)
        tiles = -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N)
        steps = -(-K // config.BLOCK_K) + -(-R // config.BLOCK_R)
        assert counts["stores"] == 4 * tiles and counts["products"] == tiles * steps
        assert counts["copies"] == 2 * counts["products"] and counts["programs"] == min(tiles, 3 if few_sms else 132)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("factor", [0, 1])
def test_fp32_factors_are_waited_for_while_they_are_written_in_parts(factor, waits, monkeypatch):
    x, weight, bias, a, b, _ = make_inputs(300, 520, 136, 12, BF16, F32)
    args = (x, weight, bias, reference.down_project(x, a, F32), b)
    call = plans.Call("fused_linear", 300, 520, 136, 12, BF16, F32)
    plan = next(plan for plan in plans.options(call, "sm_90", plans.WIDE) if plan.way == "pipelined")
    launch_pipelined = module("fused_linear_pipelined").launch_pipelined

    def launch(*args):
        written = args[3 + factor]
        ran.after_kernel_in_front = range(written.data_ptr(), written.data_ptr() + written.nbytes)
        with contextlib.nullcontext() if waits else chained(False):
            launch_pipelined(*args)

    monkeypatch.setattr(configs, "can_overlap", lambda device: True)
    monkeypatch.setattr(module("fused_linear_pipelined"), "launch_pipelined", launch)
    reported = contextlib.nullcontext() if waits else pytest.raises(Unjudged, match="may not have written")
    with as_late_as_allowed() as ran, reported:
        y = module("fused_linear").fused_linear(*args, plan)
        assert_close(y, reference.fused_linear(*args), reference.fused_linear(*doubles(*args)), "y")


# What is changed, and what is then reported.
FAULTS = {
    "too few products are waited for": ("mma_wait(1,", "mma_wait(2,", "what a product reads is overwritten"),
    "the sum is read before it is there": ("mma_wait(0,", "mma_wait(1,", "program ends before its products"),
    "the other warps are not waited for": ("    sync_threads()\n", "", "what other warps may still read"),
    "a copy is not waited for": (
        "    mbarrier.wait(full, count // ring[0].shape[0] & 1)\n",
        "",
        "two copies to one buffer",
    ),
    "the round before is waited for": (
        "count // ring[0].shape[0] & 1)",
        "(count // ring[0].shape[0] & 1) ^ 1)",
        "two copies to one buffer",
    ),
    "a slot is filled too early": (
        "gl.static_range(STAGES - 1)",
        "gl.static_range(STAGES)",
        "what a product reads is overwritten",
    ),
    "fewer bytes are awaited than come": (
        "left_desc.block_type.nbytes + right_desc.block_type.nbytes",
        "16",
        "two copies to one buffer",
    ),
    "more bytes are awaited than come": (
        "left_desc.block_type.nbytes +",
        "2 * left_desc.block_type.nbytes +",
        "nothing before it brings",
    ),
    "a copy is begun that nothing waits for": (
        "needed = tile < num",
        "needed = tile <= num",
        "program ends before its copies",
    ),
    "a store's buffer is written too early": (
        "store_wait(pendings=1)",
        "store_wait(pendings=2)",
        "what a store reads is overwritten",
    ),
    "the program ends before its stores": ("    tma.store_wait(pendings=0)\n", "", "program ends before its stores"),
    "a store may not see what is written": (
        "        fence_async_shared()\n        store",
        "        store",
        "may not see yet",
    ),
    "a copy may not see its barrier": ("sees them.\n    fence_async_shared()\n", "sees them.\n", "may not see yet"),
    "S is not waited for": ('CHAIN == "midway"', 'CHAIN == "never"', "kernel in front may not have written"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_wait_is_needed(fault, tmp_path, monkeypatch):
    *change, message = FAULTS[fault]
    x, weight, bias, a, b, _ = make_inputs(600, 264, 520, 16, BF16)
    args = (x, weight, bias, reference.down_project(x, a, BF16), b)
    config = configs.candidates("fused_linear_pipelined", 264, 520, 16, BF16, "sm_90")[1]
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)
    plant("fused_linear_pipelined", *change, tmp_path, monkeypatch)
    with pytest.raises((Unjudged, AssertionError), match=message):
        check(args, config, "midway")
