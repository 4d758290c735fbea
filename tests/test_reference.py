"""The specification against its definition: BA materialised, every derivative of the frozen and the low-rank product
written by autograd, C applied to G by hand; and against finite differences."""

import pytest
import torch

from allora_kernels import reference
from allora_kernels.testing import make_inputs

ETA = 0.8
norms = pytest.mark.parametrize("norm", reference.NORMS)


def by_definition(inputs, norm):
    """(y, dx, da, db) in fp64 from the formulas of the paper, with the N x K product BA."""
    x, weight, bias, a, b, g = inputs
    product = b @ a
    s = x @ a.T
    y = x @ weight.T + bias + s @ b.T
    dx = g @ (weight + product)

    def c(n):
        return (n + 1 / ETA**2) ** -0.5

    if norm == "factor":
        db = c(torch.linalg.norm(b, dim=1))[:, None] * (g.T @ s)
        da = c(torch.linalg.norm(a, dim=1))[:, None] * ((g @ b).T @ x)
        return y, dx, da, db
    scaled = (
        g
        * {
            "row": lambda: c(torch.linalg.norm(product, dim=1)),
            "matrix": lambda: c(torch.linalg.norm(product)),
            "entry": lambda: c((x @ product.T).abs()),
            "token": lambda: c(torch.linalg.norm(x @ product.T, dim=1))[:, None],
            None: lambda: 1.0,
        }[norm]()
    )
    return y, dx, (scaled @ b).T @ x, scaled.T @ s


def by_autograd(inputs, norm):
    x, weight, bias, a, b, g = inputs
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    y = reference.allora_linear(x, weight, bias, a, b, eta=ETA, norm=norm)
    return y, *torch.autograd.grad(y, (x, a, b), g)


def by_steps(inputs, norm):
    x, weight, bias, a, b, g = inputs
    s = reference.down_project(x, a, x.dtype)
    y = reference.fused_linear(x, weight, bias, s, b)
    return y, *reference.layer_grads(g, x, s, weight, a, b, ETA, norm)


@norms
@pytest.mark.parametrize("route", [by_autograd, by_steps])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 5, 11, 3), (5, 9, 4, 8)])
def test_matches_the_definition(norm, route, shape):
    inputs = make_inputs(*shape, torch.float64)
    for ours, definition in zip(route(inputs, norm), by_definition(inputs, norm)):
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-10)


def test_plain_lora_has_the_gradients_of_finite_differences():
    x, weight, bias, a, b, _ = make_inputs(4, 3, 5, 2, torch.float64)

    def f(x, a, b):
        return reference.allora_linear(x, weight, bias, a, b, norm=None)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, a, b)])


@norms
def test_the_gradient_of_x_is_true_under_every_rule(norm):
    x, weight, bias, a, b, _ = make_inputs(4, 3, 5, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.allora_linear(x, weight, bias, a, b, eta=ETA, norm=norm), [x.requires_grad_()]
    )


@norms
def test_finite_differences_times_the_coefficient(norm):
    """dA and dB by finite differences of the loss, with the coefficient multiplied in by hand where it can be: C is
    constant over tokens, so it factors out of a row of dB; at R = N = 1 also out of dA."""
    x, weight, bias, a, b, g = make_inputs(1, 1, 5, 1, torch.float64)
    c = {
        "row": lambda: torch.linalg.norm(b @ a),
        "matrix": lambda: torch.linalg.norm(b @ a),
        "factor": lambda: None,
        "entry": lambda: (x @ a.T @ b.T).abs().squeeze(),
        "token": lambda: (x @ a.T @ b.T).abs().squeeze(),
        None: lambda: torch.tensor(1 - ETA**-2, dtype=torch.float64),
    }[norm]()
    scale_a = scale_b = None
    if norm == "factor":
        scale_a, scale_b = ((torch.linalg.norm(t) + ETA**-2) ** -0.5 for t in (a, b))
    else:
        scale_a = scale_b = (c + ETA**-2) ** -0.5

    def loss(a, b):
        return (g * (x @ weight.T + bias + x @ a.T @ b.T)).sum()

    def differences(at, f, h=1e-6):
        grad = torch.empty_like(at)
        for i in range(at.numel()):
            step = torch.zeros_like(at).view(-1)
            step[i] = h
            step = step.view_as(at)
            grad.view(-1)[i] = (f(at + step) - f(at - step)) / (2 * h)
        return grad

    _, _, da, db = by_autograd((x, weight, bias, a, b, g), norm)
    torch.testing.assert_close(da, scale_a * differences(a, lambda t: loss(t, b)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(db, scale_b * differences(b, lambda t: loss(a, t)), rtol=1e-6, atol=1e-8)


@norms
def test_at_a_zero_adapter_the_coefficient_is_eta(norm):
    x, weight, bias, a, b, g = make_inputs(6, 5, 7, 3, torch.float64)
    zero = torch.zeros_like(b)
    plain = by_definition((x, weight, bias, a, zero, g), None)
    db = by_autograd((x, weight, bias, a, zero, g), norm)[3]
    torch.testing.assert_close(db, plain[3] if norm is None else ETA * plain[3])


@norms
def test_half_precision_inputs_take_their_norms_in_fp32(norm):
    inputs = make_inputs(6, 5, 7, 3, torch.bfloat16)
    if norm in reference.WEIGHT_NORMS:
        assert reference.weight_coefficient(inputs.lora_A, inputs.lora_B, ETA, norm).dtype == torch.float32
    assert reference.token_norms(inputs.x[:, :3], inputs.lora_B).dtype == torch.float32


@norms
def test_wide_inputs_take_a_narrower_adapter(norm):
    x, weight, bias, a, b, g = make_inputs(6, 5, 7, 3, torch.float64)
    narrow = (x, weight, bias, a.float(), b.float(), g)
    exact = by_definition((x, weight, bias, a.float().double(), b.float().double(), g), norm)
    for route in (by_autograd, by_steps):
        for ours, right in zip(route(narrow, norm), exact):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_kept():
    inputs = make_inputs(12, 5, 7, 3, torch.float64)
    flat = reference.allora_linear(*inputs[:5])
    folded = reference.allora_linear(inputs.x.view(2, 3, 2, 7), *inputs[1:5])
    assert torch.equal(folded, flat.view(2, 3, 2, 5))
