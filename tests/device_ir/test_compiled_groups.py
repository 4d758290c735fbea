"""The launchers for groups of rows, with the configurations of every architecture: the values against fp64."""

import itertools
import sys

import pytest
import torch
from comparing import ETA, assert_all_close, doubles, group_by_group
from matrix import down_project_in_order, laid_out, over

import csrc_triton
from allora_kernels import reference
from allora_kernels.groups import reference as grouped
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs

# Rows of each group, and those that belong to none.
CUTS = [((37, 0, 70, 1), 5), ((0, 0, 130, 0), 0), ((1,) * 9, 2), ((0, 0), 7), ((150,), 0)]


def make(cut, shape, dtypes, layout):
    """(x, weight, bias, lora_A, lora_B, g, offsets)"""
    lengths, rest = cut
    _, N, K, R = shape
    layers = [make_inputs(1, N, K, R, *dtypes, seed=e) for e in range(len(lengths))]
    x, *_, g = make_inputs(sum(lengths) + rest, N, K, R, *dtypes)
    weight, bias, a, b = (torch.stack(t) for t in zip(*(layer[1:5] for layer in layers)))
    weight, a, b = (torch.stack([laid_out(part, layout) for part in t]) for t in (weight, a, b))
    if layout == "columns":
        weight, a, b = (t.mT.contiguous().mT for t in (weight, a, b))
    return laid_out(x, layout), weight, bias, a, b, laid_out(g, layout), torch.tensor(lengths).cumsum(0).int()


def grouped_down_project_in_order(x, a, offsets, dtype):
    s = torch.zeros(x.shape[0], a.shape[1], dtype=dtype)
    for e, (start, stop) in enumerate(itertools.pairwise([0, *offsets.tolist()])):
        s[start:stop] = down_project_in_order(x[start:stop], a[e], dtype)
    return s


def some_order(x):
    """An order of x's rows (int32)."""
    return torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).int()


def some_etas(groups):
    """1/η² of each group."""
    return torch.linspace(0.3, 2.0, groups)


@over(
    "arch", "few_sms", "dtypes", "shape", "layout", cut=CUTS, rows=["sorted", "in any order", "of one weight", "added"]
)
def test_products(arch, few_sms, dtypes, shape, layout, cut, rows):
    x, weight, bias, a, b, g, offsets = make(cut, shape, dtypes, layout)
    compute = torch.promote_types(*dtypes)
    order = None if rows == "sorted" else some_order(x)
    if rows != "sorted":
        weight, bias = weight[0], bias[0]
    s = csrc_triton.grouped_down_project(x, a, offsets, compute, order)
    exact = grouped.grouped_down_project(*doubles(x, a), offsets, torch.float64, order)
    eager = grouped_down_project_in_order(x if order is None else x[order], a, offsets, compute)
    assert_close(s, eager, exact, "s")
    if rows == "of one weight":
        order = None
    by_vendor = rows == "added"
    ds = grouped.grouped_down_project(g, b.mT, offsets, compute, order)
    for name, args in (("y", (x, weight, bias, eager, b)), ("dx", (g, weight.mT, None, ds, a.mT))):
        ours = csrc_triton.grouped_fused_linear(*args, offsets, order, by_vendor)
        exact = grouped.grouped_fused_linear(*doubles(*args), offsets, order)
        assert_close(ours, grouped.grouped_fused_linear(*args, offsets, order), exact, name)


@over(
    "arch", "few_sms", "dtypes", "norm", "shape", "layout", cut=CUTS, form=["planned", "chunked"], ordered=[False, True]
)
def test_gradients(arch, few_sms, dtypes, norm, shape, layout, cut, form, ordered, monkeypatch):
    if form == "chunked":
        monkeypatch.setattr(configs, "SCRATCH_BYTES", 32 * 4 * 3)
    x, _, _, a, b, g, offsets = make(cut, shape, dtypes, layout)
    order, etas = (some_order(x), some_etas(len(a))) if ordered else (None, None)
    s, c = grouped.grouped_down_project(x, a, offsets, torch.promote_types(*dtypes), order), None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(a, b, ETA, norm, etas)
    args = (g, x, s, b, c, offsets)
    ours = csrc_triton.grouped_adapter_grads(*args, ETA, norm, True, a.dtype, b.dtype, order, etas)
    eager = grouped.grouped_adapter_grads(*args, ETA, norm, True, a.dtype, b.dtype, order, etas)
    exact = grouped.grouped_adapter_grads(*doubles(*args), ETA, norm, True, torch.float64, torch.float64, order, etas)
    assert_all_close("ds da db", ours, eager, exact)


