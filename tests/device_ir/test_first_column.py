"""y and S by one GEMM, S by the tiles of its first column: whatever is late, the others wait for it."""

import pytest
from first_column import y_and_s
from matrix import BF16, F16, doubles
from planting import plant
from ttsem.sanitize import Unjudged

from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, plans


def check(tensors, config, overlap):
    eager, exact = (reference.adapted_linear(*t, t[0].dtype) for t in (tensors, doubles(*tensors)))
    for name, *values in zip(("y", "s"), y_and_s(tensors, config, overlap), eager, exact):
        assert_close(*values, name)


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("weight_over", ["K", "N"])
@pytest.mark.parametrize(
    "shape", [(300, 520, 136, 16), (1, 8, 8, 8), (130, 264, 512, 64), (400, 1032, 64, 24), (500, 200, 72, 16)]
)
def test_y_and_s(shape, weight_over, overlap, few_sms):
    dtype = F16 if few_sms else BF16
    x, weight, bias, a, b, _ = make_inputs(*shape, dtype)
    if weight_over == "N":
        weight, b, bias = weight.mT.contiguous().mT, b.mT.contiguous().mT, None
    M, N, K, R = shape
    call = plans.Call("adapted_linear", M, N, K, R, dtype, dtype)
    found = [plan for plan in plans.options(call, "sm_90", untried=True) if plan.way == "column"]
    # With few steps over K the larger tile alone: see the next test.
    assert len(found) == (1 if K <= 64 else 2)
    for plan in found:
        check((x, weight, bias, a, b), plan.config, overlap)


def test_with_few_steps_a_program_would_wait_before_it_has_done_what_others_wait_for(monkeypatch):
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)
    x, weight, bias, a, b, _ = make_inputs(400, 1032, 64, 24, BF16)
    small = configs.candidates("fused_linear_pipelined", 1032, 64, 24, BF16, "sm_90")[1]
    with pytest.raises(Unjudged, match="what waits for a tile comes before"):
        y_and_s((x, weight, bias, a, b), small)


# What is changed, and what is then reported.
FAULTS = {
    "S is not waited for": ("            wait_for_round(under_way_ptr, start_m // BLOCK_M)\n", "", "y"),
    "other rows are waited for": (
        "under_way_ptr, start_m // BLOCK_M)\n        _load",
        "under_way_ptr, 0)\n        _load",
        "y",
    ),
    "what waits comes first": (
        "pid_n = 0 if in_first_column else pid_n + 1",
        "pid_n = num_n - 1 - (0 if in_first_column else pid_n + 1)",
        "what waits for a tile comes before",
    ),
    "S is there before all have written it": (
        "    sync_threads()\n    if CHAIN",
        "    if CHAIN",
        "may not have written",
    ),
    "a count is not waited for before it goes down": (
        'CHAIN == "midway":\n        # It writes',
        'CHAIN == "never":\n        # It writes',
        "a count that the kernel in front may not have written",
    ),
    "a count is not waited for before it is read": (
        'CHAIN == "midway":\n                wait_for_kernel',
        'CHAIN == "never":\n                wait_for_kernel',
        "a count that the kernel in front may not have written",
    ),
    "a product may not see S": (
        "            fence_async_shared()\n            _write_s",
        "            _write_s",
        "may not see",
    ),
    "too few products are waited for": ("mma_wait(2,", "mma_wait(4,", "what a product reads is overwritten"),
    "the sums are read before they are there": ("mma_wait(0, deps=(acc, acc_s))", "mma_wait(1, deps=(acc, acc_s))", ""),
    "the other warps are not waited for": (
        "deps=(acc, acc_s))\n                sync_threads()\n",
        "deps=(acc, acc_s))\n",
        "what other warps may still read",
    ),
    "A's bytes are not awaited": ("NBYTES + a_desc.block_type.nbytes", "NBYTES", ""),
    "S's bytes are awaited where it is made": (
        "mbarrier.expect(full, descs[1].block_type.nbytes, pred=makes_s)",
        "mbarrier.expect(full, descs[0].block_type.nbytes + descs[1].block_type.nbytes, pred=makes_s)",
        "nothing before it brings",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_wait_is_needed(fault, tmp_path, monkeypatch):
    *change, message = FAULTS[fault]
    # The third program begins with a tile that waits.
    x, weight, bias, a, b, _ = make_inputs(130, 520, 264, 16, BF16)
    config = configs.candidates("fused_linear_pipelined", 520, 264, 16, BF16, "sm_90")[1]
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)
    plant("adapted_linear_pipelined", *change, tmp_path, monkeypatch)
    with pytest.raises((Unjudged, AssertionError), match=message):
        check((x, weight, bias, a, b), config, True)
