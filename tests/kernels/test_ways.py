"""Every way a linear product can go, forced, against the reference: y with S, and dX by strides."""

import functools
import sys

import pytest
import torch
from cases import SHAPES, WIDE_RANK, dtypes, layouts, shape_id
from comparing import assert_all_close, doubles
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import allora_linear, reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, plans

ways = pytest.mark.parametrize("way", plans.WAYS)
# Rows of whole 16 bytes, as descriptors need; nothing else is a multiple of a tile.
ALIGNED_SHAPES = [(1, 8, 8, 1), (37, 264, 56, 3), (130, 200, 72, 40), (70, 64, 128, 16), (33, 136, 200, 200)]
CASES = [
    *(("inside", shape) for shape in SHAPES),
    *(("vendor", shape) for shape in [*SHAPES, WIDE_RANK]),
    *((way, shape) for way in plans.PERSISTENT for shape in ALIGNED_SHAPES),
]


def cases(*ways):
    chosen = [case for case in CASES if case[0] in ways]
    return pytest.mark.parametrize("way, shape", chosen, ids=lambda v: v if isinstance(v, str) else shape_id(v))


def plan_for(way, op, shape, dtypes, device):
    """The first plan of this way, or a skip where no such plan exists for the case."""
    x_dtype, low_rank_dtype = dtypes[0], torch.promote_types(*dtypes)
    call = plans.Call(op, *shape, x_dtype, low_rank_dtype)
    same = dtypes[0] == dtypes[1]
    aligned = x_dtype.itemsize == 2 and shape[1] % 8 == 0 and shape[2] % 8 == 0
    describable = (plans.EVERYTHING if same else plans.WIDE) if aligned else plans.NOTHING
    options = plans.options(call, configs.arch_of(torch.device(device)), describable)
    found = [plan for plan in options if plan.way == way]
    if not found or (way == "pipelined" and device == "cpu"):
        # Gluon has no interpreter, even where a GPU's configurations are interpreted.
        pytest.skip(f"no plan goes {way} with this rank and these dtypes on this device")
    return found[0]


@cases("inside", "vendor", *plans.PERSISTENT)
@dtypes
def test_y_and_s(device, way, shape, dtypes):
    plan = plan_for(way, "adapted_linear", shape, dtypes, device)
    *tensors, _ = make_inputs(*shape, *dtypes, device=device)
    dtype = torch.promote_types(*dtypes)
    with poisoned_outputs():
        y, s = csrc_triton.adapted_linear(*map(in_red_zone, tensors), dtype, plan)
    exact = reference.adapted_linear(*doubles(*tensors), torch.float64)
    assert_all_close("y s", (y, s), reference.adapted_linear(*tensors, dtype), exact)


@cases("inside", "tiles", *plans.PERSISTENT)
@dtypes
def test_c_beside_y_is_c(device, way, shape, dtypes):
    plan = plan_for(way, "adapted_linear", shape, dtypes, device)
    *tensors, _ = make_inputs(*shape, *dtypes, device=device)
    dtype = torch.promote_types(*dtypes)
    with poisoned_outputs():
        *products, c = csrc_triton.adapted_linear_and_coefficient(*map(in_red_zone, tensors), dtype, 2.0, plan)
    for ours, alone in zip(products, csrc_triton.adapted_linear(*tensors, dtype, plan), strict=True):
        assert torch.equal(ours, alone)
    assert torch.equal(c, csrc_triton.weight_coefficient(*tensors[3:], 2.0, "row"))


@cases("vendor", *plans.PERSISTENT)
@dtypes
def test_dx_by_strides(device, way, shape, dtypes):
    m, n, k, r = shape
    plan = plan_for(way, "fused_linear", (m, k, n, r), dtypes, device)
    inputs = make_inputs(*shape, *dtypes, device=device)
    ds = reference.down_project(inputs.g, inputs.lora_B.mT, torch.promote_types(*dtypes))
    args = (inputs.g, inputs.weight.mT, None, ds, inputs.lora_A.mT)
    with poisoned_outputs():
        dx = csrc_triton.fused_linear(*map(in_red_zone, args), plan)
    assert_close(dx, reference.fused_linear(*args), reference.fused_linear(*doubles(*args)), "dx")


@ways
@layouts
@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16, torch.float32)])
def test_takes_any_strides(device, way, layout, dtypes):
    shape, dtype = (70, 56, 136, 16), torch.promote_types(*dtypes)
    plan = plan_for(way, "adapted_linear", shape, dtypes, device)
    x, weight, bias, lora_A, lora_B, _ = make_inputs(*shape, *dtypes, device=device)
    tensors = (layout(x), layout(weight), bias.repeat_interleave(2)[::2], layout(lora_A), layout(lora_B))
    call = plans.Call("adapted_linear", *shape, dtypes[0], dtype)
    reached = csrc_triton.describable(*tensors[:2], tensors[4])
    if plan not in plans.options(call, configs.arch_of(torch.device(device)), reached):
        pytest.skip("descriptors do not reach these strides")
    results = csrc_triton.adapted_linear(*tensors, dtype, plan)
    exact = reference.adapted_linear(*doubles(*tensors), torch.float64)
    assert_all_close("y s", results, reference.adapted_linear(*tensors, dtype), exact)


