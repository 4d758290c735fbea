"""dX, dA and dB in one call against the reference's steps one by one."""

import pytest
import torch
from cases import LAYOUTS, dtypes, layouts, shape_id, shapes
from comparing import assert_all_close
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import make_inputs

norms = pytest.mark.parametrize("norm", reference.NORMS)
ETA = 2.0


def check(inputs, norm, layout=LAYOUTS["rows"]):
    x, weight, _, a, b, g = inputs
    s = reference.down_project(x, a, torch.promote_types(x.dtype, a.dtype))
    tensors = (g, x, s, weight, a, b)
    with poisoned_outputs():
        ours = csrc_triton.layer_grads(*(in_red_zone(layout(t)) for t in tensors), ETA, norm, a.dtype, b.dtype)
    eager = reference.layer_grads(*tensors, ETA, norm)
    exact = reference.layer_grads(*(t.double() for t in tensors), ETA, norm)
    assert_all_close("dx da db", ours, eager, exact)


@norms
@shapes
def test_matches_the_reference(device, norm, shape):
    check(make_inputs(*shape, torch.bfloat16, device=device), norm)


@norms
@dtypes
def test_dtypes(device, norm, dtypes):
    check(make_inputs(70, 45, 67, 16, *dtypes, device=device), norm)


@norms
@layouts
def test_takes_any_strides(device, norm, layout):
    check(make_inputs(70, 56, 136, 16, torch.float16, device=device), norm, layout)


@norms
@pytest.mark.parametrize(
    "shape",
    # The largest is for the overlap, which the interpreter does not have.
    [
        (300, 272, 144, 16),
        pytest.param((520, 1024, 272, 8), marks=pytest.mark.gpu),
        (40, 80, 528, 32),
        (72, 80, 48, 64),
    ],
    ids=shape_id,
)
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_sums_beside_dx(device, norm, adapter_dtype, shape):
    """Aligned operands: on a GPU that can, the sums run beside the GEMM, and it starts before they have ended."""
    check(make_inputs(*shape, torch.bfloat16, adapter_dtype, device=device), norm)


def test_more_rows_than_a_segment(device, monkeypatch):
    monkeypatch.setattr(csrc_triton.configs, "num_splits", lambda *args, **kwargs: 5)
    check(make_inputs(333, 70, 40, 5, device=device), "row")
