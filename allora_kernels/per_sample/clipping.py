"""Norms of the recorded gradients, and their clipped sum."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..layer import backend as _backend
from .recorded import adapted_layers
from .recording import records
from .steps import sample_steps


def _steps(t: Tensor):
    return sample_steps(_backend.choose(t.device, t.dtype).name)


def grad_samples(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of `layer` that have a `grad_sample`."""
    return [p for p in (layer.lora_A, layer.lora_B) if getattr(p, "grad_sample", None) is not None]


def _check_active(layers: Iterable[nn.Module]) -> None:
    """RuntimeError where what was recorded is another adapter's than the one that is active."""
    for layer in layers:
        for other in layer.adapter_names:
            own = layer.adapter(other)
            recorded = layer in records and records[layer][0].adapter == other
            if other != layer.adapter_name and (recorded or grad_samples(own)):
                raise RuntimeError(
                    f"gradients of adapter {other!r} were recorded, and {layer.adapter_name!r} is active now: call clip_ and "
                    "clear before set_adapter"
                )


def squared_norms(model: nn.Module) -> Tensor:
    """The squares of `norms`."""
    squares, found = [], {}
    layers = adapted_layers(model)
    _check_active(layers)
    for layer, name in layers.items():
        if layer in records:
            parts = [torch.cat([call.squares for call in records[layer]])]
        else:
            parts = [_steps(p.grad_sample).squared_norms(p.grad_sample) for p in grad_samples(layer)]
        for part in parts:
            squares.append(part)
            found.setdefault(part.shape[0], name)
    if not squares:
        raise RuntimeError(
            "no per-sample gradient was recorded: run forward and backward inside per_sample.record(model)"
        )
    if len(found) > 1:
        (b, first), (other, second) = list(found.items())[:2]
        raise RuntimeError(
            f"layer {first!r} has gradients of {b} samples, layer {second!r} of {other}: not every layer took part in every "
            "backward pass"
        )
    device = squares[0].device
    return torch.stack([part.to(device) for part in squares]).sum(0)


def norms(model: nn.Module) -> Tensor:
    """The norm of each recorded sample's gradient, over all adapters together: ``[b]`` in fp32 or better.

    Raises:
        RuntimeError: nothing was recorded, or layers have different numbers of samples.
    """
    return squared_norms(model).sqrt()


@torch.no_grad()
def clip_(model: nn.Module, max_norm: float) -> Tensor:
    """Write ``Σ_i min(1, max_norm / ‖g_i‖) g_i`` into ``grad`` of the adapters and return the norms ``[b]`` before.

    ``g_i`` is the recorded gradient of sample i over all adapters, with the loss's own factor (1/b where it is a mean).
    No second backward pass. Replaces what ``grad`` held. On a DistributedDataParallel model the clipped sums are averaged
    over the processes, as DDP averages gradients.

    Raises:
        ValueError: `max_norm` is not > 0; or a parameter outside the adapters got a gradient, which would stay unclipped.
        RuntimeError: as `norms`; or a norms-only record was clipped before.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be a finite number > 0, got {max_norm!r}")
    layers = adapted_layers(model)
    adapters = {p for layer in layers for p in (layer.lora_A, layer.lora_B)}
    loose = [name for name, p in model.named_parameters() if p.grad is not None and p not in adapters]
    _check_active(layers)
    if loose:
        raise ValueError(f"{loose[0]!r} has a gradient but is no adapter's: it would stay unclipped; freeze it")
    if any(call.weigh is None for layer in layers for call in records.get(layer, ())):
        raise RuntimeError("this norms-only record was clipped already, which used it up")
    sample_norms = norms(model)
    weights = max_norm / sample_norms.clamp_min(max_norm)
    for layer in layers:
        if layer in records:
            _weigh(layer, weights)
        for p in grad_samples(layer):
            w = weights.to(p.device, torch.promote_types(torch.float32, p.grad_sample.dtype))
            _set_grad(p, _steps(p.grad_sample).weighted_sum(p.grad_sample, w, p.dtype))
    _average(model, adapters)
    return sample_norms


def _weigh(layer: nn.Module, weights: Tensor) -> None:
    weights = weights.to(layer.lora_A.device)
    sums: list[Tensor | None] = [None, None]
    calls = records[layer]
    for call, w in zip(calls, weights.split([call.samples.count for call in calls])):
        for i, part in enumerate(call.weigh(w)):
            sums[i] = part if sums[i] is None else sums[i] + part
        # G and x are not needed any more; the norms stay.
        call.weigh = None
    for p, total in zip((layer.lora_A, layer.lora_B), sums):
        if total is not None:
            _set_grad(p, total)


def _set_grad(p: nn.Parameter, grad: Tensor) -> None:
    if p.grad is None:
        p.grad = grad
    else:
        p.grad.copy_(grad)


def _average(model: nn.Module, parameters: set[nn.Parameter]) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
        for p in model.parameters():
            if p in parameters and p.grad is not None:
                torch.distributed.all_reduce(p.grad, group=group)
                p.grad /= group.size()
