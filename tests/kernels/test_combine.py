import itertools

import pytest
import torch
from red_zones import in_red_zone, poisoned_outputs

from allora_kernels.testing import assert_close
from csrc_triton.combine import combine, combine_groups, combine_pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 41), (2, 700, 3), (2, 0, 5), (0, 3, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_the_parts(device, dtype, shape, weighted):
    partial = torch.randn(shape, device=device)
    weights = torch.rand(2 * shape[0], device=device)[::2] if weighted else None
    with poisoned_outputs():
        out = combine(in_red_zone(partial), dtype, in_red_zone(weights))
    w = torch.ones(shape[0], device=device) if weights is None else weights
    eager, exact = (torch.einsum("p,pij->ij", w.to(d), partial.to(d)) for d in (torch.float32, torch.float64))
    assert_close(out, eager.to(dtype), exact, "sum")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_torch_does(device, dtype):
    partial = torch.cat([torch.randn(1, 500), torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8]])], dim=1).to(device)
    assert torch.equal(combine(partial, dtype), partial[0].to(dtype))


@pytest.mark.parametrize("parts", [1, 3, 20])
@pytest.mark.parametrize("shapes", [((1, 1), (1, 1)), ((37, 41), (3, 8)), ((8, 16), (2, 701)), ((3, 700), (128,))])
def test_a_pair_has_the_sums_of_each_alone(device, parts, shapes):
    partials = [torch.randn(parts, *shape, device=device) for shape in shapes]
    dtypes = (torch.bfloat16, torch.float32)
    with poisoned_outputs():
        pair = combine_pair(*map(in_red_zone, partials), dtypes)
    for out, partial, dtype in zip(pair, partials, dtypes, strict=True):
        assert_close(out, combine(partial, dtype), partial.double().sum(0), "sum")
        # A compiler may add up a tile of another layout in another order.
        assert device != "cpu" or torch.equal(out, combine(partial, dtype))


def test_sums_equal_groups(device):
    partial = torch.randn(6, 5, 130, device=device)
    with poisoned_outputs():
        out = combine_groups(in_red_zone(partial), 3, 2, None)
    assert torch.equal(out, partial[::2] + partial[1::2])


def test_sums_ragged_groups(device):
    partial = torch.randn(6, 5, 130, device=device)
    first = torch.tensor([0, 0, 1, 4, 4, 6], dtype=torch.int32, device=device)
    with poisoned_outputs():
        out = combine_groups(in_red_zone(partial), 5, 0, first)
    exact = torch.stack([partial[a:b].double().sum(0) for a, b in itertools.pairwise(first.tolist())])
    assert_close(out, exact.float(), exact, "sums")
