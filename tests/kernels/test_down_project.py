import pytest
import torch
from cases import dtypes, layouts, shapes
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs


def check(x, a, dtype):
    with poisoned_outputs():
        s = csrc_triton.down_project(in_red_zone(x), in_red_zone(a), dtype)
    exact = reference.down_project(x.double(), a.double(), torch.float64)
    assert_close(s, reference.down_project(x, a, dtype), exact, "s")


@shapes
@dtypes
def test_matches_the_reference(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    check(inputs.x, inputs.lora_A, torch.promote_types(*dtypes))


@layouts
def test_takes_any_strides(device, layout):
    inputs = make_inputs(37, 1, 257, 16, device=device)
    check(layout(inputs.x), layout(inputs.lora_A), torch.float32)


def test_repeated_rows_need_no_copy(device):
    inputs = make_inputs(1, 1, 257, 16, device=device)
    x = inputs.x.expand(37, 257)
    s = csrc_triton.down_project(x, inputs.lora_A, torch.float32)
    exact = reference.down_project(x.double(), inputs.lora_A.double(), torch.float64)
    assert_close(s, reference.down_project(x, inputs.lora_A, torch.float32), exact, "s")


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_k_add_up(device, parts, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: parts)
    inputs = make_inputs(37, 1, 257, 40, device=device)
    check(inputs.x, inputs.lora_A, torch.float32)


def test_under_autocast_the_factor_is_rounded_in_the_kernel(device):
    inputs = make_inputs(37, 1, 257, 16, torch.bfloat16, torch.float32, device=device)
    check(inputs.x, inputs.lora_A, torch.bfloat16)
