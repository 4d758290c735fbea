"""Passes that run beside the GEMM, as compiled: counted while they are under way, waited for where their rows are needed."""

import pytest
import torch
from asynchrony import ByRounds, as_late_as_allowed
from comparing import assert_all_close, doubles
from matrix import BF16
from planting import module, plant
from ttsem.sanitize import Unjudged

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import make_inputs
from csrc_triton import chain, configs, plans

ETA = 2.0


@pytest.fixture(autouse=True)
def under_way(monkeypatch, launches):
    """Few multiprocessors, so that there are rounds; no fewer rows than pay; counts of the test's own."""
    monkeypatch.setitem(configs.NUM_SMS, "sm_90", 3)
    configs.sms_of.cache_clear()
    monkeypatch.setattr(configs, "num_sms", lambda device: 3)
    monkeypatch.setattr(configs, "can_overlap", lambda device: True)
    monkeypatch.setattr(plans, "pays_beside", lambda *sizes: True)
    counts = torch.zeros(chain.MAX_ROUNDS, dtype=torch.int32)
    monkeypatch.setattr(module("beside"), "counts", lambda device: counts)
    return counts


@pytest.fixture
def ran(monkeypatch):
    """What runs as late as it may. Its `rounds`: of each pass for S or dS beside a GEMM."""
    with as_late_as_allowed() as ran:
        ran.rounds = []
        for name in ("adapted_linear", "layer_grads"):
            launcher = module(name).down_project_beside

            def noted(x, a, scale, dtype, beside, launcher=launcher):
                sums = launcher(x, a, scale, dtype, beside)
                ran.rounds.append(beside.rounds)
                if beside.counted is not None:
                    under_way, rounds, rows = beside.counted
                    ran.by_rounds = ByRounds(list(sums), rows, rounds, under_way.data_ptr())
                return sums

            monkeypatch.setattr(module(name), "down_project_beside", noted)
        yield ran


def y_in_rounds(M, rank):
    x, weight, bias, a, b, _ = tensors = make_inputs(M, 520, 144, rank, BF16)
    y, s = csrc_triton.adapted_linear(x, weight, bias, a, b, BF16, pipelined("adapted_linear", M, 520, 144, rank))
    eager, exact = (reference.adapted_linear(*t[:5], t[0].dtype) for t in (tensors, doubles(*tensors)))
    assert_all_close("y s", (y, s), eager, exact)


def gradients_in_rounds(M, norm, monkeypatch):
    x, weight, _, a, b, g = make_inputs(M, 272, 1040, 16, BF16)
    tensors = (g, x, reference.down_project(x, a, BF16), weight, a, b)
    monkeypatch.setattr(plans, "pick", lambda *args: pipelined("fused_linear", M, 1040, 272, 16))
    ours = csrc_triton.layer_grads(*tensors, ETA, norm, BF16, BF16)
    eager, exact = (reference.layer_grads(*t, ETA, norm) for t in (tensors, doubles(*tensors)))
    assert_all_close("dx da db", ours, eager, exact)


def pipelined(op, M, N, K, R):
    call = plans.Call(op, M, N, K, R, BF16, BF16)
    return next(plan for plan in plans.options(call, "sm_90") if plan.way == "pipelined")


sizes = pytest.mark.parametrize("M, rounds", [(150, 1), (330, 2), (500, 3)])


@sizes
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_y_waits_for_the_rounds_of_s(M, rounds, rank, ran, under_way):
    y_in_rounds(M, rank)
    assert ran.rounds == [rounds] and not under_way.any()


@sizes
@pytest.mark.parametrize("norm", ["row", "matrix", "factor", "token", None])
def test_gradients_wait_for_ds_and_u(M, rounds, norm, ran, under_way, monkeypatch):
    gradients_in_rounds(M, norm, monkeypatch)
    assert ran.rounds == [rounds] and not under_way.any()


# The module, what is changed there, and what is then reported of which call.
FAULTS = {
    "a round is not waited for": ("fused_linear_pipelined", "if needs > waited:", "if needs > waited + 1:", "y"),
    "the round before is waited for": ("fused_linear_pipelined", "// rows + 1, rounds)", "// rows, rounds)", "y"),
    "an end is not waited for": ("fused_linear_pipelined", "rounds - needs)", "rounds - needs + 1)", "y"),
    "u is not waited for": ("outer_pair", "    if U_IS_COUNTED or HAS", "    if HAS", "da"),
    "a round is not ended": ("down_project", "ROUNDS - 1 - i)", "ROUNDS)", "y"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_wait_is_needed(fault, ran, tmp_path, monkeypatch):
    name, old, new, what = FAULTS[fault]
    plant(name, old, new, tmp_path, monkeypatch)
    with pytest.raises((Unjudged, AssertionError)):
        if what == "y":
            y_in_rounds(500, 16)
        else:
            gradients_in_rounds(330, "row", monkeypatch)
