"""`allora doctor`: what is installed, which backend runs here and why, and whether its gradients are right."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..layer import backend as _backend
from ..layer.explanation import explain
from ..layer.functional import allora_linear
from ..testing import Inputs, error_limit, make_inputs, max_error
from ..training.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

_SHAPE = (96, 160, 128, 8)
_RESULTS = ("y", "dx", "dA", "dB")


@dataclass(frozen=True)
class Check:
    """One rule in one dtype: the largest error of each result relative to the result's largest value."""

    norm: str | None
    dtype: torch.dtype
    errors: dict[str, float]
    limits: dict[str, float]
    failure: str | None = None
    """What was raised instead of a result."""

    @property
    def passed(self) -> bool:
        return self.failure is None and all(self.errors[name] <= self.limits[name] for name in _RESULTS)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def self_check(device: torch.device) -> list[Check]:
    """Every rule, forward and backward, against `reference.allora_linear` in float64.

    A result passes within `testing.error_limit` of that: about twice as far as `reference.allora_linear` in the same dtype is.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return [_check(norm, dtype, device) for dtype in dtypes for norm in reference.NORMS]


def _check(norm: str | None, dtype: torch.dtype, device: torch.device) -> Check:
    inputs = make_inputs(*_SHAPE, dtype=dtype, adapter_dtype=torch.float32, device=device)
    exact = _run(reference.allora_linear, inputs.to(torch.float64), norm)
    same_dtype = _run(reference.allora_linear, inputs, norm)
    try:
        actual = _run(allora_linear, inputs, norm)
    except Exception as error:
        # Whatever it is, a compiler's error or a driver's: the table must name the rule and go on to the others.
        return Check(norm, dtype, {}, {}, " ".join(f"{type(error).__name__}: {error}".split())[:200])
    errors, limits = {}, {}
    for name in _RESULTS:
        scale = exact[name].abs().max().item()
        errors[name] = max_error(actual[name], exact[name]) / scale
        eager_error = max_error(same_dtype[name], exact[name])
        limits[name] = error_limit(exact[name], eager_error, actual[name].dtype) / scale
    return Check(norm, dtype, errors, limits)


def _run(layer, inputs: Inputs, norm: str | None) -> dict[str, Tensor]:
    x, a, b = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    y = layer(x, inputs.weight, inputs.bias, a, b, norm=norm)
    grads = torch.autograd.grad(y, (x, a, b), inputs.g)
    return dict(zip(_RESULTS, (y.detach(), *grads)))


def diagnose(console: "Console", device: torch.device | None = None) -> bool:
    """Print versions, device, backend and the self-check on `console` (a rich Console).

    Returns:
        Whether every check passed.
    """
    from rich.table import Table

    device = device or default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA or ROCm device"
    console.print(f"device:  {device.type} ({name})", highlight=False)
    found = ", ".join(f"{package} {number or 'not installed'}" for package, number in versions().items())
    console.print(f"version: {found}", highlight=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console.print(str(explain(8192, 4096, 4096, 16, "row", device, dtype, torch.float32)), highlight=False)

    table = Table("dtype", "norm", *_RESULTS, "", title="largest relative error against float64")
    checks = self_check(device)
    for check in checks:
        cells = [f"{check.errors[name]:.1e}" if check.errors else "-" for name in _RESULTS]
        verdict = check.failure or ("ok" if check.passed else "WRONG")
        table.add_row(str(check.dtype).removeprefix("torch."), str(check.norm), *cells, verdict)
    console.print(table)
    passed = all(check.passed for check in checks)
    backend = _backend.choose(device, dtype).name
    console.print(f"self-check of the {backend} backend: {'passed' if passed else 'FAILED'}", highlight=False)
    return passed
