"""Rows of R elements, wherever they lie: what is said to the compiler of R and of strides changes no bit."""

import pytest
import torch
from torch import Tensor

import csrc_triton
from allora_kernels.testing import make_inputs
from csrc_triton import configs, plans
from csrc_triton.down_project import down_project_twice
from csrc_triton.low_rank_add import low_rank_product
from csrc_triton.outer_norms import outer_norms
from csrc_triton.sweep import Rule
from csrc_triton.tiling import step_of


@pytest.mark.parametrize(
    "sizes, step",
    [
        ((8,), 8),
        ((24, 40), 8),
        ((8, 16), 8),
        ((8, 12), 4),
        ((6, 8), 2),
        ((3, 8), 1),
        ((16,), 1),
        ((48, 32), 1),
        ((0, 8), 8),
    ],
)
def test_the_step_divides_all_and_is_1_where_16_does(sizes, step):
    assert step_of(*sizes) == step


def spread(t: Tensor, gap: int) -> Tensor:
    """A copy of t whose rows lie `gap` elements apart from one another."""
    return t.new_full((*t.shape[:-1], t.shape[-1] + gap), float("nan"))[..., : t.shape[-1]].copy_(t)


def calls(x, weight, g, s, a, b):
    """Every kernel that reads or writes rows of R elements."""
    c = torch.linspace(0.5, 2, b.shape[0], device=b.device)
    arch, (M, K), (N, R) = configs.arch_of(x.device), x.shape, b.shape
    tiles = plans.Plan("tiles", configs.candidates("fused_linear", N, K, R, x.dtype, arch)[-1])
    ends = torch.tensor([M // 3, M], dtype=torch.int32, device=x.device)
    pair, groups = torch.stack([b, b / 2]), torch.stack([a, a / 2])
    pair = spread(pair, b.stride(0) - R)
    segments = csrc_triton.Segments(M, 1)
    yield lambda: csrc_triton.fused_linear(x, weight, None, s, b, tiles)
    for config in configs.candidates("fused_linear_persistent", N, K, R, x.dtype, arch):
        persistent = plans.Plan("persistent", config)
        yield lambda persistent=persistent: csrc_triton.fused_linear(x, weight, None, s, b, persistent)
    yield lambda: csrc_triton.adapted_linear(x, weight, None, a, b, s.dtype)
    yield lambda: low_rank_product(s, b, None, x.dtype)
    yield lambda: down_project_twice(g, b.mT, c, s.dtype)
    yield lambda: outer_norms(g, s, b, Rule("entry"), segments)
    for norm in ("row", "entry"):
        yield lambda norm=norm: csrc_triton.adapter_grads(g, x, s, b, c, 2.0, norm, True, a.dtype, b.dtype)
    yield lambda: csrc_triton.layer_grads(g, x, s, weight, a, b, 2.0, "factor", a.dtype, b.dtype)
    yield lambda: csrc_triton.grouped_fused_linear(x, weight, None, s, pair, ends)
    yield lambda: csrc_triton.grouped_down_project(g, pair.mT, ends, s.dtype)
    both = torch.stack([c, c])
    yield lambda: csrc_triton.grouped_adapter_grads(g, x, s, pair, both, ends, 2.0, "row", True, a.dtype, b.dtype)
    yield lambda: csrc_triton.grouped_down_project(x, groups, ends, s.dtype)


@pytest.mark.parametrize("gap", [1, 2, 4, 8, 24])
@pytest.mark.parametrize("R", [2, 4, 8, 12, 24])
def test_rows_that_lie_apart(device, R, gap):
    inputs = make_inputs(37, 48, 32, R, torch.float16, device=device)
    x, weight, a, b, g = (getattr(inputs, name) for name in ("x", "weight", "lora_A", "lora_B", "g"))
    s = csrc_triton.down_project(x, a, torch.float16)
    near = calls(x, weight, g, s, a, b)
    apart = calls(x, weight, g, spread(s, gap), a, spread(b, gap))
    for i, (one, other) in enumerate(zip(near, apart)):
        expected, found = one(), other()
        for left, right in zip(*((result,) if isinstance(result, Tensor) else result for result in (expected, found))):
            assert torch.equal(left, right), i
