"""Input makers and the one comparison that tests and benchmarks share."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class Inputs(NamedTuple):
    """One layer's inputs and an upstream gradient ``g [M, N]``; shapes as in `reference`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    g: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Every tensor in `dtype`."""
        return Inputs(*(None if t is None else t.to(dtype) for t in self))


def make_inputs(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs whose products are of order one, with an adapter as large as the frozen weight so that an error in
    its part cannot hide. Drawn on the CPU in fp32: the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    adapter_dtype = adapter_dtype or dtype
    return Inputs(
        x=draw(M, K),
        weight=draw(N, K, scale=K**-0.5),
        bias=draw(N) if bias else None,
        lora_A=draw(R, K, scale=K**-0.5, dtype=adapter_dtype),
        lora_B=draw(N, R, scale=R**-0.5, dtype=adapter_dtype),
        g=draw(M, N),
    )


def with_factors(layer: Layer, lora_A: Tensor, lora_B: Tensor) -> Layer:
    """`layer`, an adapted one, with copies of these factors in place of its own."""
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    return layer


def max_error(actual: Tensor, exact: Tensor) -> float:
    """``max |actual - exact|`` in fp64; 0.0 for empty tensors, nan where `actual` has one."""
    if exact.numel() == 0:
        return 0.0
    return (actual.double() - exact.double()).abs().max().item()


def error_limit(exact: Tensor, eager_error: float, dtype: torch.dtype, tolerance: float = 2.0) -> float:
    """How far a result in `dtype` may be from the fp64 `exact`: `tolerance` times as far as same-dtype eager torch is, and one
    unit in the last place of the largest value on top, for where eager is right by luck."""
    scale = exact.double().abs().max().item() if exact.numel() else 0.0
    return tolerance * eager_error + torch.finfo(dtype).eps * scale


def assert_close(actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result") -> None:
    """`actual` is within `error_limit` of the fp64 `exact`: at most twice as far as the same-dtype `eager` is.

    Raises:
        AssertionError: wrong shape or dtype, or a larger error, or a nan.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, should be {list(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, should be {eager.dtype}"
    error, eager_error = max_error(actual, exact), max_error(eager, exact)
    limit = error_limit(exact, eager_error, actual.dtype)
    assert error <= limit, f"{name}: error {error:.3e} over the limit {limit:.3e} (eager's is {eager_error:.3e})"
