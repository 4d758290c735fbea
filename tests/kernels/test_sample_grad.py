"""Per-sample gradients and their norms, against `reference.adapter_grads` of each sample's rows."""

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference, sample_reference
from allora_kernels.samples import Samples
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs

norms = pytest.mark.parametrize("norm", reference.NORMS)
ETA = 1.3


def segments_of(samples):
    return csrc_triton.Segments(samples.count, samples.longest, in_red_zone(samples.pieces), in_red_zone(samples.first))


def ragged(*lengths, device="cpu"):
    return Samples.ragged(torch.tensor([0, *lengths], device=device).cumsum(0).int())


def arguments(inputs, norm):
    compute = torch.promote_types(inputs.x.dtype, inputs.lora_A.dtype)
    s = reference.down_project(inputs.x, inputs.lora_A, compute)
    c = None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(inputs.lora_A, inputs.lora_B, ETA, norm)
    return inputs.g, inputs.x, s, inputs.lora_B, c


def sample_by_sample(samples, tensors, norm, dtype):
    """(dA [b, R, K], dB [b, N, R]): `reference.adapter_grads` of each sample's rows."""
    g, x, s, b, c = tensors
    starts = samples.starts or [i * samples.longest for i in range(samples.count + 1)]
    grads = []
    for start, stop in itertools.pairwise(starts):
        rows = slice(start, stop)
        grads.append(reference.adapter_grads(g[rows], x[rows], s[rows], b, c, ETA, norm, False, dtype, dtype)[1:])
    if not grads:
        R, K, N = s.shape[1], x.shape[1], g.shape[1]
        return torch.zeros(0, R, K, dtype=dtype), torch.zeros(0, N, R, dtype=dtype)
    return tuple(torch.stack(part) for part in zip(*grads))


def doubles(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def check(samples, tensors, norm, need_ds=True, close=assert_close):
    exact = sample_by_sample(samples, doubles(tensors), norm, torch.float64)
    eager = sample_by_sample(samples, tensors, norm, torch.float32)
    with poisoned_outputs():
        ds, *ours = csrc_triton.sample_grads(
            *map(in_red_zone, tensors), ETA, norm, need_ds, True, True, segments_of(samples)
        )
    for name, *results in zip(("da", "db"), ours, eager, exact):
        close(*results, name)
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
EQUAL = [(0, 7), (5, 0), (1, 37), (3, 70), (37, 1), (9, 5)]
RAGGED = [(), (0, 0), (130,), (0, 1, 33, 0, 0, 40, 7, 0), (300, 2, 5), (1,) * 20]
cuts = pytest.mark.parametrize(
    "samples",
    [*(Samples.equal(*shape) for shape in EQUAL), *(ragged(*lengths) for lengths in RAGGED)],
    ids=[*("x".join(map(str, shape)) for shape in EQUAL), *("-".join(map(str, r)) or "none" for r in RAGGED)],
)


@cuts
@norms
def test_each_sample_has_the_gradient_of_its_rows(device, samples, norm):
    samples = samples if samples.starts is None else Samples.ragged(samples.cu_seqlens.to(device))
    check(samples, arguments(make_inputs(samples.rows, 41, 53, 3, device=device), norm), norm)


@pytest.mark.parametrize("dtypes", DTYPES[1:])
@norms
def test_dtypes(device, dtypes, norm):
    check(Samples.equal(3, 23), arguments(make_inputs(69, 41, 53, 5, *dtypes, device=device), norm), norm)


@norms
@pytest.mark.parametrize("rank", [40, 70])
def test_ranks_wider_than_a_tile_and_the_separate_pass(device, norm, rank):
    check(Samples.equal(4, 11), arguments(make_inputs(44, 70, 33, rank, device=device), norm), norm)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", ["row", "entry"])
def test_any_strides(device, layout, norm):
    g, x, s, b, c = arguments(make_inputs(39, 53, 41, 4, device=device), norm)
    check(ragged(30, 0, 9, device=device), (layout(g), layout(x), layout(s), layout(b), c), norm)


@norms
def test_a_g_longer_than_the_scratch(device, norm, monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 40 * 4 * 3 * 2)
    check(Samples.equal(5, 26), arguments(make_inputs(130, 70, 53, 3, device=device), norm), norm)
    check(Samples.equal(5, 26), arguments(make_inputs(130, 70, 53, 3, device=device), norm), norm, need_ds=False)


@pytest.mark.parametrize("parts", [1, 3])
@norms
def test_long_samples_are_cut_and_short_ones_share_a_program(device, norm, parts, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: parts)
    check(Samples.equal(2, 100), arguments(make_inputs(200, 41, 53, 3, device=device), norm), norm)
    check(Samples.equal(50, 3), arguments(make_inputs(150, 41, 53, 3, device=device), norm), norm)


def test_few_programs_for_many_short_samples():
    config = configs.pick_config("sweep_wide", 16384, 4096, 0, 16, torch.bfloat16, "sm_90")
    cut = csrc_triton.Segments(1024, 16).cut(4096, 16, config, "sm_90")
    tiles = 4096 // config.BLOCK_N
    assert cut.segments == 1024 and tiles * -(-cut.segments // cut.per_program) <= 4 * 132
    few = csrc_triton.Segments(2, 8192).cut(4096, 16, config, "sm_90")
    assert few.parts > 1 and tiles * few.segments >= 100
