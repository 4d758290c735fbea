"""Under `use_batch_invariant` a row of y and dX has the same bits whatever is beside it."""

import subprocess
import sys

import pytest
import torch

import csrc_triton
from allora_kernels import FusedALLoRALinear, allora_linear, per_sample, use_batch_invariant
from allora_kernels.reference import NORMS
from allora_kernels.testing import make_inputs
from csrc_triton import batch_invariance

pytestmark = pytest.mark.usefixtures("dots_in_one_order")
DTYPES = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]


@pytest.fixture(autouse=True)
def switched_on():
    with use_batch_invariant():
        yield


def rows_of(inputs, chosen, norm, requires="xab"):
    """y and dX of a batch of these rows."""
    x = inputs.x[chosen].detach().requires_grad_("x" in requires)
    a, b = (t.detach().clone().requires_grad_("a" in requires) for t in (inputs.lora_A, inputs.lora_B))
    y = allora_linear(x, inputs.weight, inputs.bias, a, b, norm=norm)
    y.backward(inputs.g[chosen])
    return y.detach(), x.grad


# A rule has its part in dX only through what the sweep over G leaves to others: dtypes and rules need not be crossed.
@pytest.mark.parametrize(
    "dtypes, norm", [(DTYPES[0], norm) for norm in NORMS] + [(dtypes, "row") for dtypes in DTYPES[1:]]
)
def test_a_row_has_the_same_bits_in_any_batch(device, dtypes, norm):
    inputs = make_inputs(150, 53, 700, 5, *dtypes, device=device)
    everything = rows_of(inputs, slice(None), norm)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.tensor([7]),
        torch.arange(100, 107),
        torch.cat([torch.randperm(150, generator=generator)[:50], torch.zeros(20, dtype=torch.long)]),
    ]
    for chosen in batches:
        chosen = chosen.to(device)
        for part, whole in zip(rows_of(inputs, chosen, norm), everything):
            assert torch.equal(part, whole[chosen])


def test_frozen_adapters_too(device):
    inputs = make_inputs(130, 53, 257, 5, device=device)
    everything = rows_of(inputs, slice(None), "row", requires="x")
    for part, whole in zip(rows_of(inputs, slice(9, 16), "row", requires="x"), everything):
        assert torch.equal(part, whole[9:16])


@pytest.mark.parametrize("norms_only", [False, True])
def test_recorded_samples_too(device, norms_only):
    inputs = make_inputs(96, 53, 257, 5, device=device)
    layer = FusedALLoRALinear(257, 53, r=5, device=device)
    torch.nn.init.normal_(layer.lora_B)

    def gradient(batch):
        x = batch.detach().clone().requires_grad_()
        with per_sample.record(layer, norms_only=norms_only):
            layer(x).sum().backward()
        return x.grad

    batch = inputs.x.unflatten(0, (6, 16))
    assert torch.equal(gradient(batch[2:3]), gradient(batch)[2:3])


def test_every_launch_of_y_and_dx_is_the_same_for_any_number_of_rows():
    """On every architecture: the same kernels, constexprs, options and parts, but for the grid and M itself."""
    script = """
from unittest import mock
import torch
import csrc_triton
from bench.offline_compile import TARGETS, catch_launches
from csrc_triton import batch_invariance, describable

def launched(m, arch, dtype, adapter_dtype, r, n=4096, k=4096):
    compute = torch.promote_types(dtype, adapter_dtype)
    x, g, w = (torch.empty(size, dtype=dtype) for size in ((m, k), (m, n), (n, k)))
    a, b, s = (torch.empty(size, dtype=adapter_dtype) for size in ((r, k), (n, r), (m, r)))
    calls = [lambda: csrc_triton.adapted_linear(x, w, None, a, b, compute)]
    calls.append(lambda: csrc_triton.fused_linear(g, w.mT, None, s.to(compute), a.mT))
    # The two launches that no plan may change: dS comes first among them.
    calls.append(lambda: csrc_triton.down_project(g, b.mT, compute))
    found = []
    for call in calls:
        for kernel, args, options in catch_launches(call, arch):
            named = {p.name: v for p, v in zip(kernel.params, args) if isinstance(v, (int, float))}
            found.append((kernel.__name__, [v for name, v in named.items() if name not in ("M", "TILES", "UNITS")], options))
    return found

differ = []
for on in (False, True):
    batch_invariance.enable(on)
    for arch in TARGETS:
        for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
            with mock.patch.object(torch.Tensor, "addmm_", lambda y, x, w: y):
                found = [launched(m, arch, *dtypes, 24) for m in (1, 7, 67, 1000, 9001)]
            same = all(other == found[0] for other in found)
            assert same or not on, (arch, dtypes, found)
            if not on:
                differ.append(not same)
assert all(differ)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_ds_is_planned_apart_from_the_sweep(device, monkeypatch):
    from csrc_triton import adapter_grad

    wanted, original = [], adapter_grad.sweep_chunks

    def sweep_chunks(v, u, f, rule, layout, sums, plan):
        wanted.append(None if sums is None else sums.projected)
        return original(v, u, f, rule, layout, sums, plan)

    monkeypatch.setattr(adapter_grad, "sweep_chunks", sweep_chunks)
    inputs = make_inputs(67, 53, 41, 3, device=device)
    s = inputs.x @ inputs.lora_A.mT
    c = torch.ones(53, device=device)
    dtype = torch.float32
    csrc_triton.adapter_grads(inputs.g, inputs.x, s, inputs.lora_B, c, 2.0, "row", True, dtype, dtype)
    assert wanted and all(projected is None for projected in wanted)


def test_eager_is_refused():
    inputs = make_inputs(4, 5, 6, 2)
    with pytest.raises(RuntimeError, match="eager torch"):
        allora_linear(*inputs[:5], backend="eager")
    with use_batch_invariant(False):
        allora_linear(*inputs[:5], backend="eager")


def test_explain_says_that_it_is_on(device):
    layer = FusedALLoRALinear(64, 64, device=device)
    assert "times as long by estimate" in str(layer.explain())
    with use_batch_invariant(False):
        assert "batch invariance" not in str(layer.explain())


def test_the_switch_and_the_context_manager():
    with use_batch_invariant(False):
        assert not batch_invariance.enabled()
        use_batch_invariant(True)
        assert batch_invariance.enabled()
        with use_batch_invariant(False):
            assert not batch_invariance.enabled()
        assert batch_invariance.enabled()
    assert batch_invariance.enabled()
