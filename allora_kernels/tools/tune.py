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
    """A linear product of the layer: `launch(option)`, of a plan or of what else there is to choose, computes
    ``formula(*operands)`` on the kernels, and `frozen()` the GEMM alone; the first two operands are the GEMM's."""

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


def plans_of(product: Product, untried: bool = False) -> dict[str, Any]:
    """Every plan that can run the product, by its words; `untried` as in `plans.options`."""
    import csrc_triton
    from csrc_triton import configs, plans

    operands = product.operands
    arch, describable = configs.arch_of(operands[0].device), csrc_triton.describable(*operands[:2], operands[4])
    return {str(plan): plan for plan in plans.options(product.call, arch, describable, untried)}


def rejected(product: Product, options: dict[str, Any]) -> dict[str, str]:
    """Those of the options, by their names, with which the product raises or is wrong, and why."""
    eager = product.formula(*product.operands)
    exact = product.formula(*(None if t is None else t.double() for t in product.operands))
    found = {}
    for name, option in options.items():
        try:
            for values in zip(product.launch(option), eager, exact):
                assert_close(*values)
        except Exception as error:
            # Whatever a compiler or a driver raises where this device cannot run a configuration: the others may.
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return found


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
        ValueError: the kernels cannot run on `device` or in these dtypes, or every plan is refused, so there is nothing to
            choose.
    """
    backend.choose(device, torch.promote_types(dtype, adapter_dtype), "triton")
    from csrc_triton import plans, tuning

    for product in products(make_inputs(*shape, dtype, adapter_dtype, device=device)):
        options = plans_of(product)
        wrong = rejected(product, options)
        if wrong.keys() == options.keys():
            plan, why = next(iter(wrong.items()))
            raise ValueError(f"no plan of {product.step} can be used here, so none is kept; {plan}: {why}")
        calls = {name: functools.partial(product.launch, plan) for name, plan in options.items() if name not in wrong}
        times = timing.interleaved(calls, rounds=rounds, device=device)
        result = Tuned(product.step, {name: time.median_ms for name, time in times.items()}, wrong)
        today = datetime.date.today().isoformat()
        entry = tuning.entry(product.call, *options[result.winner], result.milliseconds, today)
        tuning.save(tuning.device_key(device), entry)
        plans.forget()
        yield result
