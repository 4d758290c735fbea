"""Per-sample gradients and their norms, against `reference.adapter_grads` of each sample's rows."""

import pytest
import torch
from cases import DTYPES, LAYOUTS
from comparing import ETA, assert_all_close, backward_arguments, doubles, sample_by_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.layer import backend
from allora_kernels.per_sample import reference as sample_reference
from allora_kernels.per_sample.samples import Samples
from allora_kernels.per_sample.steps import sample_steps
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs

norms = pytest.mark.parametrize("norm", reference.NORMS)


def segments_of(samples):
    return csrc_triton.Segments(samples.count, samples.longest, in_red_zone(samples.pieces), in_red_zone(samples.first))


def cuts_of(samples):
    """The rows at which one begins, and the last ends."""
    return samples.starts or [i * samples.longest for i in range(samples.count + 1)]


def ragged(*lengths, device="cpu"):
    return Samples.ragged(torch.tensor([0, *lengths], device=device).cumsum(0).int())


def check(samples, tensors, norm, need_ds=True, close=assert_close):
    exact = sample_by_sample(doubles(*tensors), cuts_of(samples), norm, torch.float64)
    eager = sample_by_sample(tensors, cuts_of(samples), norm, torch.float32)
    with poisoned_outputs():
        ds, *ours = csrc_triton.sample_grads(
            *map(in_red_zone, tensors), ETA, norm, need_ds, True, True, segments_of(samples)
        )
    assert_all_close("da db", ours, eager, exact, close=close)
    if need_ds:
        g, _, s, b, _ = tensors
        close(ds, g.to(s.dtype) @ b.to(s.dtype), g.double() @ b.double(), "ds")
    for name, got, e, x in zip(
        ("da", "db"),
        sample_reference.sample_grads(*tensors, ETA, norm, need_ds, True, True, samples)[1:],
        eager,
        exact,
    ):
        close(got, e, x, f"eager {name}")


# Equal: b x T; none is a multiple of a tile, one sample is longer than a segment, one is a token.
EQUAL = [(0, 7), (5, 0), (1, 37), (3, 70), (17, 1)]
RAGGED = [(), (0, 0), (130,), (0, 1, 33, 0, 0, 40, 7, 0), (300, 2, 5), (1,) * 9]
cuts = pytest.mark.parametrize(
    "samples",
    [*(Samples.equal(*shape) for shape in EQUAL), *(ragged(*lengths) for lengths in RAGGED)],
    ids=[*("x".join(map(str, shape)) for shape in EQUAL), *("-".join(map(str, r)) or "none" for r in RAGGED)],
)


@cuts
@norms
def test_each_sample_has_the_gradient_of_its_rows(device, samples, norm):
    samples = samples if samples.starts is None else Samples.ragged(samples.cu_seqlens.to(device))
    check(samples, backward_arguments(make_inputs(samples.rows, 41, 53, 3, device=device), norm), norm)


@pytest.mark.parametrize("dtypes", DTYPES[1:])
@norms
def test_dtypes(device, dtypes, norm):
    check(Samples.equal(3, 23), backward_arguments(make_inputs(69, 41, 53, 5, *dtypes, device=device), norm), norm)


@norms
@pytest.mark.parametrize("rank", [40, 70])
def test_ranks_wider_than_a_tile_and_the_separate_pass(device, norm, rank):
    check(Samples.equal(4, 11), backward_arguments(make_inputs(44, 70, 33, rank, device=device), norm), norm)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", ["row", "entry"])
def test_any_strides(device, layout, norm):
    g, x, s, b, c = backward_arguments(make_inputs(39, 53, 41, 4, device=device), norm)
    check(ragged(30, 0, 9, device=device), (layout(g), layout(x), layout(s), layout(b), c), norm)


