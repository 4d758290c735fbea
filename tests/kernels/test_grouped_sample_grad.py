"""Per-sample gradients of groups and their norms, against `reference.adapter_grads` of each sample's rows in each group."""

import dataclasses
import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS
from comparing import ETA, assert_all_close, doubles, group_by_group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference, use_batch_invariant
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, grouped_sample_grad
from csrc_triton.sweep_plan import plan_sweep

norms = pytest.mark.parametrize("norm", reference.NORMS)

# Of each group, the rows of each sample; rows after the last that belong to none.
CUTS = {
    "ragged": (((5, 0, 33), (0, 0, 0), (1, 70, 2)), 4),
    "one-sample": (((37,), (0,), (3,)), 0),
    "all-in-one": (((0, 0), (0, 130), (0, 0)), 0),
    "one-row-each": (((1,) * 5,) * 4, 1),
    "one-group": (((40, 0, 3, 27),), 0),
    "in-no-group": (((0, 0), (0, 0)), 7),
    "no-rows": (((0, 0),) * 3, 0),
    "no-sample": (((), ()), 3),
}
cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def make(cut, N, K, R, norm, dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """(g, x, s, lora_B, c), pieces, samples"""
    lengths, rest = cut
    flat = [length for group in lengths for length in group]
    layers = [make_inputs(1, N, K, R, dtype, adapter_dtype, device=device, seed=e) for e in range(len(lengths))]
    a, b = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("lora_A", "lora_B"))
    x, *_, g = make_inputs(sum(flat) + rest, N, K, R, dtype, adapter_dtype, device=device)
    pieces = torch.tensor([0, *flat], device=device).cumsum(0).int()
    s = torch.zeros(len(x), R, device=device, dtype=torch.promote_types(x.dtype, a.dtype))
    for e, rows in rows_of_groups(pieces, len(lengths[0])):
        s[rows] = reference.down_project(x[rows], a[e], s.dtype)
    c = reference.weight_coefficient(a, b, ETA, norm) if norm in reference.WEIGHT_NORMS else None
    return (g, x, s, b, c), pieces, len(lengths[0])


def rows_of_groups(pieces, samples):
    ends = pieces.tolist()[::samples] if samples else []
    return [(e, slice(*pair)) for e, pair in enumerate(itertools.pairwise(ends))]


def projected(tensors, pieces, samples):
    """dS by group."""
    g, _, s, b, _ = tensors
    ds = torch.zeros_like(s)
    for e, rows in rows_of_groups(pieces, samples):
        ds[rows] = g[rows].to(s.dtype) @ b[e].to(s.dtype)
    return ds


def check(tensors, pieces, samples, norm, need_ds=True):
    exact = group_by_group(doubles(*tensors), pieces, samples, norm, torch.float64)
    eager = group_by_group(tensors, pieces, samples, norm, torch.float32)
    with poisoned_outputs():
        ds, *ours = csrc_triton.grouped_sample_grads(
            *map(in_red_zone, tensors), in_red_zone(pieces), samples, ETA, norm, need_ds, True, True
        )
    assert_all_close("da db", ours, eager, exact)
    assert (ds is None) == (not need_ds)
    if need_ds:
        assert_close(ds, projected(tensors, pieces, samples), projected(doubles(*tensors), pieces, samples), "ds")


@cuts
@norms
def test_each_sample_has_the_gradient_of_its_rows(device, cut, norm):
    check(*make(cut, 41, 53, 3, norm, device=device), norm)


@pytest.mark.parametrize("pair", DTYPES[1:])
@norms
def test_dtypes(device, pair, norm):
    check(*make(CUTS["ragged"], 41, 53, 5, norm, *pair, device=device), norm)


@norms
@pytest.mark.parametrize("rank", [40, 70])
def test_ranks_wider_than_a_tile(device, norm, rank):
    check(*make(CUTS["ragged"], 70, 33, rank, norm, device=device), norm)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", ["factor", "entry"])
def test_any_strides(device, layout, norm):
    (g, x, s, b, c), *rest = make(CUTS["ragged"], 53, 41, 4, norm, device=device)
    b = torch.stack([layout(part) for part in b.mT.contiguous()]).mT
    check((layout(g), layout(x), layout(s), b, c), *rest, norm)


