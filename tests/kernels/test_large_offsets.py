"""Elements more than 2^31 apart. The buffers are virtual memory of which only the touched pages ever exist."""

import pytest
import torch
from comparing import assert_all_close, doubles

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, plans
from csrc_triton.launching import MAX_ROWS

FAR = 2**31 + 8
ENDS = torch.tensor([5], dtype=torch.int32)


def far_apart(t, dim):
    """A copy of the [2, n] or [n, 2] tensor `t` whose two slices along `dim` lie FAR elements apart."""
    other = t.shape[1 - dim]
    buffer = torch.empty(FAR + 2 * other + 8, dtype=t.dtype, device=t.device)
    strides = (FAR, 1) if dim == 0 else (1, FAR)
    return buffer.as_strided(t.shape, strides).copy_(t)


@pytest.fixture
def inputs(device):
    return make_inputs(2, 41, 53, 3, torch.float16, device=device)


def test_rows_of_x_and_w(inputs):
    x, s = far_apart(inputs.x, 0), reference.down_project(inputs.x, inputs.lora_A, torch.float16)
    weight, b = far_apart(inputs.weight[:2], 0), inputs.lora_B[:2]
    near = (inputs.x, inputs.weight[:2], None, s, b)
    # The vendor's GEMM takes no such strides.
    arch = configs.arch_of(x.device)
    plan = plans.Plan("tiles", configs.candidates("fused_linear", 2, 53, 3, torch.float16, arch)[-1])
    y = csrc_triton.fused_linear(x, weight, None, s, b, plan)
    assert_close(y, reference.fused_linear(*near), reference.fused_linear(*doubles(*near)), "y")


def test_columns_of_x(inputs):
    x, a = far_apart(inputs.x[:, :2], 1), inputs.lora_A[:, :2]
    s = csrc_triton.down_project(x, a, torch.float16)
    exact = reference.down_project(*doubles(inputs.x[:, :2], a), torch.float64)
    assert_close(s, reference.down_project(inputs.x[:, :2], a, torch.float16), exact, "s")


def test_steps_over_columns_that_lie_far_apart(device):
    # No column is 2^31 elements from the next, but a step of the loop is.
    x, weight, _, a, b, _ = make_inputs(2, 3, 70, 3, torch.float16, device=device)
    stride = 2**25 + 8
    far = torch.empty(70 * stride, dtype=x.dtype, device=device).as_strided((2, 70), (1, stride)).copy_(x)
    s = csrc_triton.down_project(far, a, torch.float16)
    assert_close(
        s, reference.down_project(x, a, torch.float16), reference.down_project(*doubles(x, a), torch.float64), "s"
    )
    rest = (weight, None, s, b)
    y = csrc_triton.fused_linear(far, *rest)
    assert_close(y, reference.fused_linear(x, *rest), reference.fused_linear(*doubles(x, *rest)), "y")


def test_rows_of_g_and_x(inputs):
    s = reference.down_project(inputs.x, inputs.lora_A, torch.float16)
    rest = (s, inputs.lora_B, None)
    near, far = (inputs.g, inputs.x, *rest), (far_apart(inputs.g, 0), far_apart(inputs.x, 0), *rest)
    ours = csrc_triton.adapter_grads(*far, 2.0, None, True, torch.float16, torch.float16)
    eager = reference.adapter_grads(*near, 2.0, None, True, torch.float16, torch.float16)
    exact = reference.adapter_grads(*doubles(*near), 2.0, None, True, torch.float64, torch.float64)
    assert_all_close("ds da db", ours, eager, exact)


def test_rows_of_y_in_place(inputs):
    s = reference.down_project(inputs.x, inputs.lora_A, torch.float16)
    y = far_apart(inputs.g, 0)
    eager, exact = inputs.g.clone(), inputs.g.double()
    csrc_triton.low_rank_add(y, s, inputs.lora_B)
    reference.low_rank_add(eager, s, inputs.lora_B)
    reference.low_rank_add(exact, *doubles(s, inputs.lora_B))
    assert_close(y, eager, exact, "y")


@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_rows_of_a_factor(inputs, norm):
    a, b = far_apart(inputs.lora_A[:2], 0), inputs.lora_B[:, :2]
    c = csrc_triton.weight_coefficient(a, b, 2.0, norm)
    exact = reference.weight_coefficient(*doubles(inputs.lora_A[:2], b), 2.0, norm)
    assert_close(c, reference.weight_coefficient(a, b, 2.0, norm), exact, "C")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, s, w, b: csrc_triton.down_project(x, w[:3], s.dtype),
        lambda x, s, w, b: csrc_triton.adapted_linear(x, w, None, w[:3], b, s.dtype),
        lambda x, s, w, b: csrc_triton.fused_linear(x, w, None, s, b),
        lambda x, s, w, b: csrc_triton.low_rank_add(x, s, b),
        lambda x, s, w, b: csrc_triton.adapter_grads(x, x, s, b, None, 2.0, None, False, None, s.dtype),
        lambda x, s, w, b: csrc_triton.grouped_down_project(x, w[None, :3], ENDS, s.dtype),
    ],
    ids=["down_project", "adapted_linear", "fused_linear", "low_rank_add", "adapter_grads", "grouped_down_project"],
)
def test_rows_beyond_32_bits_are_refused(call):
    x, s, w, b = (torch.empty(shape, device="meta") for shape in [(MAX_ROWS + 1, 8), (MAX_ROWS + 1, 3), (8, 8), (8, 3)])
    with pytest.raises(ValueError, match="at most 1073741824 rows at a time, got 1073741825: split the batch"):
        call(x, s, w, b)


def test_groups_of_parts_beyond_32_bits(device):
    """The third of three groups begins at element 2^31. One tile of each is summed: TILES says that there are no more."""
    from csrc_triton.combine import _combine_kernel
    from csrc_triton.tiling import TRITON_DTYPE

    numel = 2**30
    partial = torch.empty(2 * numel + 128, device=device)
    out = torch.empty(2 * numel + 128, dtype=torch.float16, device=device)
    for group in range(3):
        partial[group * numel : group * numel + 128] = group + 1
        out[group * numel : group * numel + 128] = -1
    flags = {"CHAIN": "", "HAS_WEIGHT": False, "HAS_FIRST": False}
    sizes = {"OUT_DTYPE": TRITON_DTYPE[out.dtype], "UNIT": 8, "BLOCK_P": 1, "BLOCK": 128}
    _combine_kernel[(3,)](partial, None, None, out, 1, numel // 8, 1, 0, **flags, **sizes)
    for group in range(3):
        assert (out[group * numel : group * numel + 128] == group + 1).all()
