"""The kernels for groups whose rows lie in any order, with one weight for all and an eta for each: bit for bit those of sorted
rows, of a weight for each, of one eta."""

import pytest
import torch
from comparing import assert_all_close, doubles
from red_zones import in_red_zone, poisoned_outputs
from test_groups import cuts, make, norms

import csrc_triton
from allora_kernels import reference, use_batch_invariant
from allora_kernels.groups import reference as grouped
from allora_kernels.testing import assert_close
from csrc_triton import batch_invariance, configs

by_vendor = pytest.mark.parametrize("by_vendor", [False, True])
ETAS = (1.3, 0.4, 7.0, 2.0)
F32 = torch.float32


def make_shuffled(cut, N, K, R, device, **settings):
    """(x, weight, bias, lora_A, lora_B, g, ends, order): one weight and bias; x and g in an order of their own."""
    x, weight, bias, *rest, ends = make(cut, N, K, R, device=device, **settings)
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1)).to(device).int()
    return x, weight[0].contiguous(), bias[0].contiguous(), *rest, ends, order


def inverse_squares(groups, device):
    return torch.tensor([ETAS[e % len(ETAS)] ** -2 for e in range(groups)], device=device)


@cuts
@by_vendor
def test_products(device, cut, by_vendor):
    x, weight, bias, a, b, g, ends, order = make_shuffled(cut, 41, 53, 3, device)
    with poisoned_outputs():
        s = csrc_triton.grouped_down_project(*map(in_red_zone, (x, a, ends)), F32, in_red_zone(order))
    assert torch.equal(s, csrc_triton.grouped_down_project(x[order.long()], a, ends, F32))
    ds = csrc_triton.grouped_down_project(g, b.mT, ends, F32, order)
    for name, args in (("y", (x, weight, bias, s, b)), ("dx", (g, weight.mT, None, ds, a.mT))):
        with poisoned_outputs():
            ours = csrc_triton.grouped_fused_linear(*map(in_red_zone, (*args, ends, order)), by_vendor)
        exact = grouped.grouped_fused_linear(*doubles(*args), ends, order)
        assert_close(ours, grouped.grouped_fused_linear(*args, ends, order), exact, name)
        if by_vendor:
            continue
        each = args[1].expand(len(ends), *args[1].shape), None if args[2] is None else args[2].expand(len(ends), -1)
        sorted_ = csrc_triton.grouped_fused_linear(args[0][order.long()], *each, *args[3:], ends)
        rows = order[: int(ends[-1])].long()
        assert torch.equal(ours[rows], sorted_[: len(rows)])


@cuts
@norms
def test_gradients(device, cut, norm):
    x, _, _, a, b, g, ends, order = make_shuffled(cut, 41, 53, 3, device)
    check_gradients(x, a, b, g, ends, order, norm)


def check_gradients(x, a, b, g, ends, order, norm, need_ds=True):
    inverse = inverse_squares(len(ends), x.device)
    s = csrc_triton.grouped_down_project(x, a, ends, F32, order)
    c = None
    if norm in reference.WEIGHT_NORMS:
        with poisoned_outputs():
            c = csrc_triton.weight_coefficient(*map(in_red_zone, (a, b)), 1e9, norm, in_red_zone(inverse))
        for e in range(len(ends)):
            one = csrc_triton.weight_coefficient(a[e : e + 1], b[e : e + 1], ETAS[e % len(ETAS)], norm)
            torch.testing.assert_close(c[e], one[0], rtol=1e-6, atol=0)
        exact = grouped.weight_coefficient(a.double(), b.double(), 1e9, norm, inverse.double())
        assert_close(c, grouped.weight_coefficient(a, b, 1e9, norm, inverse), exact, "c")
    args, settings = (g, x, s, b, c, ends), (1e9, norm, need_ds, F32, F32)
    with poisoned_outputs():
        ours = csrc_triton.grouped_adapter_grads(
            *map(in_red_zone, args), *settings, in_red_zone(order), in_red_zone(inverse)
        )
    rows = order.long()
    sorted_ = csrc_triton.grouped_adapter_grads(g[rows], x[rows], s, b, c, ends, *settings, None, inverse)
    assert all(torch.equal(*pair) for pair in zip(ours, sorted_))
    eager = grouped.grouped_adapter_grads(*args, *settings, order, inverse)
    wide = (1e9, norm, need_ds, torch.float64, torch.float64)
    exact = grouped.grouped_adapter_grads(*doubles(*args), *wide, order, inverse.double())
    assert_all_close("ds da db", ours, eager, exact)


@norms
@pytest.mark.parametrize("rows", [1, 40])
def test_a_g_longer_than_the_scratch(device, norm, rows, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", rows * 4 * 3 * 2)
    x, _, _, a, b, g, ends, order = make_shuffled(((40, 0, 33, 9), 8), 150, 53, 3, device)
    check_gradients(x, a, b, g, ends, order, norm)
    check_gradients(x, a, b, g, ends, order, norm, need_ds=False)


@norms
@by_vendor
def test_what_belongs_to_no_group_meets_no_factor(device, norm, by_vendor):
    x, weight, bias, a, b, g, ends, order = make_shuffled(((20, 0, 70, 1), 45), 41, 53, 3, device)
    b[-1, 0, 0], a[-1, 0, 0] = float("nan"), float("inf")
    clean = order[: int(ends[2])].long()
    none = order[int(ends[-1]) :].long()
    s = csrc_triton.grouped_down_project(x, a, ends, F32, order)
    y = csrc_triton.grouped_fused_linear(x, weight, bias, s, b, ends, order, by_vendor)
    assert y[clean].isfinite().all() and y[none].isfinite().all()
    c = csrc_triton.weight_coefficient(a, b, 2.0, norm) if norm in reference.WEIGHT_NORMS else None
    ds, da, db = csrc_triton.grouped_adapter_grads(g, x, s, b, c, ends, 2.0, norm, True, F32, F32, order)
    stop, after = int(ends[2]), int(ends[-1])
    assert ds[:stop].isfinite().all() and (ds[after:] == 0).all() and (s[after:] == 0).all()
    assert da[:3].isfinite().all() and db[:3].isfinite().all() and not da[3].isfinite().all()
    dx = csrc_triton.grouped_fused_linear(g, weight.mT, None, ds, a.mT, ends, order, by_vendor)
    assert dx[clean].isfinite().all() and dx[none].isfinite().all()


@norms
def test_under_batch_invariance_a_group_s_gradients_do_not_know_the_others(device, norm, monkeypatch):
    # Thirds of 199 rows and of 150 are pieces of 96 and of 64.
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: 3)
    monkeypatch.setattr(batch_invariance, "PLANNED_ROWS", 180)
    x, _, _, a, b, g, ends, _ = make_shuffled(((33, 150, 7), 9), 41, 300, 3, device)
    alone = torch.tensor([0, 150, 150], device=device, dtype=torch.int32)
    with use_batch_invariant():
        found = []
        for rows, where in ((slice(None), ends), (slice(33, 183), alone)):
            s = csrc_triton.grouped_down_project(x[rows], a, where, F32)
            c = csrc_triton.weight_coefficient(a, b, 2.0, norm) if norm in reference.WEIGHT_NORMS else None
            found.append(csrc_triton.grouped_adapter_grads(g[rows], x[rows], s, b, c, where, 2.0, norm, True, F32, F32))
    (ds, da, db), (ds_alone, da_alone, db_alone) = found
    assert torch.equal(ds[33:183], ds_alone) and torch.equal(da[1], da_alone[1]) and torch.equal(db[1], db_alone[1])