@norms
def test_a_g_longer_than_the_scratch(device, norm, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 40 * 4 * 3 * 2)
    tensors = make(CUTS["ragged"], 300, 53, 3, norm, device=device)
    check(*tensors, norm)
    check(*tensors, norm, need_ds=False)


@norms
def test_more_segments_than_a_launch_has_programs(device, norm, monkeypatch):
    monkeypatch.setattr(grouped_sample_grad, "_MOST_PROGRAMS", 5)
    check(*make((((2, 0, 3, 1, 0, 9), (1, 0, 2, 0, 0, 7)), 1), 41, 53, 3, norm, device=device), norm)


def test_many_experts_half_of_them_empty(device):
    lengths = tuple((e % 3, 0, 1) if e % 2 else (0, 0, 0) for e in range(128))
    check(*make((lengths, 0), 17, 19, 2, "row", device=device), "row")


@pytest.mark.parametrize(
    "needs", [(False, True, False), (True, False, True), (True, False, False), (False, False, True)]
)
@norms
def test_only_what_is_needed(device, norm, needs):
    tensors, pieces, samples = make(CUTS["ragged"], 41, 53, 3, norm, device=device)
    x = tensors[1] if needs[1] else None
    whole = csrc_triton.grouped_sample_grads(*tensors, pieces, samples, ETA, norm, True, True, True)
    part = csrc_triton.grouped_sample_grads(tensors[0], x, *tensors[2:], pieces, samples, ETA, norm, *needs)
    for found, want, needed in zip(part, whole, needs):
        assert (found is None) == (not needed)
        if needed:
            torch.testing.assert_close(found, want)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.tuples(st.integers(1, 4), st.integers(0, 4)).flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(0, 40), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        )
    ),
    rest=st.integers(0, 3),
    N=st.integers(16, 80),
    K=st.integers(16, 80),
    R=st.integers(1, 16),
    norm=st.sampled_from(reference.NORMS),
    pair=st.sampled_from([(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]),
)
def test_any_shape_and_segmentation(device, lengths, rest, N, K, R, norm, pair):
    check(*make((lengths, rest), N, K, R, norm, *pair, device=device), norm)


@pytest.mark.usefixtures("dots_in_one_order")
@norms
def test_a_sample_s_bits_are_its_own_rows_under_batch_invariance(device, norm, monkeypatch):
    """The others' rows, and how many samples there are, change nothing."""

    def taller_for_more_rows(M, *args):
        plan = plan_sweep(M, *args)
        return dataclasses.replace(plan, config=dataclasses.replace(plan.config, BLOCK_M=128 if M > 200 else 64))

    monkeypatch.setattr(grouped_sample_grad, "plan_sweep", taller_for_more_rows)
    (g, x, s, b, c), pieces, _ = make((((300, 3), (250, 70)), 0), 41, 53, 3, norm, device=device)
    use_batch_invariant(True)
    try:
        ds, da, db = csrc_triton.grouped_sample_grads(g, x, s, b, c, pieces, 2, ETA, norm, True, True, True)
        # The second sample's rows of the second group, as the only ones.
        rows, alone = slice(553, 623), torch.tensor([0, 0, 70], device=device, dtype=torch.int32)
        ds_1, da_1, db_1 = csrc_triton.grouped_sample_grads(
            g[rows], x[rows], s[rows], b, c, alone, 1, ETA, norm, True, True, True
        )
    finally:
        use_batch_invariant(False)
    assert torch.equal(da_1[0, 1], da[1, 1]) and torch.equal(db_1[0, 1], db[1, 1])
    assert torch.equal(ds_1, ds[rows])


# --- norms and weighted sums ---------------------------------------------------------------------------------------------


