"""Kernels that wait for one another on the device: however many calls are under way, and whatever else the GPU has to do."""

import ctypes

import pytest
import torch

import csrc_triton
from allora_kernels.testing import make_inputs
from csrc_triton import chain, configs, launching, plans

pytestmark = pytest.mark.gpu

# Tiles of dX for more than one wave; then of rows for two and three rounds of the pass for dS; of a rank of which S has no room
# beside the GEMM, so that C comes behind it.
SHAPES = [(1536, 1024, 4096, 16), (8192, 4096, 1024, 8), (9000, 1024, 1024, 32), (20_000, 2048, 1024, 16)]
SHAPES += [(4096, 4096, 1024, 64)]
# The way that both GEMMs are made to go; None: the one that is picked. The second has more rows of tiles than a GPU has
# multiprocessors.
CASES = [(shape, None) for shape in SHAPES]
CASES += [((4096, 2048, 4096, 16), "column"), ((20_000, 2048, 1024, 16), "column")]


def untried_plan(op, M, N, K, R):
    call = plans.Call(op, M, N, K, R, torch.bfloat16, torch.bfloat16)
    found = plans.options(call, configs.arch_of(torch.device("cuda", torch.cuda.current_device())), untried=True)
    plan = next((plan for plan in found if plan.way == "column"), None)
    return plan or pytest.skip("no plan goes by the first column on this GPU")


@pytest.fixture(params=CASES, ids=str)
def passes(request):
    """Three backward and three forward passes on tensors of their own, and what each gives alone."""
    if not configs.can_overlap(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no kernel begins on this GPU before the one in front has ended")
    shape, way = request.param
    M, N, K, R = shape
    of_y = of_dx = None
    if way is not None:
        of_y, of_dx = untried_plan("adapted_linear", M, N, K, R), untried_plan("layer_grads", M, K, N, R)
    calls, half = [], torch.bfloat16
    for seed in range(3):
        torch.manual_seed(seed)
        x, weight, _, a, b, g = make_inputs(*shape, half, device="cuda")
        tensors = (g, x, x @ a.mT, weight, a, b)
        calls.append(lambda t=tensors: csrc_triton.layer_grads(*t, 2.0, "row", half, half, plan=of_dx))
        inputs = (x, weight, None, a, b)
        calls.append(lambda t=inputs: csrc_triton.adapted_linear_and_coefficient(*t, half, 2.0, of_y))
    return [(call, call()) for call in calls]


def assert_nothing_is_counted():
    torch.cuda.synchronize()
    assert chain._counts and not any(under_way.any() for under_way in chain._counts.values())


def test_a_pass_gives_the_same_bits_beside_other_work(passes):
    stream = torch.cuda.Stream()
    other = torch.randn(4096, 4096, device="cuda")
    for _ in range(30):
        with torch.cuda.stream(stream):
            other @ other
        for call, alone in passes:
            assert all(map(torch.equal, call(), alone))
    assert_nothing_is_counted()


def test_a_kernel_of_a_chain_leaves_shared_memory_to_what_runs_beside_it(passes, request):
    found = {}
    for compiled in launching._compiled.values():
        share = ctypes.c_int()
        error = ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(
            ctypes.byref(share), launching._CARVEOUT, ctypes.c_void_p(compiled.function)
        )
        assert error == 0
        found.setdefault(compiled.metadata.name, set()).add(share.value)
    (*_, rank), way = request.node.callspec.params["passes"]
    names = ["_gram_kernel", "_outer_pair_kernel"]
    names += ["_fused_linear_pipelined_kernel" if way is None else "_adapted_linear_pipelined_kernel"]
    for name in [*names, "_down_project_kernel"] if rank <= 32 and way is None else names:
        assert 100 in found[name], found


def test_passes_on_six_streams_at_once(passes):
    streams = [torch.cuda.Stream() for _ in passes]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, (call, _) in zip(streams, passes):
            with torch.cuda.stream(stream):
                results.append([call() for _ in range(3)])
        torch.cuda.synchronize()
        for (_, alone), of_stream in zip(passes, results):
            assert all(all(map(torch.equal, result, alone)) for result in of_stream)
    assert_nothing_is_counted()


@pytest.mark.parametrize("counts_are_there", [True, False])
def test_graphs_replayed_on_six_streams_at_once(passes, counts_are_there, monkeypatch):
    if not counts_are_there:
        # Where the first call of all is captured.
        monkeypatch.setattr(chain, "_counts", {})
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in passes]
    for call, _ in passes:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(call())
    assert bool(chain._counts) == counts_are_there
    torch.cuda.synchronize()
    for _ in range(20):
        for of_call in results:
            for t in of_call:
                t.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, alone), of_call in zip(passes, results):
            if counts_are_there:
                assert all(map(torch.equal, of_call, alone))
            else:
                # dS is summed up in another order.
                for t, other in zip(of_call, alone):
                    torch.testing.assert_close(t, other, rtol=0.05, atol=0.05 * float(other.abs().max()))
