import pytest
import torch
from cases import dtypes, layouts, shapes
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import chain, configs
from csrc_triton.beside import Beside
from csrc_triton.down_project import down_project_beside


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


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True])
@dtypes
def test_counted_programs_in_rounds(device, dtypes, scaled, rounds, monkeypatch):
    sms = 2
    monkeypatch.setattr(configs, "sms_of", lambda arch: sms)
    compute, config = torch.promote_types(*dtypes), configs.Config(64, 0, 64, 16, 4, 2)
    x, _, _, a, _, _ = make_inputs(64 * sms * rounds - 30, 1, 144, 16, *dtypes, device=device)
    under_way = chain.counts(x.device)
    beside = Beside(config, rounds, chain.Counted(under_way, rounds, 64 * sms))
    scale = torch.rand(144, device=device) if scaled else None
    with poisoned_outputs():
        sums = down_project_beside(in_red_zone(x), in_red_zone(a), scale, compute, beside)
    assert len(sums) == 1 + scaled and not under_way.any()
    for s, factor in zip(sums, (None, scale)):
        scale_of = 1.0 if factor is None else factor
        values = reference.down_project(x, (a * scale_of).to(compute), compute)
        assert_close(s, values, reference.down_project(x.double(), a.double() * scale_of, torch.float64), "s")