@cuts
@norms
def test_squared_norms_and_sums(device, cut, norm):
    tensors, pieces, samples = make(cut, 41, 53, 3, norm, device=device)
    exact = group_by_group(doubles(*tensors), pieces, samples, norm, torch.float64)
    eager = group_by_group(tensors, pieces, samples, norm, torch.float32)
    with poisoned_outputs():
        ds, da, db, squares = csrc_triton.grouped_sample_squared_norms(
            *map(in_red_zone, tensors), in_red_zone(pieces), samples, ETA, norm, True, torch.float32, torch.float32
        )
    want, by_torch = (sum(t.flatten(1).square().sum(1) for t in grads) for grads in (exact, eager))
    assert squares.dtype == torch.float32
    assert_close(squares, by_torch, want, "squared norms")
    for name, found, e, x in zip(("da", "db"), (da, db), eager, exact):
        assert_close(found, e.sum(0), x.sum(0), name)
    assert_close(ds, projected(tensors, pieces, samples), projected(doubles(*tensors), pieces, samples), "ds")


@pytest.mark.parametrize("factor", ["a", "b"])
def test_squared_norms_of_one_factor_in_16_bits(device, factor):
    tensors, pieces, samples = make(CUTS["ragged"], 41, 53, 3, "row", torch.bfloat16, device=device)
    requested = [torch.bfloat16 if name == factor else None for name in "ab"]
    ds, da, db, squares = csrc_triton.grouped_sample_squared_norms(
        *tensors, pieces, samples, ETA, "row", False, *requested
    )
    grads = csrc_triton.grouped_sample_grads(*tensors, pieces, samples, ETA, "row", False, True, True)
    whole = grads[1 if factor == "a" else 2]
    torch.testing.assert_close(squares, whole.flatten(1).square().sum(1))
    found = da if factor == "a" else db
    assert ds is None and (da is None) == (factor == "b") and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, whole.sum(0).bfloat16(), rtol=1e-2, atol=1e-2)


def test_no_norm_is_negative_where_rows_cancel(device):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 2, 4, 41, generator=generator)
    g = (g - g.mean(2, keepdim=True)).flatten(0, 2).to(device)
    x = torch.randn(3, 2, 1, 53, generator=generator).expand(3, 2, 4, 53).flatten(0, 2).to(device)
    b, s = torch.randn(3, 41, 4, generator=generator).to(device), x[:, :4].contiguous()
    pieces = torch.arange(0, 25, 4, device=device, dtype=torch.int32)
    squares = csrc_triton.grouped_sample_squared_norms(
        g, x, s, b, None, pieces, 2, ETA, None, True, torch.float32, torch.float32
    )[-1]
    assert (squares >= 0).all() and (squares.sqrt() < 0.01).all(), squares


@norms
@cuts
def test_a_weighted_sweep_is_the_weighted_sum(device, cut, norm):
    tensors, pieces, samples = make(cut, 41, 53, 3, norm, device=device)
    weights = torch.rand(samples, device=device)
    exact = group_by_group(doubles(*tensors), pieces, samples, norm, torch.float64)
    eager = group_by_group(tensors, pieces, samples, norm, torch.float32)
    lengths = pieces.diff().tolist()
    of_row = [p % samples for p, length in enumerate(lengths) for _ in range(length)]
    rows = torch.zeros(len(tensors[0]), device=device)
    rows[: len(of_row)] = weights[of_row]
    ends = pieces[samples::samples].contiguous() if samples else pieces.new_zeros(tensors[3].shape[0])
    with poisoned_outputs():
        ours = csrc_triton.grouped_adapter_grads(
            *map(in_red_zone, tensors),
            in_red_zone(ends),
            ETA,
            norm,
            False,
            torch.float32,
            torch.float32,
            row_weights=in_red_zone(rows),
        )[1:]
    for name, found, e, x in zip(("da", "db"), ours, eager, exact):
        assert_close(
            found, torch.einsum("b,b...->...", weights, e), torch.einsum("b,b...->...", weights.double(), x), name
        )


def test_nothing_of_the_size_of_all_samples_is_made_for_norms(device, monkeypatch):
    tensors, pieces, samples = make((((3,) * 50,) * 2, 0), 41, 53, 3, "row", device=device)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: sizes.append(size) or empty(*size, **kwargs))
    csrc_triton.grouped_sample_squared_norms(*tensors, pieces, samples, ETA, "row", True, torch.float32, torch.float32)
    counts = [torch.Size(size if isinstance(size[0], int) else size[0]).numel() for size in sizes]
    assert counts and max(counts) < samples * 2 * 41 * 3