@pytest.mark.parametrize("way", plans.PERSISTENT)
def test_a_persistent_grid_reads_rows_cut_from_wider_ones(device, way):
    shape, dtype = (70, 56, 40, 8), torch.bfloat16
    plan = plan_for(way, "adapted_linear", shape, (dtype, dtype), device)
    x, weight, bias, lora_A, lora_B, _ = make_inputs(*shape, dtype, device=device)
    wide_x, wide_weight = (torch.full((t.shape[0], 64), torch.nan, dtype=dtype, device=device) for t in (x, weight))
    wide_x[:, 8:48], wide_weight[:, 16:56] = x, weight
    cut = (wide_x[:, 8:48], wide_weight[:, 16:56], bias, lora_A, lora_B)
    results = csrc_triton.adapted_linear(*cut, dtype, plan)
    exact = reference.adapted_linear(*doubles(*cut), torch.float64)
    assert_all_close("y s", results, reference.adapted_linear(*cut, dtype), exact)


def test_s_inside_is_no_pass_of_its_own(device, monkeypatch):
    shape, dtypes = (7, 8, 16, 3), (torch.float16,) * 2
    *tensors, _ = make_inputs(*shape, *dtypes, device=device)
    passes = []
    # The package's attribute of that name is the function.
    module = sys.modules["csrc_triton.adapted_linear"]
    original = module.down_project
    monkeypatch.setattr(module, "down_project", lambda *args: passes.append(1) or original(*args))
    for way, expected in (("inside", 0), ("tiles", 1)):
        passes.clear()
        csrc_triton.adapted_linear(*tensors, dtypes[0], plan_for(way, "adapted_linear", shape, dtypes, device))
        assert len(passes) == expected


@pytest.mark.parametrize("way", plans.PERSISTENT)
def test_more_tiles_than_programs(device, way):
    shape, dtype = (300 if device == "cpu" else 4000, 1032, 40, 8), torch.float16
    plan = plan_for(way, "adapted_linear", shape, (dtype, dtype), device)
    *tensors, _ = make_inputs(*shape, dtype, device=device)
    y, _ = csrc_triton.adapted_linear(*tensors, dtype, plan)
    exact = reference.adapted_linear(*doubles(*tensors), torch.float64)
    assert_close(y, reference.adapted_linear(*tensors, dtype)[0], exact[0], "y")


@pytest.mark.parametrize(
    "columns, row_stride, offset, dtype, reached",
    [
        (64, 64, 0, torch.bfloat16, True),
        (64, 72, 8, torch.float16, True),
        (64, 64, 0, torch.float32, False),
        (64, 65, 0, torch.bfloat16, False),
        (64, 64, 1, torch.bfloat16, False),
        (64, 0, 0, torch.bfloat16, False),
        (60, 60, 0, torch.bfloat16, False),
    ],
)
def test_what_descriptors_reach(columns, row_stride, offset, dtype, reached):
    storage = torch.zeros(32 * 80, dtype=dtype)
    x = storage.as_strided((16, columns), (row_stride, 1), offset)
    weight = torch.zeros(24, columns, dtype=dtype)
    b = torch.zeros(24, 16, dtype=dtype)
    assert csrc_triton.describable(x, weight) == (plans.WIDE if reached else plans.NOTHING)
    assert csrc_triton.describable(x, weight, b) == (plans.EVERYTHING if reached else plans.NOTHING)
    assert csrc_triton.describable(x, weight.mT.contiguous().mT) == reached
    assert not csrc_triton.describable(x, weight[:7], b)


def test_which_factors_descriptors_reach():
    x, weight = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(24, 64, dtype=torch.bfloat16)
    flat = torch.zeros(24 * 16 + 8, dtype=torch.bfloat16)
    b, s = flat[:384].view(24, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    assert csrc_triton.describable(x, weight, b, s) == plans.EVERYTHING
    assert csrc_triton.describable(x, weight, b.mT.contiguous().mT, s) == plans.EVERYTHING
    # Under autocast factors are of another dtype than S; parameters may be views of a flat buffer.
    for factors in (
        (b.float(), s),
        (b.half(), s),
        (flat[1:385].view(24, 16), s),
        (b, s.float()),
        (b, s.mT),
        (b[:, :12], s),
    ):
        expected = plans.EVERYTHING if factors[0].shape[1] == 12 else plans.WIDE
        assert csrc_triton.describable(x, weight, *factors) == expected


@ways
@pytest.mark.parametrize("norm", ["row", "token", None])
def test_the_layer_takes_the_way_it_is_given(device, monkeypatch, way, norm):
    shape, dtypes = (37, 48, 80, 8), (torch.bfloat16,) * 2
    plan_for(way, "adapted_linear", shape, dtypes, device)
    inputs = make_inputs(*shape, *dtypes, device=device)
    taken = []

    def pick(call, device, describable):
        options = plans.options(call, configs.arch_of(device), describable)
        found = {plan.way: plan for plan in options}
        taken.append(found.get(way, found["tiles"]).way)
        return found.get(way, found["tiles"])

    monkeypatch.setattr(plans, "pick", pick)

    def run(f, inputs):
        x, lora_A, lora_B = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
        y = f(x, inputs.weight, inputs.bias, lora_A, lora_B, norm=norm)
        return y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.g)

    ours = run(functools.partial(allora_linear, backend="triton"), inputs)
    # S inside the GEMM is a forward pass's; dX has its dS from the sweep.
    assert taken == ([way, "tiles"] if way == "inside" else [way, way])
    eager = run(functools.partial(allora_linear, backend="eager"), inputs)
    assert_all_close("y dx da db", ours, eager, run(reference.allora_linear, inputs.to(torch.float64)))
