"""Groups of rows where only a GPU can show it: true 16-bit dots, sizes of real mixtures, no waiting, CUDA graphs."""

import contextlib

import pytest
import torch
from comparing import assert_all_close, doubles

import csrc_triton
from allora_kernels import (
    Adapter,
    FusedALLoRALinear,
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    grouped_linear,
    multi_adapter_linear,
    per_sample,
    reference,
)
from allora_kernels.groups import reference as grouped
from allora_kernels.per_sample import grouped_reference
from allora_kernels.per_sample.grouped import GroupSamples
from allora_kernels.testing import assert_close

pytestmark = pytest.mark.gpu

norms = pytest.mark.parametrize("norm", reference.NORMS)
DEVICE = "cuda"
# Experts, rows, N, K, R: of Qwen3-30B-A3B's gate_up_proj, 2048 tokens to 8 of its experts, and of a smaller one.
MIXTURE, SMALL = (128, 16384, 1536, 2048, 16), (16, 2000, 768, 1024, 64)
ADAPTERS = [(8, "row", 2.0), (16, "row", 1.0), (64, "entry", 2.0), (16, None, 2.0), (128, "token", 4.0)]


def made(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def mixture(sizes, adapter_dtype=torch.bfloat16):
    """x, weight, lora_A, lora_B, g, offsets; a third of the experts get no row, one gets a quarter of them."""
    torch.manual_seed(0)
    E, M, N, K, R = sizes
    group = torch.randint(E, (M,), device=DEVICE)
    group = torch.where(group % 3 == 1, 0, group)
    group[: M // 4] = E - 1
    offsets = torch.bincount(group, minlength=E).cumsum(0).int()
    a, b = made(E, R, K, dtype=adapter_dtype, scale=K**-0.5), made(E, N, R, dtype=adapter_dtype, scale=R**-0.5)
    return made(M, K), made(E, N, K, scale=K**-0.5), a, b, made(M, N), offsets


def run(f, tensors, norm, **settings):
    """y, dX, dA and dB."""
    x, weight, a, b, g, offsets = tensors
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = f(leaves[0], weight, None, *leaves[1:], offsets, norm=norm, **settings)
    return y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))


