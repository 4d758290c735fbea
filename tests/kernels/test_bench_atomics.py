"""The order of operations with atomics, which the benchmark compares with, computes plain LoRA's gradients."""

import pytest
import torch
from cases import dtypes, shape_id
from red_zones import in_red_zone, poisoned_outputs

from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from bench import atomics
from bench.cases import Case
from bench.providers import PROVIDERS, Judge


@pytest.mark.parametrize("shape", [(37, 53, 41, 3), (70, 64, 128, 16), (1100, 130, 20, 40)], ids=shape_id)
@dtypes
def test_matches_the_reference(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    compute = torch.promote_types(*dtypes)

    def by_reference(x, g, lora_A, lora_B, dtype):
        s = reference.down_project(x, lora_A, dtype)
        return s, reference.adapter_grads(g, x, s, lora_B, None, 2.0, None, True, dtype, dtype)

    s, eager = by_reference(inputs.x, inputs.g, inputs.lora_A, inputs.lora_B, compute)
    tensors = (inputs.g, inputs.x, s, inputs.lora_B)
    exact = reference.adapter_grads(*(t.double() for t in tensors), None, 2.0, None, True, *[torch.float64] * 2)
    with poisoned_outputs():
        ours = atomics.adapter_grads(*map(in_red_zone, tensors))
    for name, actual, plain, right in zip(("ds", "da", "db"), ours, eager, exact):
        assert_close(actual.to(compute), plain, right, name)


def test_the_whole_provider_is_right(device):
    inputs = Case(70, 53, 41, 8, "float32", "float32").inputs(device)
    spec = PROVIDERS["epilogue-atomics"]
    assert spec.obstacle(inputs) is None
    assert Judge().verdict(spec, spec.build(inputs), inputs) is None