# Of each group, the rows of each sample.
SAMPLES = [((5, 0, 33), (0, 0, 0), (1, 70, 2)), ((37,), (0,), (3,)), ((1,) * 5,) * 4, ((0, 150), (0, 0))]


@over("arch", "few_sms", "dtypes", "norm", "shape", "layout", lengths=SAMPLES, many=[False, True])
def test_samples(arch, few_sms, dtypes, norm, shape, layout, lengths, many, monkeypatch):
    if many:
        monkeypatch.setattr(sys.modules["csrc_triton.grouped_sample_grad"], "_MOST_PROGRAMS", 4)
    x, _, _, a, b, g, offsets = make((tuple(map(sum, lengths)), 0), shape, dtypes, layout)
    s, c = grouped.grouped_down_project(x, a, offsets, torch.promote_types(*dtypes)), None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(a, b, ETA, norm)
    tensors, samples = (g, x, s, b, c), len(lengths[0])
    pieces = torch.tensor([0, *(length for group in lengths for length in group)]).cumsum(0).int()
    _, *ours = csrc_triton.grouped_sample_grads(*tensors, pieces, samples, ETA, norm, True, True, True)
    eager = group_by_group(tensors, pieces, samples, norm, torch.float32)
    exact = group_by_group(doubles(*tensors), pieces, samples, norm, torch.float64)
    assert_all_close("da db", ours, eager, exact)
    _, *sums, squares = csrc_triton.grouped_sample_squared_norms(
        *tensors, pieces, samples, ETA, norm, True, torch.float32, torch.float32
    )
    wide = sum(t.flatten(1).square().sum(1) for t in exact)
    # S and u are rounded to 16 bits before they are summed: relative to the largest, nothing else may be lost.
    assert (squares.double() - wide).abs().max() <= (1e-5 if s.dtype == torch.float32 else 2e-2) * wide.max()
    for name, found, e, total in zip(("da", "db"), sums, eager, exact):
        assert_close(found, e.sum(0), total.sum(0), f"sum of {name}")


@over(
    "arch",
    norm=list(reference.WEIGHT_NORMS),
    shape=[(1, 45, 67, 40), (1, 130, 700, 3)],
    groups=[1, 5],
    own=[False, True],
)
def test_coefficients(arch, norm, shape, groups, own):
    _, _, _, a, b, _, _ = make(((0,) * groups, 1), shape, (torch.float32, torch.float32), "rows")
    etas = some_etas(groups) if own else None
    ours = csrc_triton.weight_coefficient(a, b, ETA, norm, etas)
    exact = reference.weight_coefficient(a.double(), b.double(), ETA, norm, etas)
    assert_close(ours, reference.weight_coefficient(a, b, ETA, norm, etas), exact, "c")


def test_an_order_past_the_rows_is_a_fault_and_not_a_wrong_value():
    x, _, _, a, *_ = make(((3, 4), 0), (1, 16, 16, 3), (torch.float32, torch.float32), "rows")
    from ttsem.sanitize import KernelFault

    ends, order = torch.tensor([3, 7], dtype=torch.int32), torch.tensor([0, 1, 2, 3, 4, 5, 7], dtype=torch.int32)
    with pytest.raises(KernelFault):
        csrc_triton.grouped_down_project(x, a, ends, torch.float32, order)


def test_an_offset_past_the_rows_is_a_fault_and_not_a_wrong_value():
    x, _, _, a, *_ = make(((3, 4), 0), (1, 16, 16, 3), (torch.float32, torch.float32), "rows")
    from ttsem.sanitize import KernelFault

    with pytest.raises(KernelFault):
        csrc_triton.grouped_down_project(x, a, torch.tensor([3, 9], dtype=torch.int32), torch.float32)