@norms
@pytest.mark.parametrize("sizes", [MIXTURE, SMALL], ids=["mixture", "small"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_experts_of_a_real_size(sizes, adapter_dtype, norm):
    tensors = mixture(sizes, adapter_dtype)
    ours, again = (run(grouped_linear, tensors, norm, backend="triton") for _ in range(2))
    assert all(map(torch.equal, ours, again))
    eager = run(grouped_linear, tensors, norm, backend="eager")
    exact = run(grouped.grouped_linear, doubles(*tensors), norm)
    assert_all_close("y dx da db", ours, eager, exact)


def several(dtype=torch.bfloat16, M=8192, N=4096, K=4096):
    """x, weight, adapters, row_adapter, g"""
    torch.manual_seed(0)
    adapters = [
        Adapter(
            made(r, K, dtype=dtype, scale=K**-0.5).requires_grad_(),
            made(N, r, dtype=dtype, scale=r**-0.5).requires_grad_(),
            eta,
            norm,
        )
        for r, norm, eta in ADAPTERS
    ]
    row_adapter = torch.randint(-1, len(adapters), (M,), device=DEVICE, dtype=torch.int32)
    return made(M, K).requires_grad_(), made(N, K, scale=K**-0.5), adapters, row_adapter, made(M, N)


def gradients(y, x, adapters, g):
    factors = [t for adapter in adapters for t in adapter[:2]]
    return y.detach(), *torch.autograd.grad(y, [x, *factors], g.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_adapters_of_a_real_size(dtype):
    x, weight, adapters, row_adapter, g = several(dtype)
    results = []
    for backend in ("triton", "triton", "eager"):
        y = multi_adapter_linear(x, weight, None, adapters, row_adapter, backend=backend)
        results.append(gradients(y, x, adapters, g))
    assert all(map(torch.equal, *results[:2]))
    wide = [Adapter(*(t.detach().double().requires_grad_() for t in adapter[:2]), *adapter[2:]) for adapter in adapters]
    x = x.detach().double().requires_grad_()
    exact = gradients(grouped.multi_adapter_linear(x, weight.double(), None, wide, row_adapter), x, wide, g)
    for i, values in enumerate(zip(results[0], results[2], exact)):
        assert_close(*values, f"result {i}")


@norms
def test_samples_of_experts_of_a_real_size(norm):
    E, M, *_ = SMALL
    x, _, a, b, g, offsets = mixture(SMALL)
    group = torch.searchsorted(offsets, torch.arange(M, device=DEVICE), right=True)
    order, samples = GroupSamples.of(group, torch.randint(8, (M,), device=DEVICE), E, 8)
    s = grouped.grouped_down_project(x[order], a, offsets, torch.bfloat16)
    c = reference.weight_coefficient(a, b, 2.0, norm) if norm in reference.WEIGHT_NORMS else None
    tensors = (g[order], x[order], s, b, c)
    args = (samples.pieces, samples.count, 2.0, norm)
    ours, again = (csrc_triton.grouped_sample_grads(*tensors, *args, True, True, True) for _ in range(2))
    assert all(map(torch.equal, ours, again))
    wide = tuple(None if t is None else t.double() for t in tensors)
    eager, exact = (
        grouped_reference.sample_grads(*inputs, 2.0, norm, True, True, True, samples) for inputs in (tensors, wide)
    )
    assert_all_close("ds da db", ours, eager, exact)
    *_, squares = csrc_triton.grouped_sample_squared_norms(*tensors, *args, True, b.dtype, b.dtype)
    found = sum(t.flatten(1).square().sum(1) for t in ours[1:])
    torch.testing.assert_close(squares, found, rtol=1e-3, atol=0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(1024, 1536), torch.nn.Linear(1536, 1024)

    def forward(self, x):
        return self.second(self.first(x).relu())


def net():
    torch.manual_seed(0)
    model = Net().to(DEVICE, torch.bfloat16)
    apply_allora(model, r=16, adapter_name="a")
    add_adapter(model, "b", r=8, norm="entry")
    for p in adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.02)
    return model


@pytest.fixture
def no_waiting():
    """What is called inside may not wait for the device."""

    def run(f):
        f()  # Compiles, and copies the constants that are kept.
        torch.cuda.set_sync_debug_mode("error")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@norms
def test_a_step_of_experts_does_not_wait_for_the_device(norm, no_waiting):
    tensors = mixture(SMALL)
    no_waiting(lambda: run(grouped_linear, tensors, norm))


@pytest.mark.parametrize("recorded", [False, True])
def test_a_mixed_step_does_not_wait_for_the_device(recorded, no_waiting):
    model, x = net(), made(6, 128, 1024)

    def step():
        with adapter_rows(model, ["b", "a", None, "b", "a", "a"]):
            loss = model(x).float().square().mean((1, 2)).sum()
        loss.backward()

    with per_sample.record(model) if recorded else contextlib.nullcontext():
        no_waiting(step)


def test_a_step_of_experts_is_captured_in_a_cuda_graph():
    tensors = mixture(SMALL)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(grouped_linear, tensors, "row")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(grouped_linear, tensors, "row")
    graph.replay()
    assert all(map(torch.equal, captured, expected))
    # Other groups in the same memory: their ends are read on the device.
    x, offsets = tensors[0], tensors[-1]
    offsets.copy_(torch.linspace(0, len(x), len(offsets) + 1, device=DEVICE).int()[1:])
    graph.replay()
    assert all(map(torch.equal, captured, run(grouped_linear, tensors, "row")))


def test_rows_without_an_adapter_are_those_of_a_layer_with_a_zero_adapter():
    x, weight, adapters, row_adapter, _ = several()
    with torch.no_grad():
        y = multi_adapter_linear(x, weight, None, adapters, torch.full_like(row_adapter, -1))
        layer = FusedALLoRALinear(4096, 4096, bias=False, device=DEVICE, dtype=torch.bfloat16)
        layer.weight.copy_(weight)
        exact = torch.nn.functional.linear(x.double(), weight.double())
        assert_close(y, layer(x), exact, "y")