@norms
def test_a_g_longer_than_the_scratch(device, norm, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 40 * 4 * 3 * 2)
    tensors = backward_arguments(make_inputs(130, 300, 53, 3, device=device), norm)
    check(Samples.equal(5, 26), tensors, norm)
    check(Samples.equal(5, 26), tensors, norm, need_ds=False)
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: shapes.append(size) or empty(*size, **kwargs))
    # dS by itself may be split over K where M is small; that is no scratch of the sweep's.
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: 1)
    csrc_triton.sample_grads(*tensors, ETA, norm, True, True, True, csrc_triton.Segments(5, 26))
    # dS and u are two.
    assert shapes and not [size for size in shapes if size[1:] == (130, 3) and size[0] > 2]


@pytest.mark.parametrize("parts", [1, 3])
@norms
def test_long_samples_are_cut_and_short_ones_share_a_program(device, norm, parts, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: parts)
    check(Samples.equal(2, 100), backward_arguments(make_inputs(200, 41, 53, 3, device=device), norm), norm)
    check(Samples.equal(50, 3), backward_arguments(make_inputs(150, 41, 53, 3, device=device), norm), norm)


def test_five_thousand_tokens_a_sample(device):
    for samples in (Samples.equal(1, 5000), ragged(5000, 3, device=device)):
        check(samples, backward_arguments(make_inputs(samples.rows, 17, 19, 3, device=device), "row"), "row")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.one_of(st.lists(st.integers(0, 60), max_size=6), st.tuples(st.integers(0, 12), st.integers(0, 40))),
    N=st.integers(16, 80),
    K=st.integers(16, 80),
    R=st.integers(1, 16),
    norm=st.sampled_from(reference.NORMS),
    dtypes=st.sampled_from([(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]),
)
def test_any_shape_and_segmentation(device, lengths, N, K, R, norm, dtypes):
    samples = Samples.equal(*lengths) if isinstance(lengths, tuple) else ragged(*lengths, device=device)
    tensors = backward_arguments(make_inputs(samples.rows, N, K, R, *dtypes, device=device), norm)
    check(samples, tensors, norm)
    check_norms(samples, tensors, norm)


