import pytest
import torch
from red_zones import in_red_zone, poisoned_outputs

from allora_kernels.testing import assert_close
from csrc_triton.combine import combine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 41), (2, 700, 3), (2, 0, 5)])
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_the_parts(device, dtype, shape, scaled):
    partial = torch.randn(shape, device=device)
    scale = torch.rand(2 * shape[1], device=device)[::2] if scaled else None
    with poisoned_outputs():
        out = combine(in_red_zone(partial), dtype, in_red_zone(scale))
    exact, eager = partial.double().sum(0), partial.sum(0)
    if scaled:
        exact, eager = scale.double()[:, None] * exact, scale[:, None] * eager
    assert_close(out, eager.to(dtype), exact, "sum")


def test_one_scale_for_all_rows(device):
    partial, scale = torch.ones(2, 3, 4, device=device), torch.tensor([0.5], device=device)
    assert torch.equal(combine(partial, torch.float32, scale.expand(3)), torch.ones(3, 4, device=device))
