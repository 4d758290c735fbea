"""What only a GPU can show. The suites under tests/kernels run there too, on CUDA tensors."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.utils
from comparing import assert_all_close

from allora_kernels import FusedALLoRALinear, allora_linear, per_sample, reference
from allora_kernels.testing import make_inputs
from allora_kernels.tools import tune
from csrc_triton import replay

pytestmark = pytest.mark.gpu

norms = pytest.mark.parametrize("norm", reference.NORMS)


def run(f, inputs, norm, **kwargs):
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    y = f(leaves[0], weight, bias, *leaves[1:], norm=norm, **kwargs)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def check(inputs, norm):
    results = [
        run(allora_linear, inputs, norm, backend="triton"),
        run(allora_linear, inputs, norm, backend="eager"),
        run(reference.allora_linear, inputs.to(torch.float64), norm),
    ]
    assert_all_close("y dx da db", *results)


@norms
@pytest.mark.parametrize(
    "shape", [(2048, 4096, 4096, 16), (2048, 14336, 4096, 16), (513, 1024, 4096, 64), (300, 4864, 896, 8)]
)
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_real_models(norm, shape, adapter_dtype):
    check(make_inputs(*shape, torch.bfloat16, adapter_dtype, device="cuda"), norm)


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.float16, torch.float32), (torch.float32,) * 2])
@pytest.mark.parametrize("norm", ["row", "entry"])
def test_other_dtypes(dtypes, norm):
    check(make_inputs(1000, 1536, 2048, 16, *dtypes, device="cuda"), norm)


@pytest.mark.parametrize("r", [1, 2, 7, 8, 16, 24, 32, 48, 64, 100, 128, 200, 256])
def test_ranks(r):
    check(make_inputs(700, 1100, 1300, r, torch.bfloat16, device="cuda"), "row")


@norms
def test_the_same_bits_every_run(norm):
    inputs = make_inputs(2048, 4096, 4096, 16, torch.bfloat16, device="cuda")
    first = run(allora_linear, inputs, norm)
    for _ in range(9):
        for again, before in zip(run(allora_linear, inputs, norm), first):
            assert torch.equal(again, before)


@pytest.mark.parametrize("shape", [(2048, 4096, 4096, 16), (512, 1024, 4096, 16), (8192, 4096, 4096, 64)])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_every_plan_that_is_offered_runs_and_is_right(shape, adapter_dtype):
    for product in tune.products(make_inputs(*shape, torch.bfloat16, adapter_dtype, device="cuda")):
        options = tune.plans_of(product)
        assert options and not tune.rejected(product, options)


def test_a_remembered_launch_is_not_taken_for_another_alignment():
    inputs = make_inputs(300, 1024, 1024, 16, torch.bfloat16, device="cuda")
    for offset in (0, 1, 8, 0, 1):
        buffer = torch.empty(300 * 1024 + 16, device="cuda", dtype=torch.bfloat16)
        x = buffer[offset : offset + 300 * 1024].view(300, 1024).copy_(inputs.x)
        check(inputs._replace(x=x), "row")


@norms
@pytest.mark.parametrize(
    "shape", [(512, 4096, 4096, 16), (300, 1025, 1027, 24), (2048, 1024, 4096, 128), (9000, 1024, 2048, 16)]
)
def test_replayed_calls_compute_from_their_own_tensors(norm, shape):
    replay.forget()
    kept = []
    for seed in range(replay.CALLS_BEFORE + 3):
        torch.manual_seed(seed)
        # Kept, so that the next tensors lie elsewhere.
        kept.append(make_inputs(*shape, torch.bfloat16, device="cuda"))
        check(kept[-1], norm)
    # Where the vendor's GEMM is the faster one, there is none.
    recorded = any(isinstance(known, replay.Recording) for known in replay._kinds.values())
    assert recorded or shape[1] % 8


def per_sample_gradients(layer, x, g, cu_seqlens=None, **settings):
    layer.zero_grad()
    with per_sample.record(layer, cu_seqlens, **settings):
        layer(x).backward(g)
    return layer.lora_A.grad_sample, layer.lora_B.grad_sample


@norms
@pytest.mark.parametrize("ragged", [False, True])
def test_per_sample_gradients_of_a_real_size(norm, ragged):
    inputs = make_inputs(2048, 1536, 1024, 16, torch.bfloat16, torch.float32, device="cuda")
    layer = FusedALLoRALinear(1024, 1536, r=16, norm=norm, device="cuda", dtype=torch.bfloat16)
    layer.lora_A = torch.nn.Parameter(inputs.lora_A)
    layer.lora_B = torch.nn.Parameter(inputs.lora_B)
    starts = [0, 0, 5, 1200, 1216, 2048] if ragged else list(range(0, 2049, 128))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda") if ragged else None
    shape = (2048,) if ragged else (16, 128)
    results = [per_sample_gradients(layer, inputs.x.view(*shape, -1), inputs.g.view(*shape, -1), cu_seqlens)]
    again = per_sample_gradients(layer, inputs.x.view(*shape, -1), inputs.g.view(*shape, -1), cu_seqlens)
    assert all(map(torch.equal, results[0], again))
    for dtype in (None, torch.float64):
        samples = []
        for start, stop in itertools.pairwise(starts):
            rows = inputs._replace(x=inputs.x[start:stop], g=inputs.g[start:stop], weight=layer.weight, bias=layer.bias)
            samples.append(run(reference.allora_linear, rows if dtype is None else rows.to(dtype), norm)[2:])
        results.append([torch.stack(parts) for parts in zip(*samples)])
    assert_all_close("da db", *results)


def test_fp32_is_ieee_unless_torch_allows_tf32():
    inputs = make_inputs(512, 512, 4096, 16, device="cuda")
    exact = reference.allora_linear(*inputs.to(torch.float64)[:5])
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (allora_linear(*inputs[:5]).double() - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert 20 * errors["highest"] < errors["high"]


@pytest.fixture
def step():
    layer = FusedALLoRALinear(1024, 1536, r=16, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-2)
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        layer(x).square().mean().backward()
        optimizer.step()

    step.layer = layer
    return step


@norms
def test_a_training_step_does_not_wait_for_the_device(step, norm):
    step.layer.norm = norm
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@norms
def test_a_whole_step_is_captured_in_a_cuda_graph(step, norm):
    step.layer.norm = norm
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    start = copy.deepcopy(step.layer.state_dict())
    for _ in range(4):
        step()
    expected = copy.deepcopy(step.layer.state_dict())

    step.layer.load_state_dict(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.layer.load_state_dict(start)
    for _ in range(4):
        graph.replay()
    for name, t in step.layer.state_dict().items():
        assert torch.equal(t, expected[name]), name

    # A call outside of the graph, after replays that no version counter saw.
    step()
    after = copy.deepcopy(step.layer.state_dict())
    step.layer.load_state_dict(expected)
    step()
    for name, t in step.layer.state_dict().items():
        assert torch.equal(t, after[name]), name


def compiled_losses(norm, lengths, **how):
    """Losses of SGD on batches of those lengths, one for each, and how many graphs were compiled at each."""
    torch.manual_seed(0)
    layers = [FusedALLoRALinear(256, 384, r=16, norm=norm), FusedALLoRALinear(384, 256, r=16, norm=norm)]
    model = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1]).to("cuda", torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, **how) if how else model
    batches = {n: torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in dict.fromkeys(lengths)}
    losses, graphs = [], []
    for length in lengths:
        counters.clear()
        if how:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        x = batches[length]
        loss = (call(x).float() - x.float()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
        if how.get("mode") == "reduce-overhead":
            assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()
    return losses, graphs


@norms
def test_inductor_compiles_a_model_once_for_all_lengths(norm):
    lengths = [128, 200, 300, 128]
    losses, graphs = compiled_losses(norm, lengths, dynamic=True)
    assert graphs == [1, 0, 0, 0]
    assert losses == pytest.approx(compiled_losses(norm, lengths)[0], rel=0.02)


@norms
def test_inductor_replays_a_compiled_step_as_a_cuda_graph(norm):
    lengths = [256] * 6
    losses, graphs = compiled_losses(norm, lengths, mode="reduce-overhead")
    assert graphs == [1, 0, 0, 0, 0, 0]
    assert losses == pytest.approx(compiled_losses(norm, lengths)[0], rel=0.01)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_grad_scaler(dtype):
    layer = FusedALLoRALinear(256, 384, r=16, device="cuda")
    optimizer, scaler = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1), torch.amp.GradScaler("cuda")
    x, losses = torch.randn(300, 256, device="cuda"), []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            y = layer(x)
        assert y.dtype == dtype
        loss = y.float().square().mean()
        scaler.scale(loss).backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_tensors_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(make_inputs(130, 257, 53, 40, torch.bfloat16, device="cuda:1"), "row")
