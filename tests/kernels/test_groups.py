"""The kernels for groups of rows, each with its own factors, against `groups.reference` in fp64."""

import pytest
import torch
from cases import LAYOUTS, dtypes
from comparing import ETA, assert_all_close, doubles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference, use_batch_invariant
from allora_kernels.groups import reference as grouped
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs

norms = pytest.mark.parametrize("norm", reference.NORMS)

# Rows of each group; rows after the last that belong to none. Empty groups, one row each, all in one, none at all.
CUTS = {
    "ragged": ((37, 0, 70, 1), 5),
    "all-in-one": ((0, 0, 130, 0), 0),
    "one-row-each": ((1,) * 9, 2),
    "half-empty": ((3, 0) * 9, 0),
    "one-group": ((45,), 0),
    "in-no-group": ((0, 0), 7),
    "no-rows": ((0, 0, 0), 0),
}
cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def make(cut, N, K, R, dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """(x, weight, bias, lora_A, lora_B, g, offsets)"""
    lengths, rest = cut
    layers = [make_inputs(1, N, K, R, dtype, adapter_dtype, device=device, seed=e) for e in range(len(lengths))]
    x, *_, g = make_inputs(sum(lengths) + rest, N, K, R, dtype, adapter_dtype, device=device)
    factors = (
        torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias", "lora_A", "lora_B")
    )
    return x, *factors, g, torch.tensor(lengths, device=device).cumsum(0).int()


def check_products(x, weight, bias, a, b, g, offsets):
    compute = torch.promote_types(x.dtype, a.dtype)
    with poisoned_outputs():
        s = csrc_triton.grouped_down_project(*map(in_red_zone, (x, a, offsets)), compute)
    eager = grouped.grouped_down_project(x, a, offsets, compute)
    assert_close(s, eager, grouped.grouped_down_project(*doubles(x, a), offsets, torch.float64), "s")
    ds = grouped.grouped_down_project(g, b.mT, offsets, compute)
    for name, args in (("y", (x, weight, bias, eager, b)), ("dx", (g, weight.mT, None, ds, a.mT))):
        with poisoned_outputs():
            ours = csrc_triton.grouped_fused_linear(*map(in_red_zone, args), in_red_zone(offsets))
        exact = grouped.grouped_fused_linear(*doubles(*args), offsets)
        assert_close(ours, grouped.grouped_fused_linear(*args, offsets), exact, name)


def check_gradients(x, weight, bias, a, b, g, offsets, norm, need_ds=True, need_a=True, need_b=True):
    compute = torch.promote_types(x.dtype, a.dtype)
    s = grouped.grouped_down_project(x, a, offsets, compute)
    c = None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(a, b, ETA, norm)
        with poisoned_outputs():
            ours = csrc_triton.weight_coefficient(in_red_zone(a), in_red_zone(b), ETA, norm)
        assert_close(ours, c, reference.weight_coefficient(a.double(), b.double(), ETA, norm), "c")
    needs = (need_ds, a.dtype if need_a else None, b.dtype if need_b else None)
    wide = tuple(torch.float64 if dtype else None for dtype in needs[1:])
    tensors = (g, x if need_a else None, s, b, c, offsets)
    with poisoned_outputs():
        ours = csrc_triton.grouped_adapter_grads(*map(in_red_zone, tensors), ETA, norm, *needs)
    eager = grouped.grouped_adapter_grads(*tensors, ETA, norm, *needs)
    exact = grouped.grouped_adapter_grads(*doubles(*tensors), ETA, norm, need_ds, *wide)
    assert_all_close("ds da db", ours, eager, exact)


@cuts
def test_products(device, cut):
    check_products(*make(cut, 41, 53, 3, device=device))


@cuts
@norms
def test_gradients(device, cut, norm):
    check_gradients(*make(cut, 41, 53, 3, device=device), norm)


@norms
@pytest.mark.parametrize("sizes", [(64, 128, 16), (1, 90, 40), (70, 1, 136)])
def test_ranks_wider_than_a_tile_and_sizes_that_fill_one(device, norm, sizes):
    tensors = make(CUTS["ragged"], *sizes, device=device)
    check_products(*tensors)
    check_gradients(*tensors, norm)


@dtypes
@norms
def test_dtypes(device, dtypes, norm):
    tensors = make(CUTS["ragged"], 41, 53, 5, *dtypes, device=device)
    check_products(*tensors)
    check_gradients(*tensors, norm)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@norms
def test_any_strides(device, layout, norm):
    def every(t):
        return torch.stack([layout(part) for part in t]) if t.dim() == 3 else layout(t)

    x, weight, bias, a, b, g, offsets = make(CUTS["ragged"], 53, 41, 4, device=device)
    transposed = weight.mT.contiguous().mT
    wide = torch.randn(*bias.shape, 2, device=device)
    tensors = (layout(x), transposed, wide[..., 0], a.mT.contiguous().mT, every(b), layout(g), offsets)
    check_products(*tensors)
    check_gradients(*tensors, norm)


@norms
@pytest.mark.parametrize(
    "needs",
    [(True, True, False), (True, False, True), (False, True, False), (False, False, True), (True, False, False)],
)
def test_only_what_is_needed(device, norm, needs):
    check_gradients(*make(CUTS["ragged"], 41, 53, 3, device=device), norm, *needs)


@norms
@pytest.mark.parametrize("parts", [1, 5])
def test_pieces_of_long_groups_add_up(device, norm, parts, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: parts)
    check_gradients(*make(((90, 3, 0, 70), 4), 41, 53, 3, device=device), norm)


@norms
@pytest.mark.parametrize("rows, R", [(1, 3), (40, 3), (1, 40)])
def test_a_g_longer_than_the_scratch(device, norm, rows, R, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", rows * 4 * R * 2)
    tensors = make(((40, 0, 33, 9), 8), 150, 53, R, device=device)
    check_gradients(*tensors, norm)
    check_gradients(*tensors, norm, need_ds=False)


@norms
def test_rows_of_no_group_are_not_read(device, norm):
    x, *factors, g, offsets = make(CUTS["ragged"], 41, 53, 3, device=device)
    x[offsets[-1] :], g[offsets[-1] :] = float("nan"), float("nan")
    a, b = factors[2], factors[3]
    s = csrc_triton.grouped_down_project(x, a, offsets, torch.float32)
    y = csrc_triton.grouped_fused_linear(x, *factors[:2], s, b, offsets)
    c = csrc_triton.weight_coefficient(a, b, ETA, norm) if norm in reference.WEIGHT_NORMS else None
    grads = csrc_triton.grouped_adapter_grads(g, x, s, b, c, offsets, ETA, norm, True, torch.float32, torch.float32)
    assert (s[offsets[-1] :] == 0).all() and (y[offsets[-1] :] == 0).all() and (grads[0][offsets[-1] :] == 0).all()
    assert all(t.isfinite().all() for t in (s, y, *grads))


@norms
def test_one_group_is_the_single_layer(device, norm):
    x, _, _, a, b, g, offsets = make(((70,), 0), 41, 53, 3, device=device)
    s = csrc_triton.grouped_down_project(x, a, offsets, torch.float32)
    c = csrc_triton.weight_coefficient(a, b, ETA, norm) if norm in reference.WEIGHT_NORMS else None
    ours = csrc_triton.grouped_adapter_grads(g, x, s, b, c, offsets, ETA, norm, True, torch.float32, torch.float32)
    single_c = None if c is None else csrc_triton.weight_coefficient(a[0], b[0], ETA, norm)
    single = csrc_triton.adapter_grads(g, x, s, b[0], single_c, ETA, norm, True, torch.float32, torch.float32)
    torch.testing.assert_close(ours[0], single[0])
    torch.testing.assert_close(ours[1][0], single[1])
    torch.testing.assert_close(ours[2][0], single[2])


@norms
def test_the_same_bits_every_run(device, norm):
    x, _, _, a, b, g, offsets = make(((150, 3, 0, 90), 4), 70, 53, 40, device=device)
    s = grouped.grouped_down_project(x, a, offsets, torch.float32)
    c = reference.weight_coefficient(a, b, ETA, norm) if norm in reference.WEIGHT_NORMS else None
    args = (g, x, s, b, c, offsets, ETA, norm, True, torch.float32, torch.float32)
    first = csrc_triton.grouped_adapter_grads(*args)
    for _ in range(9 if device == "cuda" else 1):
        assert all(torch.equal(*pair) for pair in zip(first, csrc_triton.grouped_adapter_grads(*args)))


def test_a_row_has_the_same_bits_whatever_group_is_before_it(device):
    x, weight, bias, a, b, g, offsets = make(((33, 70), 0), 41, 300, 3, device=device)
    alone = torch.tensor([0, 70], device=device, dtype=torch.int32)
    use_batch_invariant(True)
    try:
        for row, w, f_a, f_b, extra in ((x, weight, a, b, bias), (g, weight.mT, b.mT, a.mT, None)):
            whole, part = (
                csrc_triton.grouped_fused_linear(
                    rows, w, extra, csrc_triton.grouped_down_project(rows, f_a, ends, torch.float32), f_b, ends
                )
                for rows, ends in ((row, offsets), (row[33:], alone))
            )
            assert torch.equal(whole[33:], part)
        tensors = (b, None, offsets, ETA, None, True, None, None)
        ds = csrc_triton.grouped_adapter_grads(g, None, x[:, :3].contiguous(), *tensors)[0]
        assert torch.equal(ds, csrc_triton.grouped_down_project(g, b.mT, offsets, torch.float32))
    finally:
        use_batch_invariant(False)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=7),
    rest=st.integers(0, 40),
    N=st.integers(16, 80),
    K=st.integers(16, 80),
    R=st.integers(1, 16),
    norm=st.sampled_from(reference.NORMS),
    pair=st.sampled_from([(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]),
)
def test_any_shape_and_cut(device, lengths, rest, N, K, R, norm, pair):
    tensors = make((tuple(lengths), rest), N, K, R, *pair, device=device)
    check_products(*tensors)
    check_gradients(*tensors, norm)