def test_few_programs_for_many_short_samples():
    config = configs.pick_config("sweep_wide", 16384, 4096, 0, 16, torch.bfloat16, "sm_90")
    cut = csrc_triton.Segments(1024, 16).cut(4096, 16, config, "sm_90")
    tiles = 4096 // config.BLOCK_N
    assert cut.segments == 1024 and tiles * -(-cut.segments // cut.per_program) <= 4 * 132 + tiles
    few = csrc_triton.Segments(2, 8192).cut(4096, 16, config, "sm_90")
    assert few.parts > 1 and tiles * few.segments >= 100


def check_norms(samples, tensors, norm, close=assert_close):
    b = tensors[3]
    exact = sample_by_sample(doubles(*tensors), cuts_of(samples), norm, torch.float64)
    eager = sample_by_sample(tensors, cuts_of(samples), norm, torch.float32)
    with poisoned_outputs():
        _, da, db, squares = csrc_triton.sample_squared_norms(
            *map(in_red_zone, tensors), ETA, norm, True, b.dtype, b.dtype, segments_of(samples)
        )
    torch_squares = sample_reference.sample_squared_norms(*tensors, ETA, norm, True, b.dtype, b.dtype, samples)[-1]
    expected, wide = (sum(t.flatten(1).square().sum(1) for t in grads) for grads in (eager, exact))
    if tensors[2].dtype == torch.float32:
        close(squares, expected, wide, "squared norms")
        close(torch_squares, expected, wide, "eager squared norms")
    # S and u are rounded to 16 bits before they are summed: relative to the largest, nothing else may be lost.
    assert (squares.double() - wide).abs().max() <= 2e-2 * wide.max() if wide.numel() else True
    for name, got, e, total in zip(("da", "db"), (da, db), eager, exact):
        close(got, e.sum(0).to(b.dtype), total.sum(0), f"sum of {name}")


@pytest.mark.parametrize(
    "samples", [Samples.equal(0, 7), Samples.equal(3, 70), ragged(0, 1, 200, 0, 40)], ids=["none", "equal", "ragged"]
)
@norms
def test_norms_without_the_gradients(device, samples, norm):
    samples = samples if samples.starts is None else Samples.ragged(samples.cu_seqlens.to(device))
    check_norms(samples, backward_arguments(make_inputs(samples.rows, 41, 53, 3, device=device), norm), norm)


@pytest.mark.parametrize("samples", [Samples.equal(45, 1), ragged(1, 0, 1, 1, 0, 1)], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]])
@norms
def test_norms_of_samples_of_one_row(device, samples, dtypes, norm, monkeypatch):
    from csrc_triton import sample_grad

    used = []
    original = sample_grad.outer_norms
    monkeypatch.setattr(sample_grad, "outer_norms", lambda *args: used.append(1) or original(*args))
    samples = samples if samples.starts is None else Samples.ragged(samples.cu_seqlens.to(device))
    check_norms(samples, backward_arguments(make_inputs(samples.rows, 70, 97, 5, *dtypes, device=device), norm), norm)
    assert used


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_rows_that_cancel_leave_a_norm_and_not_nan(device, rows):
    """A Gram matrix would leave 1e-7 of the rows' own norms squared, of either sign."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 64, generator=generator).expand(6, rows, 64).reshape(-1, 64).to(device)
    g = torch.randn(6, rows, 32, generator=generator)
    g = (g - g.mean(1, keepdim=True)).reshape(-1, 32).to(device)
    s, b = x @ torch.randn(4, 64, generator=generator).mT.to(device), torch.randn(32, 4, generator=generator).to(device)
    segments = csrc_triton.Segments(6, rows)
    squares = csrc_triton.sample_squared_norms(g, x, s, b, None, 2.0, None, True, s.dtype, s.dtype, segments)[-1]
    # The rows' gradients have norms in the hundreds.
    assert (squares >= 0).all() and (squares.sqrt() < 0.01).all(), squares


@norms
def test_a_weighted_sweep_is_the_weighted_sum(device, norm):
    samples = ragged(40, 0, 3, 27, device=device)
    tensors = backward_arguments(make_inputs(samples.rows, 41, 53, 3, device=device), norm)
    weights = torch.rand(samples.count, device=device)
    exact = sample_by_sample(doubles(*tensors), cuts_of(samples), norm, torch.float64)
    args = (*tensors, ETA, norm)
    dtypes = (torch.float32, torch.float32)
    with poisoned_outputs():
        swept = csrc_triton.adapter_grads(
            *map(in_red_zone, tensors), ETA, norm, False, *dtypes, row_weights=in_red_zone(samples.spread(weights))
        )[1:]
    by_torch = sample_reference.weighted_grads(*args, weights, *dtypes, samples)
    for ours, eager, grads in zip(swept, by_torch, exact):
        weighted = (weights.double().view(-1, 1, 1) * grads).sum(0)
        torch.testing.assert_close(eager, weighted.float())
        assert_close(ours, eager, weighted, "weighted sum")


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: t,
        lambda t: t[::2],
        lambda t: t.mT.contiguous().mT,
        lambda t: t[:1].expand_as(t),
        lambda t: t.bfloat16(),
        lambda t: (300 * t).half(),
        lambda t: t.double(),
        lambda t: t[:0],
        lambda t: t[:, :0],
    ],
    ids=["as-recorded", "every-second", "strided", "expanded", "bf16", "fp16", "fp64", "no-samples", "empty"],
)
def test_squared_norms_of_any_grad_sample(device, changed):
    t = changed(torch.randn(6, 70, 41, device=device))
    steps = sample_steps(backend.choose(t.device, t.dtype).name)
    exact = t.double().flatten(1).square().sum(1)
    torch.testing.assert_close(steps.squared_norms(t), exact.to(torch.promote_types(t.dtype, torch.float32)))
