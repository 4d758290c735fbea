"""C by two kernels behind the GEMM for y, as compiled: the second waits for the first alone."""

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

F32 = torch.float32
ETA = 2.0


@pytest.fixture
def under_way(monkeypatch, launches):
    """Counts of the test's own."""
    monkeypatch.setattr(configs, "can_overlap", lambda device: True)
    counts = torch.zeros(chain.MAX_ROUNDS, dtype=torch.int32)
    monkeypatch.setattr(module("adapted_linear"), "counts", lambda device: counts)
    return counts


def check(M, N, K, R, factors, under_way, monkeypatch):
    """y, S and C, of which the Gram matrix is NaN to C's second kernel until it has waited."""
    x, weight, bias, a, b, _ = tensors = make_inputs(M, N, K, R, BF16, factors)
    call = plans.Call("adapted_linear", M, N, K, R, BF16, factors)
    plan = next(plan for plan in plans.options(call, "sm_90") if plan.way == "pipelined")
    parts = []
    with as_late_as_allowed() as ran, monkeypatch.context() as patched:
        gram = module("row_norms").gram_parts

        def noted(*args):
            parts.append(gram(*args))
            ran.by_rounds = ByRounds([parts[0]], len(parts[0]), 1, under_way.data_ptr())
            return parts[0]

        patched.setattr(module("row_norms"), "gram_parts", noted)
        ours = csrc_triton.adapted_linear_and_coefficient(x, weight, bias, a, b, factors, ETA, plan)

    def by_steps(x, weight, bias, a, b):
        products = reference.adapted_linear(x, weight, bias, a, b, torch.promote_types(x.dtype, a.dtype))
        return *products, reference.weight_coefficient(a, b, ETA, "row")

    assert_all_close("y s c", ours, by_steps(*tensors[:5]), by_steps(*doubles(*tensors[:5])))
    assert parts and not under_way.any()


@pytest.mark.parametrize("factors", [BF16, F32])
@pytest.mark.parametrize("shape", [(130, 264, 1040, 64), (1, 72, 272, 40), (40, 520, 136, 16), (70, 136, 264, 136)])
def test_it_waits_for_the_gram_matrix(shape, factors, under_way, launches, monkeypatch):
    # Of 16-bit factors S has room beside the GEMM up to rank 32.
    monkeypatch.setattr(configs, "beside", lambda *args: None)
    check(*shape, factors, under_way, monkeypatch)


def test_each_wait_is_needed(under_way, tmp_path, monkeypatch):
    plant("row_norms", "    wait_for_counted(under_way_ptr)\n", "", tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="c"):
        check(40, 136, 1040, 64, BF16, under_way, monkeypatch)


def test_a_program_that_stays_counted_is_reported(under_way, tmp_path, monkeypatch):
    plant("row_norms", "    end_round(under_way_ptr, 0)\n", "", tmp_path, monkeypatch)
    with pytest.raises(Unjudged, match="has not ended its round"):
        check(40, 136, 1040, 64, BF16, under_way, monkeypatch)
