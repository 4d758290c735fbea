"""Measure every way of a layer's linear products on this device, and keep the fastest for later runs."""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, reference, timing
from .testing import assert_close, make_inputs

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tuned:
    """One product of one layer: `step` ("y" or "dx"), each plan's median in milliseconds, and why others have none."""

    step: str
    milliseconds: dict[str, float]
    rejected: dict[str, str]

    @property
    def winner(self) -> str:
        """The fastest plan."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


@dataclass(frozen=True)
class _Product:
    """`launch(plan)` computes ``formula(*operands)`` on the kernels; the first two operands are those of the GEMM."""

    step: str
    call: tuple
    launch: Callable[[Any], Tensors]
    formula: Callable[..., Tensors]
    operands: tuple[Tensor | None, ...]


def tune(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    rounds: int = 20,
) -> Iterator[Tuned]:
    """Measure and keep the plans of y and of dX for ``shape = (M, N, K, R)``; yields each when it is kept.

    Every plan is checked against fp64 before it is timed, as the tests do.

    Raises:
        ValueError: the kernels cannot run on `device` or in these dtypes, so there is nothing to choose.
    """
    backend.choose(device, torch.promote_types(dtype, adapter_dtype), "triton")
    import csrc_triton
    from csrc_triton import configs, plans, tuning

    for product in _products(shape, dtype, adapter_dtype, device):
        describable = csrc_triton.describable(*product.operands[:2])
        options = {str(plan): plan for plan in plans.options(product.call, configs.arch_of(device), describable)}
        rejected = _reject(product, options)
        calls = {name: _launch(product, plan) for name, plan in options.items() if name not in rejected}
        times = timing.interleaved(calls, rounds=rounds, device=device)
        result = Tuned(product.step, {name: time.median_ms for name, time in times.items()}, rejected)
        today = datetime.date.today().isoformat()
        entry = tuning.entry(product.call, *options[result.winner], result.milliseconds, today)
        tuning.save(tuning.device_key(device), entry)
        plans.forget()
        yield result


def _products(shape, dtype, adapter_dtype, device) -> Iterator[_Product]:
    import csrc_triton
    from csrc_triton.plans import Call

    (M, N, K, R), compute = shape, torch.promote_types(dtype, adapter_dtype)
    x, weight, bias, lora_A, lora_B, g = make_inputs(*shape, dtype, adapter_dtype, device=device)
    ds = reference.down_project(g, lora_B.mT, compute)
    yield _Product(
        "y",
        Call("adapted_linear", M, N, K, R, dtype, compute),
        lambda plan: csrc_triton.adapted_linear(x, weight, bias, lora_A, lora_B, compute, plan),
        lambda x, *rest: reference.adapted_linear(x, *rest, torch.promote_types(x.dtype, compute)),
        (x, weight, bias, lora_A, lora_B),
    )
    yield _Product(
        "dx",
        Call("fused_linear", M, K, N, R, dtype, compute),
        lambda plan: (csrc_triton.fused_linear(g, weight.mT, None, ds, lora_A.mT, plan),),
        lambda *operands: (reference.fused_linear(*operands),),
        (g, weight.mT, None, ds, lora_A.mT),
    )


def _launch(product: _Product, plan) -> Callable[[], Tensors]:
    return lambda: product.launch(plan)


def _reject(product: _Product, options: dict) -> dict[str, str]:
    """The plans that raise or are wrong, and why."""
    eager = product.formula(*product.operands)
    exact = product.formula(*(None if t is None else t.double() for t in product.operands))
    rejected = {}
    for name, plan in options.items():
        try:
            for values in zip(product.launch(plan), eager, exact):
                assert_close(*values)
        except Exception as error:
            # Whatever a compiler or a driver raises where this device cannot run a configuration: the others may.
            rejected[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return rejected
