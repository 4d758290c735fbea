"""`allora bench`: what an adapted layer costs over the frozen one, here and now."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..layer.linear import FusedALLoRALinear
from ..testing import make_inputs, with_factors
from . import timing
from .tune import tune

if TYPE_CHECKING:
    from rich.console import Console


class Cost(NamedTuple):
    """Of one pass: medians of the frozen layer and of the adapted one, in milliseconds."""

    frozen: timing.Timing
    ours: timing.Timing

    @property
    def ratio(self) -> float:
        """Adapted over frozen."""
        return self.ours.median_ms / self.frozen.median_ms


def measure_layer(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    rounds: int = 30,
) -> dict[str, Cost]:
    """Forward, and forward + backward, of ``shape = (M, N, K, R)``, each interleaved with the frozen layer's own.

    The frozen layer computes y and, backward, dX; the adapted one (rule "row") also the adapter's gradients.
    """
    (_, N, K, R), inputs = shape, make_inputs(*shape, dtype, adapter_dtype, device=device)
    linear = torch.nn.Linear(K, N, device=device, dtype=dtype)
    layer = FusedALLoRALinear.from_linear(linear, r=R, adapter_dtype=adapter_dtype)
    with_factors(layer, inputs.lora_A, inputs.lora_B)
    with torch.no_grad():
        layer.weight.copy_(inputs.weight)
        layer.bias.copy_(inputs.bias)
    x, g = inputs.x.requires_grad_(), inputs.g

    def frozen():
        return F.linear(x, layer.weight, layer.bias)

    passes = {
        "forward": {"frozen": frozen, "ours": lambda: layer(x)},
        "forward + backward": {
            "frozen": lambda: torch.autograd.grad(frozen(), x, g),
            "ours": lambda: torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), g),
        },
    }
    return {name: Cost(**timing.interleaved(calls, rounds=rounds, device=device)) for name, calls in passes.items()}


def report(
    console: "Console",
    shapes: list[tuple[int, int, int, int]],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    tuned: bool,
) -> None:
    """Print the cost of each (M, N, K, R) on `console` (a rich Console), after tuning it where `tuned`.

    Raises:
        ValueError: tuning where the kernels cannot run.
    """
    from rich.table import Table

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(f"{name}, torch {torch.__version__}, {_name(dtype)}, adapter {_name(adapter_dtype)}", highlight=False)
    if tuned:
        for shape in shapes:
            for result in tune(shape, dtype, adapter_dtype, device):
                console.print(f"{_label(shape)} {result.step}: {result.winner}", highlight=False, soft_wrap=True)
                for plan, why in result.rejected.items():
                    console.print(f"  not usable: {plan}: {why}", highlight=False, soft_wrap=True)
    table = Table(*"MNKR", "pass", "frozen ms", "ours ms", "ours / frozen")
    for shape in shapes:
        for step, cost in measure_layer(shape, dtype, adapter_dtype, device).items():
            times = (f"{time.median_ms:.4f}" for time in cost)
            table.add_row(*map(str, shape), step, *times, f"{cost.ratio:.3f}")
    console.print(table)


def _label(shape: tuple[int, int, int, int]) -> str:
    return " ".join(f"{dim}={size}" for dim, size in zip("MNKR", shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
