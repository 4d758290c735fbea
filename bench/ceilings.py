"""What the device can do at best, measured in the run that the ceilings are compared with."""

import torch

from allora_kernels.tools.timing import interleaved


def measure(device: torch.device, dtypes: list[str]) -> dict[str, dict[str, float]]:
    """For each dtype the TFLOP/s of a large GEMM of the vendor's, and for "copy" the bytes/s of a large copy.

    Returns:
        {"bfloat16": {"tflops": ...}, ..., "copy": {"bytes_per_s": ...}}
    """
    gpu = device.type == "cuda"
    size, elements = (8192, 2**29) if gpu else (1024, 2**24)
    calls, flops = {}, 2 * size**3
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        # An nn.Linear's own layout: both operands are read along K.
        calls[name] = lambda a=a, b=b, out=out: torch.mm(a, b.mT, out=out)
    source = torch.ones(elements, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    timings = interleaved(calls, rounds=15, device=device, budget_s=10)
    found = {name: {"tflops": flops / timings[name].median_ms * 1e-9} for name in dtypes}
    found["copy"] = {"bytes_per_s": 2 * elements / timings["copy"].median_ms * 1e3}
    return found
