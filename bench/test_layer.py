"""The host's time of one layer's call by pytest-benchmark: `pytest bench --benchmark-only --benchmark-autosave`, later with
`--benchmark-compare`, tracks one provider on one machine over commits. To compare providers, use `python -m bench`."""

import pytest
import torch

from bench.cases import Case
from bench.providers import PROVIDERS, Judge, forward_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = Case(512, 4096, 4096, 16) if DEVICE.type == "cuda" else Case(512, 768, 768, 16, "float32", "float32")


@pytest.mark.parametrize("call", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_layer(benchmark, name, call):
    spec, inputs = PROVIDERS[name], CASE.inputs(DEVICE)
    obstacle = spec.obstacle(inputs)
    if obstacle:
        pytest.skip(obstacle)
    inputs = spec.inputs(inputs)
    provider = spec.build(inputs)
    assert Judge().verdict(spec, provider, inputs) is None
    x = inputs.x.requires_grad_()
    timed = provider.forward if call == "forward" else lambda x: forward_backward(provider, x, inputs.g)

    def setup():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return (x,), {}

    benchmark.group = f"{call} {CASE} {DEVICE.type}"
    benchmark.pedantic(timed, setup=setup, rounds=30, warmup_rounds=5)
