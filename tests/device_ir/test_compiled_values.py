"""Every launcher, every plan, the configurations of every architecture: the values against fp64."""

import dataclasses
import itertools

import pytest
import torch
from comparing import ETA, assert_all_close, backward_arguments, doubles, sample_by_sample
from matrix import AXES, BF16, F16, F32, down_project_in_order, laid_out, over

import csrc_triton
from allora_kernels import reference, use_batch_invariant
from allora_kernels.per_sample import reference as sample_reference
from allora_kernels.per_sample.samples import Samples
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import adapter_grad, configs, describable, plans, sample_grad, sweep_plan
from csrc_triton.combine import combine_pair
from csrc_triton.parts import in_parts


@over("arch", "few_sms", "dtypes", "layout", shape=[*AXES["shape"], (5, 1, 2500, 7), (0, 3, 4, 2), (1, 1, 1, 1)])
def test_down_project(arch, few_sms, dtypes, layout, shape, launches):
    inputs, compute = make_inputs(*shape, *dtypes), torch.promote_types(*dtypes)
    s = csrc_triton.down_project(laid_out(inputs.x, layout), laid_out(inputs.lora_A, layout), compute)
    eager = down_project_in_order(inputs.x, inputs.lora_A, compute)
    assert_close(s, eager, reference.down_project(*doubles(inputs.x, inputs.lora_A), torch.float64), "s")
    launches.launches += shape[0] == 0  # without rows there is nothing to launch


