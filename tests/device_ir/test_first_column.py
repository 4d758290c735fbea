"""y and S, or dX, dS and u, by one GEMM, S or dS and u by the tiles of its first column: whatever is late, the others wait for
it."""

import pytest
import torch
from comparing import assert_all_close, doubles
from first_column import gradients, y_and_s
from matrix import BF16, F16
from planting import plant
from ttsem.sanitize import Unjudged

from allora_kernels import reference
from allora_kernels.testing import make_inputs
from csrc_triton import configs, plans

ETA = 2.0


def check(tensors, config, overlap):
    eager, exact = (reference.adapted_linear(*t, t[0].dtype) for t in (tensors, doubles(*tensors)))
    assert_all_close("y s", y_and_s(tensors, config, overlap), eager, exact)


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("weight_over", ["K", "N"])
@pytest.mark.parametrize(
    "shape", [(300, 520, 264, 16), (1, 8, 136, 8), (130, 264, 512, 64), (400, 1032, 128, 24), (500, 200, 136, 16)]
)
def test_y_and_s(shape, weight_over, overlap, few_sms):
    dtype = F16 if few_sms else BF16
    x, weight, bias, a, b, _ = make_inputs(*shape, dtype)
    if weight_over == "N":
        weight, b, bias = weight.mT.contiguous().mT, b.mT.contiguous().mT, None
    M, N, K, R = shape
    call = plans.Call("adapted_linear", M, N, K, R, dtype, dtype)
    found = [plan for plan in plans.options(call, "sm_90", untried=True) if plan.way == "column"]
    # With few steps over K the larger tile alone: see the next tests.
    assert len(found) == (1 if K <= 128 else 2)
    for plan in found:
        check((x, weight, bias, a, b), plan.config, overlap)


def check_gradients(shape, norm, overlap, lay_out=lambda *tensors: tensors, place=0):
    x, weight, _, a, b, g = make_inputs(*shape, BF16)
    g, x, weight, a, b = lay_out(g, x, weight, a, b)
    tensors = (g, x, reference.down_project(x, a, BF16), weight, a, b)
    M, N, K, R = shape
    call = plans.Call("layer_grads", M, K, N, R, BF16, BF16)
    plan = [plan for plan in plans.options(call, "sm_90", untried=True) if plan.way == "column"][place]
    ours = gradients(tensors, ETA, norm, plan.config, overlap)
    eager, exact = (reference.layer_grads(*t, ETA, norm) for t in (tensors, doubles(*tensors)))
    assert_all_close("dx da db", ours, eager, exact)


@pytest.fixture
def three_sms(monkeypatch, launches):
    """So few that a program has several tiles."""
    monkeypatch.setitem(configs.NUM_SMS, "sm_90", 3)
    configs.sms_of.cache_clear()
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)


@pytest.mark.parametrize(
    "norm, overlap, place",
    [
        *(("row", overlap, place) for overlap in (False, True) for place in (0, 1)),
        *((norm, True, 0) for norm in ("matrix", "factor", "token", None)),
    ],
)
def test_gradients(norm, overlap, place, three_sms):
    check_gradients((300, 144, 528, 16), norm, overlap, place=place)


@pytest.mark.parametrize("shape", [(1, 80, 16, 8), (130, 512, 272, 8), (500, 80, 1040, 16)])
def test_gradients_of_odd_sizes(shape, launches):
    check_gradients(shape, "row", True)


def test_gradients_of_other_layouts(three_sms):
    def columns(*tensors):
        return [t.mT.contiguous().mT for t in tensors]

    check_gradients((300, 144, 528, 16), "row", True, lambda g, x, weight, a, b: (g, x, *columns(weight, a, b)))


def check_infinity():
    x, weight, bias, a, b, _ = make_inputs(130, 264, 136, 8, BF16)
    x[7, 3] = torch.inf
    config = configs.candidates("fused_linear_pipelined", 264, 136, 8, BF16, "sm_90")[0]
    y, s = y_and_s((x, weight, bias, a, b), config)
    eager = reference.adapted_linear(x, weight, bias, a, b, BF16)
    for ours, theirs in zip((y, s), eager):
        assert torch.equal(ours.isposinf(), theirs.isposinf()) and torch.equal(ours.isneginf(), theirs.isneginf())
        assert not (ours.isnan() & ~theirs.isnan()).any()


def test_an_infinite_x_is_no_nan_where_torch_has_none():
    check_infinity()


def test_what_is_no_column_of_s_is_left_out(tmp_path, monkeypatch):
    plant(
        "adapted_linear_pipelined",
        "(offs_r < s_desc.shape[1])[None, :]",
        "(offs_r >= 0)[None, :]",
        tmp_path,
        monkeypatch,
    )
    with pytest.raises(AssertionError):
        check_infinity()


@pytest.mark.parametrize("K", [64, 128])
def test_with_few_steps_loads_would_run_ahead_by_a_whole_tile(K, monkeypatch):
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)
    x, weight, bias, a, b, _ = make_inputs(400, 1032, K, 24, BF16)
    small = configs.candidates("fused_linear_pipelined", 1032, K, 24, BF16, "sm_90")[1]
    with pytest.raises((Unjudged, AssertionError)):
        check((x, weight, bias, a, b), small, True)


# What is changed, and what is then reported.
FAULTS = {
    "S is not waited for": ("wait_for_round(tiles_ptr, start_m // BLOCK_M)\n", "pass\n", "y"),
    "other rows are waited for": (
        "tiles_ptr, start_m // BLOCK_M)\n        _load",
        "tiles_ptr, 0)\n        _load",
        "y",
    ),
    "what waits comes first": (
        "pid_n = 0 if in_first_column else pid_n + 1",
        "pid_n = num_n - 1 - (0 if in_first_column else pid_n + 1)",
        "what waits for a tile comes before",
    ),
    "S is there before all have written it": (
        "    sync_threads()\n    gl.atomic_add(tiles_ptr",
        "    gl.atomic_add(tiles_ptr",
        "may not have written",
    ),
    "the counts are not waited for": (
        'CHAIN == "link":',
        'CHAIN == "never":',
        "a count that the kernel in front may not have written",
    ),
    "a tile is skipped": ("tile = at[1]", "tile = at[1] + 1", "y"),
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


# What is changed where, and what is then reported.
FAULTS_OF_GRADIENTS = {
    "the sums may begin too early": (
        "adapted_linear_pipelined",
        "tile >= num_m - gl.num_programs(0)",
        "tile >= 0",
        "before all that it waits for is taken",
    ),
    "tiles are not counted": (
        "adapted_linear_pipelined",
        "gl.atomic_add(counted_ptr, 1)",
        "gl.atomic_add(counted_ptr, 0)",
        "has not ended its round",
    ),
    "tiles stay counted": (
        "adapted_linear_pipelined",
        '        gl.atomic_add(counted_ptr, -1, sem="release")',
        "        pass",
        "has not ended its round",
    ),
    "u is not waited for": ("outer_pair", "    if U_IS_COUNTED or HAS", "    if HAS", "da"),
    "C is left out": ("layer_grads_pipelined", "b * c[None, :]", "b + 0 * c[None, :]", "da"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_GRADIENTS)
def test_each_step_of_the_gradients_is_needed(fault, tmp_path, monkeypatch, three_sms):
    name, *change, message = FAULTS_OF_GRADIENTS[fault]
    plant(name, *change, tmp_path, monkeypatch)
    with pytest.raises((Unjudged, AssertionError), match=message):
        check_gradients((600, 144, 528, 16), "row", True)
