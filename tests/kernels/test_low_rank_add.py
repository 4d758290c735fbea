import torch
from cases import dtypes, layouts, shapes
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs


def check(y, s, b):
    ours, eager, exact = in_red_zone(y), y.clone(), y.double()
    with poisoned_outputs():
        csrc_triton.low_rank_add(ours, in_red_zone(s), in_red_zone(b))
    reference.low_rank_add(eager, s, b)
    reference.low_rank_add(exact, s.double(), b.double())
    assert_close(ours, eager, exact, "y")


@shapes
@dtypes
def test_matches_the_reference(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    check(inputs.g, reference.down_project(inputs.x, inputs.lora_A, torch.promote_types(*dtypes)), inputs.lora_B)


@layouts
def test_takes_any_strides(device, layout):
    inputs = make_inputs(70, 53, 41, 16, device=device)
    s = reference.down_project(inputs.x, inputs.lora_A, torch.float32)
    check(layout(inputs.g), layout(s), layout(inputs.lora_B))


def test_nothing_around_y_is_changed(device):
    inputs = make_inputs(37, 53, 41, 16, device=device)
    around = torch.full((80, 100), 1234.0, device=device)
    y = around[20:57, 10:63]
    s = reference.down_project(inputs.x, inputs.lora_A, torch.float32)
    csrc_triton.low_rank_add(y, in_red_zone(s), in_red_zone(inputs.lora_B))
    assert (y != 1234.0).all()
    y.fill_(1234.0)
    assert (around == 1234.0).all()
