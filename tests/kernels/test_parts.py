"""fp32 factors as bf16 parts: what they add up to, where they lie, and that the GEMM which takes them needs nothing else."""

import pytest
import torch
from cases import layouts
from red_zones import in_red_zone, poisoned_outputs

from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import fused_linear, plans
from csrc_triton.parts import in_parts, possible, width

BF16, F32 = torch.bfloat16, torch.float32
# M, N, R
SIZES = [(1, 1, 1), (37, 53, 3), (5, 70, 8), (64, 96, 16), (130, 33, 20), (31, 65, 64), (33, 9, 200)]


def expected(t, middle):
    high = t.to(BF16)
    rest = (t - high.float()).to(BF16)
    thirds = [high, high, high]
    thirds[middle] = rest
    return torch.cat([*thirds, high.new_zeros(len(t), width(t.shape[1]) - 3 * t.shape[1])], dim=1)


def check(s, b):
    with poisoned_outputs():
        s3, b3 = in_parts(in_red_zone(s), in_red_zone(b))
    for found, wanted in ((s3, expected(s, 2)), (b3, expected(b, 1))):
        assert found.dtype == BF16 and found.is_contiguous() and found.shape[1] % 8 == 0
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0)) and torch.equal(found.isnan(), wanted.isnan())
    return s3, b3


@pytest.mark.parametrize("size", SIZES)
def test_each_part_is_rounded_and_in_its_place(device, size):
    M, N, R = size
    s, b = torch.randn(M, R, device=device), torch.randn(N, R, device=device)
    s3, b3 = check(s, b)
    for t, parts in ((s, s3[:, R : 3 * R]), (b, b3[:, : 2 * R])):
        high, middle = parts.double().chunk(2, dim=1)
        assert ((t - high - middle).abs() <= 2**-16 * t.abs()).all()
    exact = s.double() @ b.double().mT
    assert ((s3.double() @ b3.double().mT - exact).abs() <= 2**-15 * (s.double().abs() @ b.double().abs().mT)).all()


@layouts
@pytest.mark.parametrize("R", [8, 20])
def test_takes_any_strides(device, layout, R):
    check(layout(torch.randn(70, R, device=device)), layout(torch.randn(45, R, device=device)))
    row, b = torch.randn(1, R, device=device), torch.randn(R, 45, device=device).mT
    check(row, b)
    assert torch.equal(in_parts(row.expand(70, R), b)[0], expected(row, 2).expand(70, -1))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
def test_has_the_range_of_fp32(device, scale):
    s, b = ((torch.rand(size, device=device) + 0.5) * scale for size in ((40, 16), (33, 16)))
    s3, _ = check(s, b)
    high, _, middle = s3.double().chunk(3, dim=1)
    least = torch.finfo(BF16).smallest_normal * 2**-7
    assert ((s.double() - high - middle).abs() <= 2**-16 * s.double() + least).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_what_is_not_finite_is_not_finite_in_the_product(device):
    s, b = torch.randn(40, 5, device=device), torch.randn(33, 5, device=device)
    s[3, 0], s[7, 1], s[9, 2], b[11, 3] = torch.inf, torch.nan, torch.finfo(F32).max, -torch.inf
    s3, b3 = check(s, b)
    product = s3.float() @ b3.float().mT
    wrong = torch.zeros_like(product, dtype=torch.bool)
    wrong[[3, 7, 9]] = wrong[:, 11] = True
    assert torch.equal(~product.isfinite(), wrong)


def test_a_narrower_factor_beside_an_fp32_one(device):
    s, b = torch.randn(40, 16, device=device), torch.randn(33, 16, device=device).to(BF16)
    with poisoned_outputs():
        _, b3 = in_parts(in_red_zone(s), in_red_zone(b))
    assert torch.equal(b3, torch.cat([b, torch.zeros_like(b), b], dim=1))


@pytest.mark.parametrize("R", [1, 16, 20])
def test_a_gemm_of_the_parts_is_one_of_the_factors(device, R):
    """By the tiles that every device has: the way that takes them has no interpreter."""
    x, weight, bias, a, b, _ = make_inputs(70, 53, 41, R, BF16, F32, device=device)
    s = reference.down_project(x, a, F32)
    call = plans.Call("fused_linear", 70, 53, 41, width(R), BF16, BF16)
    tiles = plans.options(call, "interpreter" if device == "cpu" else "unheard_of", plans.NOTHING)[0]
    y = fused_linear(x, weight, bias, *in_parts(s, b), tiles)
    exact = reference.fused_linear(*(t.double() for t in (x, weight, bias, s, b)))
    assert_close(y, reference.fused_linear(x, weight, bias, s, b), exact, "y")


def test_parts_are_for_bf16_alone():
    assert possible(BF16, F32)
    assert not any(possible(*dtypes) for dtypes in ((torch.float16, F32), (BF16, BF16), (F32, F32)))
