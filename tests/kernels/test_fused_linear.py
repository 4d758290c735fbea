import pytest
import torch
from cases import dtypes, layouts, shapes
from comparing import doubles
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, plans


def check(x, weight, bias, s, b):
    call = plans.Call("fused_linear", *x.shape[:1], *weight.shape, s.shape[1], x.dtype, s.dtype)
    tiles = plans.options(call, configs.arch_of(x.device))[0]
    with poisoned_outputs():
        y = csrc_triton.fused_linear(*map(in_red_zone, (x, weight, bias, s, b)), tiles)
    exact = reference.fused_linear(*doubles(x, weight, bias, s, b))
    assert_close(y, reference.fused_linear(x, weight, bias, s, b), exact, "y")


def low_rank(inputs, dtypes):
    return reference.down_project(inputs.x, inputs.lora_A, torch.promote_types(*dtypes))


@shapes
@dtypes
def test_y(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    check(inputs.x, inputs.weight, inputs.bias, low_rank(inputs, dtypes), inputs.lora_B)


@shapes
@dtypes
def test_dx_by_strides(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    ds = reference.down_project(inputs.g, inputs.lora_B.mT, torch.promote_types(*dtypes))
    check(inputs.g, inputs.weight.mT, None, ds, inputs.lora_A.mT)


@layouts
def test_takes_any_strides(device, layout):
    inputs = make_inputs(70, 53, 41, 16, device=device)
    s = low_rank(inputs, (torch.float32, torch.float32))
    bias = inputs.bias.repeat_interleave(2)[::2]
    check(layout(inputs.x), layout(inputs.weight), bias, layout(s), layout(inputs.lora_B))


def test_more_rows_of_tiles_than_a_group(device):
    inputs = make_inputs(600, 130, 17, 3, device=device)
    check(inputs.x, inputs.weight, inputs.bias, low_rank(inputs, (torch.float32,) * 2), inputs.lora_B)


def test_y_is_rounded_once(device):
    inputs = make_inputs(64, 64, 64, 16, torch.bfloat16, device=device)
    s = low_rank(inputs, (torch.bfloat16,) * 2)
    y = csrc_triton.fused_linear(inputs.x, inputs.weight, inputs.bias, s, inputs.lora_B)
    exact = reference.fused_linear(*(t.double() for t in (inputs.x, inputs.weight, inputs.bias, s, inputs.lora_B)))
    # The fp32 sum falls on the other side of a rounding boundary now and then; a second rounding would, one time in four.
    assert (y == exact.bfloat16()).float().mean() > 0.99


def test_a_gradient_of_a_sum_has_no_strides(device):
    inputs = make_inputs(37, 53, 41, 3, device=device)
    g = torch.ones((), device=device).expand(37, 53)
    args = (inputs.weight.mT, None, reference.down_project(g, inputs.lora_B.mT, torch.float32), inputs.lora_A.mT)
    dx = csrc_triton.fused_linear(g, *args)
    exact = reference.fused_linear(*(None if t is None else t.double() for t in (g, *args)))
    assert_close(dx, reference.fused_linear(g, *args), exact, "dx")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_row_and_no_other(device, value):
    inputs = make_inputs(37, 53, 41, 3, torch.bfloat16, torch.float32, device=device)
    s = low_rank(inputs, (torch.bfloat16, torch.float32))
    s[5] = value
    y = csrc_triton.fused_linear(inputs.x, inputs.weight, inputs.bias, s, inputs.lora_B)
    assert not y[5].isfinite().any()
    assert y[:5].isfinite().all() and y[6:].isfinite().all()
