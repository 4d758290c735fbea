import dataclasses
from unittest import mock

import pytest
import torch
from cases import SHAPES, WIDE_RANK, dtypes, layouts, shape_id
from comparing import ETA, assert_all_close, backward_arguments, doubles
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import make_inputs
from csrc_triton import adapter_grad, configs, sweep_plan

norms = pytest.mark.parametrize("norm", reference.NORMS)


def check(g, x, s, b, c, norm, need_ds=True, need_a=True, need_b=True):
    needs = (need_ds, b.dtype if need_a else None, b.dtype if need_b else None)
    exact_needs = (need_ds, torch.float64 if need_a else None, torch.float64 if need_b else None)
    tensors = (g, x, s, b, c)
    with poisoned_outputs():
        ours = csrc_triton.adapter_grads(*map(in_red_zone, tensors), ETA, norm, *needs)
    eager = reference.adapter_grads(*tensors, ETA, norm, *needs)
    exact = reference.adapter_grads(*doubles(*tensors), ETA, norm, *exact_needs)
    assert_all_close("ds da db", ours, eager, exact)


@pytest.mark.parametrize("shape", [*SHAPES, WIDE_RANK], ids=shape_id)
@dtypes
@norms
def test_matches_the_reference(device, shape, dtypes, norm):
    check(*backward_arguments(make_inputs(*shape, *dtypes, device=device), norm), norm)


@layouts
@norms
def test_takes_any_strides(device, layout, norm):
    g, x, s, b, c = backward_arguments(make_inputs(37, 53, 41, 16, device=device), norm)
    check(layout(g), layout(x), layout(s), layout(b), c, norm)


@norms
@pytest.mark.parametrize(
    "needs", [(True, True, False), (True, False, True), (False, True, False), (False, False, True)]
)
def test_only_what_is_needed(device, norm, needs):
    _, need_a, _ = needs
    g, x, s, b, c = backward_arguments(make_inputs(37, 53, 41, 3, device=device), norm)
    check(g, x if need_a else None, s, b, c, norm, *needs)


@norms
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_segments_add_up(device, norm, segments, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: segments)
    check(*backward_arguments(make_inputs(130, 53, 70, 3, device=device), norm), norm)


@norms
@pytest.mark.parametrize("rows, R", [(1, 3), (40, 3), (64, 3), (1, 40)])
def test_chunks_of_rows_add_up(device, norm, rows, R, monkeypatch):
    N = 70
    monkeypatch.setattr(configs, "SCRATCH_BYTES", rows * 4 * R * 2)
    check(*backward_arguments(make_inputs(130, N, 53, R, device=device), norm), norm)
    check(*backward_arguments(make_inputs(130, N, 53, R, device=device), norm), norm, need_ds=False)


def test_scratch_does_not_grow_with_the_number_of_rows(device, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 2**14)
    sizes = []
    original = torch.empty

    def recorded(*size, **kwargs):
        t = original(*size, **kwargs)
        sizes.append(t.nbytes)
        return t

    monkeypatch.setattr(torch, "empty", recorded)
    for M in (256, 1024):
        args = backward_arguments(make_inputs(M, 257, 1, 3, device=device), "row")
        sizes.clear()
        csrc_triton.adapter_grads(*args, ETA, "row", True, None, None)
        assert max(sizes) <= max(2**15, M * 3 * 4)


@norms
def test_partial_sums_over_rows_are_no_more_than_g(device, norm, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 2**10)
    g, x, s, b, c = backward_arguments(make_inputs(512, 257, 1, 40, device=device), norm)
    with mock.patch.object(adapter_grad, "empty_outer", wraps=adapter_grad.empty_outer) as made:
        csrc_triton.adapter_grads(g, x, s, b, c, ETA, norm, True, None, torch.float32)
    (((count, *_), _),) = made.call_args_list
    assert count * b.numel() <= g.numel()


@norms
def test_the_same_bits_every_run(device, norm):
    args = backward_arguments(make_inputs(130, 257, 53, 40, device=device), norm)
    first = csrc_triton.adapter_grads(*args, ETA, norm, True, torch.float32, torch.float32)
    for _ in range(9 if device == "cuda" else 1):
        again = csrc_triton.adapter_grads(*args, ETA, norm, True, torch.float32, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("norm", ["row", "matrix", None])
@pytest.mark.parametrize("separate", [False, True])
def test_both_orders_of_the_sums_over_columns(device, norm, separate, monkeypatch):
    def forced(*args):
        found = sweep_plan.plan_sweep(*args)
        return dataclasses.replace(found, separate=separate)

    monkeypatch.setattr(adapter_grad, "plan_sweep", forced)
    check(*backward_arguments(make_inputs(130, 70, 53, 40, device=device), norm), norm)
    check(*backward_arguments(make_inputs(130, 70, 53, 3, device=device), norm), norm, need_ds=False)


def test_c_is_not_rounded_before_it_is_multiplied(device):
    """C = 1 + 2^-8 is no bf16 number and 1.5 C rounds up to 1.5078125; of a C rounded first it would stay 1.5."""
    from csrc_triton.adapter_grad import project

    g = torch.eye(7, dtype=torch.bfloat16, device=device)
    b = torch.full((7, 3), 1.5, dtype=torch.bfloat16, device=device)
    c = torch.full((7,), 1 + 2**-8, device=device)
    ds, u = project(g, b, c, "row", torch.bfloat16, need_da=True)
    assert torch.equal(ds, b)
    assert torch.equal(u, torch.full_like(b, 1.5078125))


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_the_plan_counts_what_is_allocated(device, norm, monkeypatch):
    M, N, R = 130, 300, 3
    args = backward_arguments(make_inputs(M, N, 1, R, device=device), norm)
    plan = sweep_plan.plan_sweep(
        M, N, R, norm, 1 + (norm == "row"), True, torch.float32, torch.float32, configs.arch_of(args[0].device)
    )
    assert not plan.separate
    written = []
    empty = torch.empty

    def recorded(*size, **kwargs):
        t = empty(*size, **kwargs)
        shares, segments = t.dim() == 1, t.dim() == 3 and t.shape[2] == R
        written.append(t.nbytes if shares or segments else 0)
        return t

    monkeypatch.setattr(torch, "empty", recorded)
    csrc_triton.adapter_grads(*args, ETA, norm, True, torch.float32, torch.float32)
    assert 2 * sum(written) == plan.partial_bytes
