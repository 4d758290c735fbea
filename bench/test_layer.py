"""One layer, forward and forward + backward, for every provider. Each result is checked before it is timed."""

import pytest
import torch

from allora_kernels.testing import make_inputs
from bench.providers import PROVIDERS, check, forward_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# M, N, K, R
SHAPES = [(8192, 4096, 4096, 16), (2048, 4096, 4096, 16), (512, 4096, 4096, 16), (8192, 14336, 4096, 16)]
SMALL_SHAPES = [(512, 768, 768, 16)]

shapes = pytest.mark.parametrize(
    "shape", SHAPES if DEVICE == "cuda" else SMALL_SHAPES, ids=lambda shape: "M{}-N{}-K{}-R{}".format(*shape)
)
providers = pytest.mark.parametrize("name", PROVIDERS)


def measure(benchmark, shape, name, call):
    inputs = make_inputs(*shape, DTYPE, device=DEVICE)
    provider = PROVIDERS[name](inputs)
    check(provider, inputs)
    x = inputs.x.requires_grad_()

    def timed():
        call(provider, x, inputs.g)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(provider=name, shape=shape, dtype=str(DTYPE), device=DEVICE)
    benchmark.pedantic(timed, rounds=30, warmup_rounds=5)


@shapes
@providers
def test_forward(benchmark, shape, name):
    benchmark.group = f"forward {shape}"
    measure(benchmark, shape, name, lambda provider, x, g: provider.forward(x))


@shapes
@providers
def test_forward_backward(benchmark, shape, name):
    benchmark.group = f"forward + backward {shape}"
    measure(benchmark, shape, name, forward_backward)
