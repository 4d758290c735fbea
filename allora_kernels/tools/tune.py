"""Measure every way of a layer's linear products on this device, and keep the fastest for later runs."""

import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..layer import backend
from ..testing import Inputs, assert_close, make_inputs
from . import timing

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
class Product:
    """A linear product of the layer: `launch(plan)` computes ``formula(*operands)`` on the kernels, and `frozen()` the GEMM
    alone; the first two operands are the GEMM's."""

    step: str
    call: tuple
    launch: Callable[[Any], Tensors]
    frozen: Callable[[], Tensor]
    formula: Callable[..., Tensors]
    operands: tuple[Tensor | None, ...]


def products(inputs: Inputs) -> Iterator[Product]:
    """y (with S) and dX of the layer with these inputs."""
    import csrc_triton
    from csrc_triton.plans import Call

    x, weight, bias, lora_A, lora_B, g = inputs
    (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
    compute = torch.promote_types(x.dtype, lora_A.dtype)
    ds = reference.down_project(g, lora_B.mT, compute)
    yield Product(
        "y",
        Call("adapted_linear", M, N, K, R, x.dtype, compute),
        lambda plan: csrc_triton.adapted_linear(x, weight, bias, lora_A, lora_B, compute, plan),
        lambda: F.linear(x, weight, bias),
        lambda x, *rest: reference.adapted_linear(x, *rest, torch.promote_types(x.dtype, compute)),
        (x, weight, bias, lora_A, lora_B),
    )
    yield Product(
        "dx",
        Call("fused_linear", M, K, N, R, x.dtype, compute),
        lambda plan: (csrc_triton.fused_linear(g, weight.mT, None, ds, lora_A.mT, plan),),
        lambda: g @ weight,
        lambda *operands: (reference.fused_linear(*operands),),
        (g, weight.mT, None, ds, lora_A.mT),
    )


def plans_of(product: Product, untried: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """(every plan that can be launched and is right, by its words; why the others are not); `untried` as in `plans.options`."""
    import csrc_triton
    from csrc_triton import configs, plans

    operands = product.operands
    arch, describable = configs.arch_of(operands[0].device), csrc_triton.describable(*operands[:2], operands[4])
    options = {str(plan): plan for plan in plans.options(product.call, arch, describable, untried)}
    rejected = _reject(product, options)
    return {name: plan for name, plan in options.items() if name not in rejected}, rejected


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
    from csrc_triton import plans, tuning

    for product in products(make_inputs(*shape, dtype, adapter_dtype, device=device)):
        options, rejected = plans_of(product)
        calls = {name: functools.partial(product.launch, plan) for name, plan in options.items()}
        times = timing.interleaved(calls, rounds=rounds, device=device)
        result = Tuned(product.step, {name: time.median_ms for name, time in times.items()}, rejected)
        today = datetime.date.today().isoformat()
        entry = tuning.entry(product.call, *options[result.winner], result.milliseconds, today)
        tuning.save(tuning.device_key(device), entry)
        plans.forget()
        yield result


def _reject(product: Product, options: dict) -> dict[str, str]:
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
