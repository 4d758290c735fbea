"""The torch.library face of the kernels: schemas, fakes, autograd keys, and fullgraph compilation."""

import contextlib
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allora_kernels import FusedALLoRALinear, allora_linear, reference
from allora_kernels.layer import ops
from allora_kernels.testing import make_inputs

norms = pytest.mark.parametrize("norm", reference.NORMS)


@pytest.fixture(params=[(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=["fp32", "bf16-fp32"])
def inputs(request, device):
    return make_inputs(7, 19, 23, 3, *request.param, device=device)


@pytest.fixture
def s(inputs):
    return reference.down_project(inputs.x, inputs.lora_A, inputs.lora_A.dtype)


def test_opcheck_of_the_forward_ops(inputs, s):
    torch.library.opcheck(ops.down_project.op, (inputs.x, inputs.lora_A, inputs.lora_A.dtype))
    torch.library.opcheck(ops.fused_linear.op, (inputs.x, inputs.weight, inputs.bias, s, inputs.lora_B))
    torch.library.opcheck(ops.fused_linear.op, (inputs.g, inputs.weight.mT, None, s, inputs.lora_A.mT))
    torch.library.opcheck(ops.low_rank_add.op, (inputs.g.clone(), s, inputs.lora_B))


@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_opcheck_of_the_coefficient(inputs, norm):
    torch.library.opcheck(ops.weight_coefficient.op, (inputs.lora_A, inputs.lora_B, 2.0, norm))


@norms
@pytest.mark.parametrize("need", [(True, True, True), (False, True, False), (True, False, True), (False, False, True)])
def test_opcheck_of_the_backward(inputs, s, norm, need):
    need_ds, need_a, need_b = need
    c = None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(inputs.lora_A, inputs.lora_B, 2.0, norm)
    dtype = inputs.lora_A.dtype
    args = (inputs.g, inputs.x if need_a else None, s, inputs.lora_B, c, 2.0, norm, need_ds)
    torch.library.opcheck(ops.adapter_grads.op, (*args, dtype if need_a else None, dtype if need_b else None))


@norms
def test_opcheck_of_the_whole_backward(inputs, s, norm):
    args = (inputs.g, inputs.x, s, inputs.weight, inputs.lora_A, inputs.lora_B, 2.0, norm)
    torch.library.opcheck(ops.layer_grads.op, (*args, inputs.lora_A.dtype, inputs.lora_B.dtype))


def test_opcheck_of_the_forward_with_c_and_the_backward_that_takes_it(inputs, s):
    x, weight, bias, lora_A, lora_B, g = inputs
    torch.library.opcheck(ops.adapted_linear_and_coefficient.op, (x, weight, bias, lora_A, lora_B, s.dtype, 2.0))
    c = reference.weight_coefficient(lora_A, lora_B, 2.0, "row")
    args = (g, x, s, weight, lora_A, lora_B, 2.0, "row", lora_A.dtype, lora_B.dtype, c)
    torch.library.opcheck(ops.layer_grads.op, args)


class Functions(TorchFunctionMode):
    """Sees torch's functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    """Sees the dispatcher's ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def traced():
    """Dynamo looks into each frame that is called within it."""
    return mock.patch.object(ops, "get_eval_frame_callback", lambda: lambda *frame: None)


@pytest.fixture
def launched(device, monkeypatch):
    """The launchers' calls that did not come by the dispatcher, as their first tensors."""
    calls, on_gpu = [], ops._takes_replays
    monkeypatch.setattr(ops, "_takes_replays", lambda t: calls.append(t) or on_gpu(t))
    return calls


@pytest.mark.parametrize(
    "seen_by",
    [None, torch.enable_grad, Functions, Ops, torch.autograd.profiler.profile, traced],
    ids=["nothing", "autograd", "functions", "ops", "profiler", "dynamo"],
)
def test_a_step_calls_its_launcher_where_nothing_looks_on(inputs, launched, seen_by):
    args = inputs.x, inputs.lora_A, inputs.lora_A.dtype
    with torch.no_grad(), seen_by() if seen_by is not None else contextlib.nullcontext():
        s = ops.down_project(*args)
    assert len(launched) == (seen_by is None)
    assert torch.equal(s, ops.down_project.op(*args))


def test_gradients_in_a_batch_of_a_call_before_transforms(device):
    """`is_grads_batched` is a vmap that torch.func does not know of."""
    layer = FusedALLoRALinear(23, 19, r=3, device=device)
    torch.nn.init.normal_(layer.lora_B)
    y, g = layer(torch.randn(7, 23, device=device)), torch.randn(3, 7, 19, device=device)
    factors = [layer.lora_A, layer.lora_B]
    batched = torch.autograd.grad(y, factors, g, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(y, factors, one, retain_graph=True) for one in g))
    for ours, expected in zip(batched, one_by_one, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_a_layer_on_no_device_says_what_comes_out(device):
    layer = FusedALLoRALinear(23, 19, r=3, device="meta")
    y = layer(torch.empty(7, 23, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.is_meta and y.shape == (7, 19) and layer.lora_A.grad.is_meta


FIRST_CALLS = """
import threading
from allora_kernels.layer import backend

errors, together = [], threading.Barrier(8)

def first_call():
    together.wait()
    try:
        backend.steps("triton").layer_grads
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=first_call) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""


def test_the_first_calls_of_several_threads(device):
    """None is given steps that another is still importing. (Triton's interpreter runs in one thread alone.)"""
    if device != "cpu":
        pytest.skip("on the CPU alone: what is tested is an import")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["negated", "zeros", "subclass"])
def test_a_tensor_whose_memory_is_not_its_values_goes_by_the_dispatcher(inputs, launched, kind):
    x = {
        "negated": lambda: torch.complex(inputs.x.float(), inputs.x.float()).conj().imag,
        "zeros": lambda: torch._efficientzerotensor(inputs.x.shape, device=inputs.x.device),
        "subclass": lambda: inputs.x.as_subclass(type("Named", (torch.Tensor,), {})),
    }[kind]()
    with torch.no_grad():
        s = ops.down_project(x, inputs.lora_A, torch.float32)
    assert not launched
    values = -inputs.x if kind == "negated" else inputs.x * (kind != "zeros")
    torch.testing.assert_close(s, ops.down_project(values.to(x.dtype), inputs.lora_A, torch.float32))


def test_a_training_step_does_without_the_dispatcher(device, launched):
    layer = FusedALLoRALinear(23, 19, r=3, device=device)
    x = torch.randn(7, 23, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert len(launched) == 2
    torch.func.vmap(layer)(torch.randn(3, 7, 23, device=device))
    assert len(launched) == 2


def test_dynamo_does_not_trace_a_launcher():
    """What a frame that is given up calls is traced again, frame by frame, but not what the dispatcher calls there."""
    op = ops.define("scaled_in_a_test(Tensor x) -> Tensor", lambda x: x * 7, torch.empty_like)
    seen = []

    def backend(module, _):
        seen.append(module.code)
        return module.forward

    def given_up(x):
        for _ in range(1):
            try:
                torch._dynamo.graph_break()
                x = op(x)
            finally:
                pass
        return x

    y = torch.compile(lambda x: given_up(x.sin()) + 1, backend=backend)(torch.ones(3))
    torch.testing.assert_close(y, torch.ones(3).sin() * 7 + 1)
    assert any("sin" in code for code in seen) and not any("7" in code for code in seen)


@norms
def test_fullgraph_compile_gives_the_eager_values(device, norm):
    inputs = make_inputs(7, 19, 23, 3, device=device)
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return allora_linear(x, weight, bias, lora_A, lora_B, norm=norm, backend="triton")

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    y, plain = compiled(*leaves), f(*leaves)
    assert torch.equal(y, plain)
    for ours, expected in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(plain, leaves, g)):
        assert torch.equal(ours, expected)


def test_a_compiled_layer_sees_its_parameters_change(device):
    layer = FusedALLoRALinear(23, 19, r=3, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 23, device=device)
    for _ in range(2):
        grads = []
        for f in (compiled, layer):
            layer.zero_grad()
            f(x).square().sum().backward()
            grads.append((layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
        for ours, expected in zip(*grads):
            assert torch.equal(ours, expected)
        with torch.no_grad():
            layer.lora_B.normal_()


def test_a_compiled_layer_finds_c_on_the_way_forward(device, monkeypatch):
    module = sys.modules["csrc_triton.adapted_linear"]
    monkeypatch.setattr(module, "_leaves_room", lambda *sizes: True)
    layer = FusedALLoRALinear(23, 19, r=3, dtype=torch.bfloat16, device=device)
    torch.nn.init.normal_(layer.lora_B)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    def seen(graph):
        return {node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "allora"}

    # What was seen of other layers with other numbers of rows would count.
    torch.compiler.reset()
    forward = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    compiled = torch.compile(layer, backend=forward, fullgraph=True)
    for rows in (8, 9, 30, 4):
        x = torch.randn(rows, 23, dtype=torch.bfloat16, device=device, requires_grad=True)
        grads = [torch.autograd.grad(f(x).sum(), (x, layer.lora_A, layer.lora_B)) for f in (compiled, layer)]
        for ours, expected in zip(*grads):
            assert torch.equal(ours, expected)
    # Once for 8 rows, once for any number of them.
    forwards = [{"adapted_linear_and_coefficient"}] * 2
    assert [seen(graph) for graph in graphs[::2]] == forwards and all(seen(g) == {"layer_grads"} for g in graphs[1::2])