@over(
    "arch",
    dtype=[F32, F16, BF16],
    nested=[True, False],
    size=[(1, 1), (3, 53), (33, 96), (130, 272)],
    block=[32, 64, 4096],
)
def test_dequantize(arch, dtype, nested, size, block):
    n, k = size
    blocks = -(-n * k // block)
    packed = torch.randint(256, (-(-n * k // 2),), dtype=torch.uint8)
    scales, *of_scales = torch.rand(blocks), None, None, None
    if nested:
        scales = torch.randint(256, (blocks,), dtype=torch.uint8)
        of_scales = torch.randn(256), torch.rand(-(-blocks // 256)), torch.tensor(0.3)
    args = (packed, torch.randn(16), scales, *of_scales, block, 256, n, k, dtype)
    assert torch.equal(csrc_triton.dequantize_4bit(*args), reference.dequantize_4bit(*args))


@over("arch", "few_sms", "dtypes", shape=[*AXES["shape"], (300, 136, 264, 8)])
def test_every_plan_of_y_and_dx(arch, few_sms, dtypes, shape):
    inputs, compute = make_inputs(*shape, *dtypes), torch.promote_types(*dtypes)
    *tensors, g = inputs
    x, weight, _, a, b = tensors
    eager_y, _ = reference.adapted_linear(*tensors, compute)
    s = down_project_in_order(x, a, compute)
    exact_y, exact_s = reference.adapted_linear(*doubles(*tensors), torch.float64)
    M, N, K, R = shape
    call = plans.Call("adapted_linear", *shape, x.dtype, compute)
    for plan in plans.options(call, arch, describable(x, weight, b)):
        y, ours_s = csrc_triton.adapted_linear(*tensors, compute, plan)
        assert_close(y, eager_y, exact_y, f"y of {plan}")
        assert_close(ours_s, s, exact_s, f"s of {plan}")
    ds = reference.down_project(g, b.mT, compute)
    args = (g, weight.mT, None, ds, a.mT)
    eager, exact = reference.fused_linear(*args), reference.fused_linear(*doubles(*args))
    call = plans.Call("fused_linear", M, K, N, R, x.dtype, compute)
    for plan in plans.options(call, arch, describable(g, weight.mT, a.mT)):
        assert_close(csrc_triton.fused_linear(*args, plan), eager, exact, f"dx of {plan}")


@over(few_sms=[False, True], dtypes=[(F16, F16), (BF16, BF16), (BF16, F32)], rank=[3, 16, 72], rows=[1, 300, 520])
def test_persistent_with_more_and_fewer_tiles_than_programs(few_sms, dtypes, rank, rows):
    *tensors, _ = make_inputs(rows, 520, 136, rank, *dtypes)
    compute = torch.promote_types(*dtypes)
    call = plans.Call("adapted_linear", rows, 520, 136, rank, dtypes[0], compute)
    exact = reference.adapted_linear(*doubles(*tensors), torch.float64)[0]
    eager = reference.adapted_linear(*tensors, compute)[0]
    for plan in plans.options(call, "sm_90"):
        if plan.way in plans.PERSISTENT:
            y, _ = csrc_triton.adapted_linear(*tensors, compute, plan)
            assert_close(y, eager, exact, f"y of {plan}")


@over("arch", "layout", shape=[(37, 53, 3), (70, 64, 16), (1, 9, 8), (33, 65, 136)])
def test_in_parts(arch, layout, shape):
    M, N, R = shape
    factors = torch.randn(M, R), torch.randn(N, R)
    for t, found, middle in zip(factors, in_parts(*(laid_out(t, layout) for t in factors)), (2, 1)):
        high = t.to(BF16)
        thirds = [high, high, high, high.new_zeros(len(t), found.shape[1] - 3 * R)]
        thirds[middle] = (t - high.float()).to(BF16)
        assert torch.equal(found, torch.cat(thirds, dim=1))


@over("layout", rank=[3, 16, 72], wide_layout=["rows", "columns"])
def test_pipelined_with_fp32_factors_of_any_strides(layout, wide_layout, rank):
    x, weight, bias, a, b, _ = make_inputs(300, 264, 136, rank, BF16, F32)
    s = reference.down_project(x, a, F32)
    args = (x, laid_out(weight, wide_layout), bias, laid_out(s, layout), laid_out(b, layout))
    call = plans.Call("fused_linear", 300, 264, 136, rank, BF16, F32)
    found = [p for p in plans.options(call, "sm_90", describable(*args[:2], b, s)) if p.way == "pipelined"]
    assert found
    for plan in found:
        y = csrc_triton.fused_linear(*args, plan)
        assert_close(y, reference.fused_linear(*args), reference.fused_linear(*doubles(*args)), f"y of {plan}")


@over("arch", "dtypes", "layout", plan=["tiles", "inside"])
def test_gemm_of_any_strides(arch, dtypes, layout, plan):
    compute = torch.promote_types(*dtypes)
    x, weight, bias, a, b, _ = make_inputs(37, 48, 64, 16, *dtypes)
    tensors = (laid_out(x, layout), laid_out(weight, layout), bias.repeat_interleave(2)[::2])
    tensors += (laid_out(a, layout), laid_out(b, layout))
    found = plans.options(plans.Call("adapted_linear", 37, 48, 64, 16, x.dtype, compute), arch, plans.NOTHING)
    found = [p for p in found if p.way == plan] or found[:1]
    y, _ = csrc_triton.adapted_linear(*tensors, compute, found[-1])
    exact = reference.adapted_linear(*doubles(*tensors), torch.float64)[0]
    assert_close(y, reference.adapted_linear(*tensors, compute)[0], exact, "y")


@over("arch", "few_sms", "dtypes", "shape", "layout")
def test_low_rank_add(arch, few_sms, dtypes, shape, layout):
    inputs, compute = make_inputs(*shape, *dtypes), torch.promote_types(*dtypes)
    s = reference.down_project(inputs.x, inputs.lora_A, compute)
    ours, eager, exact = laid_out(inputs.g, layout), inputs.g.clone(), inputs.g.double()
    csrc_triton.low_rank_add(ours, laid_out(s, layout), laid_out(inputs.lora_B, layout))
    reference.low_rank_add(eager, s, inputs.lora_B)
    reference.low_rank_add(exact, *doubles(s, inputs.lora_B))
    assert_close(ours, eager, exact, "y")


def sweep_as(form, monkeypatch):
    """Force the order of the sums, whatever would be planned for so few rows."""
    if form in ("separate", "together"):

        def forced(*args):
            return dataclasses.replace(sweep_plan.plan_sweep(*args), separate=form == "separate")

        monkeypatch.setattr(adapter_grad, "plan_sweep", forced)
        monkeypatch.setattr(sample_grad, "plan_sweep", forced)
    elif form == "chunked":
        monkeypatch.setattr(configs, "SCRATCH_BYTES", 32 * 4 * 3)


@over(
    "arch", "few_sms", "dtypes", "norm", "layout",
    shape=[*AXES["shape"], (150, 300, 24, 3)], form=["planned", "separate", "together", "chunked"],
)  # fmt: skip
def test_adapter_grads(arch, few_sms, dtypes, norm, layout, shape, form, monkeypatch):
    if form == "separate" and norm == "entry":
        form = "together"  # the tile of S Bᵀ has to be beside G's
    sweep_as(form, monkeypatch)
    g, x, s, b, c = backward_arguments(make_inputs(*shape, *dtypes), norm)
    needs = (True, b.dtype, b.dtype)
    ours = csrc_triton.adapter_grads(*(laid_out(t, layout) for t in (g, x, s, b)), c, ETA, norm, *needs)
    eager = reference.adapter_grads(g, x, s, b, c, ETA, norm, *needs)
    exact = reference.adapter_grads(*doubles(g, x, s, b, c), ETA, norm, True, torch.float64, torch.float64)
    assert_all_close("ds da db", ours, eager, exact)


@over(
    "few_sms",
    "norm",
    "layout",
    dtypes=[(F16, F16), (BF16, BF16), (BF16, F32)],
    shape=[*AXES["shape"], (300, 144, 272, 16)],
)
def test_layer_grads(few_sms, dtypes, norm, layout, shape):
    g, x, s, b, _ = backward_arguments(make_inputs(*shape, *dtypes), norm)
    inputs = make_inputs(*shape, *dtypes)
    weight, a = inputs.weight, inputs.lora_A
    ours = csrc_triton.layer_grads(*(laid_out(t, layout) for t in (g, x, s, weight, a, b)), ETA, norm, b.dtype, b.dtype)
    tensors = (g, x, s, weight, a, b)
    eager, exact = (reference.layer_grads(*t, ETA, norm) for t in (tensors, doubles(*tensors)))
    assert_all_close("dx da db", ours, eager, exact)


def segments_of(lengths):
    """As the recorder makes them: equal samples are told by their shape alone."""
    if lengths and len(set(lengths)) == 1:
        samples = Samples.equal(len(lengths), lengths[0])
    else:
        samples = Samples.ragged(torch.tensor([0, *itertools.accumulate(lengths)]).int())
    return csrc_triton.Segments(samples.count, samples.longest, samples.pieces, samples.first)


@over("arch", "few_sms", "dtypes", "shape", "norm", "lengths", form=["planned", "separate", "together", "chunked"])
def test_sample_grads(arch, few_sms, dtypes, shape, norm, lengths, form, monkeypatch, launches):
    if form == "separate" and norm == "entry":
        form = "together"
    sweep_as(form, monkeypatch)
    tensors = backward_arguments(make_inputs(sum(lengths), *shape[1:], *dtypes), norm)
    g, _, s, b, _ = tensors
    segments = segments_of(lengths)
    ds, *ours = csrc_triton.sample_grads(*tensors, ETA, norm, True, True, True, segments)
    cuts = [0, *itertools.accumulate(lengths)]
    eager = sample_by_sample(tensors, cuts, norm, torch.float32)
    exact = sample_by_sample(doubles(*tensors), cuts, norm, torch.float64)
    assert_all_close("da db", ours, eager, exact)
    assert_close(ds, g.to(s.dtype) @ b.to(s.dtype), g.double() @ b.double(), "ds")
    launches.launches += sum(lengths) == 0


@over("arch", "few_sms", "dtypes", "shape", "norm", "lengths")
def test_sample_squared_norms(arch, few_sms, dtypes, shape, norm, lengths, launches):
    tensors = backward_arguments(make_inputs(sum(lengths), *shape[1:], *dtypes), norm)
    b, segments = tensors[3], segments_of(lengths)
    _, da, db, squares = csrc_triton.sample_squared_norms(*tensors, ETA, norm, True, b.dtype, b.dtype, segments)
    cuts = [0, *itertools.accumulate(lengths)]
    eager = sample_by_sample(tensors, cuts, norm, torch.float32)
    exact = sample_by_sample(doubles(*tensors), cuts, norm, torch.float64)
    wide = sum(t.flatten(1).square().sum(1) for t in exact)
    if tensors[2].dtype == F32:
        assert_close(squares, sum(t.flatten(1).square().sum(1) for t in eager), wide, "squared norms")
    # S and u are rounded to 16 bits before they are summed: relative to the largest, nothing else may be lost.
    assert (squares.double() - wide).abs().max() <= 2e-2 * wide.max()
    for name, got, e, total in zip(("da", "db"), (da, db), eager, exact):
        assert_close(got, e.sum(0).to(b.dtype), total.sum(0), f"sum of {name}")
    launches.launches += sum(lengths) == 0


@over("arch", "norm", dtypes=[(F32, F32), (BF16, F32)], lengths=[(40, 0, 3, 27), (1,) * 9])
def test_the_weighted_sum_of_samples(arch, norm, dtypes, lengths):
    tensors = backward_arguments(make_inputs(sum(lengths), 41, 53, 3, *dtypes), norm)
    weights = torch.rand(len(lengths))
    rows = weights.repeat_interleave(torch.tensor(lengths))
    ours = csrc_triton.adapter_grads(*tensors, ETA, norm, False, F32, F32, row_weights=rows)[1:]
    samples = Samples.ragged(torch.tensor([0, *lengths]).cumsum(0).int())
    eager = sample_reference.weighted_grads(*tensors, ETA, norm, weights, F32, F32, samples)
    exact = sample_by_sample(doubles(*tensors), [0, *itertools.accumulate(lengths)], norm, torch.float64)
    for name, got, by_torch, grads in zip(("da", "db"), ours, eager, exact):
        assert_close(got, by_torch, (weights.double().view(-1, 1, 1) * grads).sum(0), f"weighted {name}")


@over("arch", "few_sms", "dtypes", "layout", shape=[*AXES["shape"], (130, 129, 600, 40)])
def test_coefficients(arch, few_sms, dtypes, layout, shape):
    inputs, compute = make_inputs(*shape, *dtypes), torch.promote_types(*dtypes)
    a, b = inputs.lora_A, inputs.lora_B
    for norm in reference.WEIGHT_NORMS:
        ours = csrc_triton.weight_coefficient(laid_out(a, layout), laid_out(b, layout), ETA, norm)
        exact = reference.weight_coefficient(*doubles(a, b), ETA, norm)
        assert_close(ours, reference.weight_coefficient(a.float(), b.float(), ETA, norm), exact, norm)
    s = reference.down_project(inputs.x, a, compute)
    exact = reference.coefficient(reference.token_norms(*doubles(s, b)), ETA)
    eager = reference.coefficient(reference.token_norms(s.float(), b.float()), ETA)
    assert_close(csrc_triton.token_coefficient(laid_out(s, layout), laid_out(b, layout), ETA), eager, exact, "token")


@over("arch", "few_sms", dtype=[F32, F16, BF16], weighted=[False, True], shape=[(1, 1, 1), (7, 70, 41), (40, 3, 5)])
def test_combine(arch, few_sms, dtype, weighted, shape):
    partial = torch.randn(shape)
    weights = torch.randn(shape[0]) if weighted else None
    factors = torch.ones(shape[0]) if weights is None else weights
    exact = torch.einsum("p,p...->...", factors.double(), partial.double())
    eager = torch.einsum("p,p...->...", factors, partial).to(dtype)
    assert_close(csrc_triton.combine(partial, dtype, weights), eager, exact)


@over(
    "arch",
    dtypes=[(F32, F16), (BF16, F32)],
    parts=[1, 7, 40],
    shapes=[((1,), (1,)), ((70, 41), (3, 8)), ((8,), (5000,))],
)
def test_combine_pair(arch, dtypes, parts, shapes):
    partials = [torch.randn(parts, *shape) for shape in shapes]
    for out, partial, dtype in zip(combine_pair(*partials, dtypes), partials, dtypes, strict=True):
        assert_close(out, partial.sum(0).to(dtype), partial.double().sum(0))


@over("arch", "dtypes")
def test_a_row_has_the_same_bits_in_any_batch(arch, dtypes):
    x, weight, bias, a, b, g = make_inputs(300, 53, 1500, 5, *dtypes)
    compute = torch.promote_types(*dtypes)

    def rows_of(chosen):
        y, s = csrc_triton.adapted_linear(x[chosen], weight, bias, a, b, compute)
        ds = csrc_triton.down_project(g[chosen], b.mT, compute)
        return y, s, csrc_triton.fused_linear(g[chosen], weight.mT, None, ds, a.mT)

    with use_batch_invariant():
        everything = rows_of(slice(None))
        for chosen in (torch.tensor([7]), torch.arange(100, 107), torch.randperm(300)[:64]):
            for part, whole in zip(rows_of(chosen), everything):
                assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize("arch", AXES["arch"])
def test_what_is_not_finite_shows(arch):
    x, weight, bias, a, b, _ = make_inputs(37, 53, 41, 3, BF16, F32)
    x[5] = torch.nan
    y, _ = csrc_triton.adapted_linear(x, weight, bias, a, b, F32)
    assert not y[5].isfinite().any() and y[:5].isfinite().all() and y[6:].isfinite().all()
