"""The whole layer on shapes that hypothesis chooses."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allora_kernels import allora_linear, reference
from allora_kernels.testing import assert_close, make_inputs

sizes = st.integers(1, 100)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    M=st.integers(0, 100),
    N=sizes,
    K=sizes,
    R=st.integers(1, 80),
    dtypes=st.sampled_from([(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]),
    norm=st.sampled_from(reference.NORMS),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape(device, M, N, K, R, dtypes, norm, bias, transposed):
    inputs = make_inputs(M, N, K, R, *dtypes, bias=bias, device=device)

    def run(f, inputs, **kwargs):
        x, weight, b, lora_A, lora_B, g = inputs
        x, lora_A, lora_B = (t.detach().requires_grad_() for t in (x, lora_A, lora_B))
        y = f(x.mT.contiguous().mT if transposed else x, weight, b, lora_A, lora_B, norm=norm, **kwargs)
        return y, *torch.autograd.grad(y, (x, lora_A, lora_B), g)

    exact = run(reference.allora_linear, inputs.to(torch.float64))
    eager = run(allora_linear, inputs, backend="eager")
    ours = run(allora_linear, inputs, backend="triton")
    well_conditioned = norm not in ("row", "token") or min(N, K) >= R
    for name, o, e, x in zip(("y", "dx", "da", "db"), ours, eager, exact):
        if well_conditioned and o.numel() >= 16:
            # Below that, twice eager's error is a matter of luck; there the layer is still run and looked at for nans.
            assert_close(o, e, x, name)
        assert o.isfinite().all() and o.shape == x.shape
