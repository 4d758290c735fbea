import pytest
import torch
from cases import dtypes, layouts, shapes
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.testing import assert_close, make_inputs
from csrc_triton import configs, row_norms


def assert_norms_close(ours, eager, exact, magnitude, eta):
    """The squared norms behind three coefficients agree, each relative to the `magnitude` of the terms it sums.

    Terms cancel where BA is small though A and B are not (K < R, say): there any fp32 evaluation, eager's too, is off by
    an amount that only the terms' size bounds.
    """

    def squared_norm(c):
        return (c.double() ** -2 - eta**-2) ** 2

    def error(c):
        return ((squared_norm(c) - squared_norm(exact)).abs() / magnitude).max().item() if c.numel() else 0.0

    assert ours.shape == exact.shape and ours.dtype == torch.float32
    assert error(ours) <= 2 * error(eager) + 4 * torch.finfo(torch.float32).eps


def row_magnitudes(a, b):
    return reference.row_norms(a.double().abs(), b.double().abs()) ** 2


def check_weight_coefficient(a, b, norm, eta=2.0):
    with poisoned_outputs():
        c = csrc_triton.weight_coefficient(in_red_zone(a), in_red_zone(b), eta, norm)
    exact = reference.weight_coefficient(a.double(), b.double(), eta, norm)
    eager = reference.weight_coefficient(a, b, eta, norm)
    if norm == "factor":
        assert_close(c, eager, exact, "C of factor")
        return
    magnitude = row_magnitudes(a, b)
    assert_norms_close(c, eager, exact, magnitude.sum() if norm == "matrix" else magnitude, eta)


@shapes
@dtypes
@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_weight_coefficient(device, shape, dtypes, norm):
    inputs = make_inputs(*shape, *dtypes, device=device)
    check_weight_coefficient(inputs.lora_A, inputs.lora_B, norm)


def test_the_kernels_know_the_rules_of_the_reference():
    assert row_norms.WEIGHT_NORMS == reference.WEIGHT_NORMS


@layouts
@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_weight_coefficient_takes_any_strides(device, layout, norm):
    inputs = make_inputs(1, 53, 257, 16, device=device)
    check_weight_coefficient(layout(inputs.lora_A), layout(inputs.lora_B), norm, eta=0.5)


@shapes
@dtypes
def test_token_coefficient(device, shape, dtypes):
    inputs = make_inputs(*shape, *dtypes, device=device)
    s = reference.down_project(inputs.x, inputs.lora_A, torch.promote_types(*dtypes))
    with poisoned_outputs():
        c = csrc_triton.token_coefficient(in_red_zone(s), in_red_zone(inputs.lora_B), 2.0)
    exact = reference.coefficient(reference.token_norms(s.double(), inputs.lora_B.double()), 2.0)
    eager = reference.coefficient(reference.token_norms(s, inputs.lora_B), 2.0)
    assert_norms_close(c, eager, exact, row_magnitudes(inputs.lora_B.mT, s), 2.0)


@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_an_adapter_of_zeros_has_coefficient_eta(device, norm):
    a = torch.randn(16, 41, device=device) if norm != "factor" else torch.zeros(16, 41, device=device)
    c = csrc_triton.weight_coefficient(a, torch.zeros(53, 16, device=device), 1.5, norm)
    torch.testing.assert_close(c, torch.full_like(c, 1.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["row", "matrix"])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_gram_matrix_add_up(device, parts, norm, monkeypatch):
    monkeypatch.setattr(configs, "num_splits", lambda *args, **kwargs: parts)
    inputs = make_inputs(1, 93, 257, 70, device=device)
    with poisoned_outputs():
        gram = row_norms.gram_parts(in_red_zone(inputs.lora_A))
    assert len(gram) == parts
    a = inputs.lora_A
    assert_close(gram.sum(0), reference.gram(a), reference.gram(a.double()), "A Aᵀ")
    check_weight_coefficient(a, inputs.lora_B, norm)


@pytest.mark.parametrize("norm, launches", [("row", 2), ("matrix", 3), ("factor", 1)])
def test_launches_of_a_coefficient(device, norm, launches, monkeypatch):
    launched = []
    launch = row_norms.launch
    monkeypatch.setattr(
        row_norms, "launch", lambda kernel, *args, **kw: launched.append(kernel) or launch(kernel, *args, **kw)
    )
    inputs = make_inputs(1, 53, 4096, 16, device=device)
    csrc_triton.weight_coefficient(inputs.lora_A, inputs.lora_B, 2.0, norm)
    assert len(launched) == launches


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_a_square_that_rounding_takes_below_zero_is_a_norm_of_zero(device, norm):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    b = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    b -= (b @ a) @ a.T / (a * a).sum()
    c = csrc_triton.weight_coefficient(a.float().to(device), b.float().to(device), 2.0, norm)
    assert c.isfinite().all() and (c <= 2.0).all() and (c > 1.9).all()


@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_a_nan_in_a_factor_shows_in_its_coefficient(device, norm):
    inputs = make_inputs(1, 53, 41, 3, device=device)
    inputs.lora_B[7, 1] = float("nan")
    c = csrc_triton.weight_coefficient(inputs.lora_A, inputs.lora_B, 2.0, norm)
    assert c[0 if norm == "matrix" else 7].isnan()
    assert norm == "matrix" or c.isnan().sum() == 1
