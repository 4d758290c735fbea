"""Per-sample gradients of the adapters: recorded in an ordinary backward pass, clipped, and their noise measured."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backend as _backend
from .linear import FusedALLoRALinear
from .recording import Call, Recording, records


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    layers = {module: name for name, module in model.named_modules() if isinstance(module, FusedALLoRALinear)}
    if not layers:
        raise ValueError("the model has no FusedALLoRALinear: adapt it with apply_allora first")
    owners: dict[nn.Parameter, str] = {}
    for layer, name in layers.items():
        for parameter in (layer.lora_A, layer.lora_B):
            if owners.setdefault(parameter, name) != name:
                raise ValueError(
                    f"layers {owners[parameter]!r} and {name!r} share an adapter: the gradient of a sample would be spread "
                    "over both; give each its own"
                )
    return layers


@contextlib.contextmanager
def record(
    model: nn.Module,
    cu_seqlens: Tensor | None = None,
    *,
    norms_only: bool = False,
    batch_dim: int | None = None,
    samples: int | None = None,
) -> Iterator[Recording]:
    """Record the per-sample gradients of every adapter of `model` in the backward passes inside.

    A sample is an entry of the leading dimension of a layer's input (of a 2-D input: a row), or with `cu_seqlens` the range
    ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of its flattened rows. Afterwards each adapter parameter that got a gradient has
    ``grad_sample [b, *shape]`` in fp32 or better, C included: its sum over b is what the passes inside added to ``grad``.
    Several forward passes inside, each with a backward pass, are micro-batches: their samples follow each other in order. Calls
    of a layer within one forward pass of `model` are of the same samples and add up.

    Args:
        model: holds at least one FusedALLoRALinear; wrapped in DistributedDataParallel or not.
        cu_seqlens: int32 ``[b + 1]``, read back once, here. ``recording.set_cu_seqlens`` gives the next micro-batch's.
        norms_only: keep the norms alone, no tensor with b but them. G and x of every layer stay until `clip_`, `clear` or
            the next record, so that `clip_` can sum again with weights.
        batch_dim: the dimension of a layer's input that runs over samples: 1 for a model that works on [T, b, K]. Other than 0
            it costs a copy of G and x. None for 0, checked against the leading dimensions of the model's inputs.
        samples: how many one backward pass is of, where it reaches several forward passes: as many as each has, they are of
            the same samples; as many as all have together, they are of different ones.

    Yields:
        The recording.

    Raises:
        TypeError: `cu_seqlens` is no int32 tensor; `batch_dim` or `samples` no int.
        ValueError: the model has no adapter or one shared by two layers; `cu_seqlens` does not start at 0 or decreases;
            `batch_dim` or `samples` is negative. From the forward pass: `cu_seqlens` does not end at M, or the number of
            samples is unknown. From the backward pass: it reaches several forward passes and `samples` is not given. From
            leaving: they had not `samples` samples.
        RuntimeError: the model is being recorded already, or (from the forward pass) is compiled.
    """
    for name, value in (("batch_dim", batch_dim), ("samples", samples)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if cu_seqlens is not None and batch_dim:
        raise ValueError("cu_seqlens cuts the rows as they lie: give it or batch_dim, not both")
    layers = _layers(model)
    busy = [name for layer, name in layers.items() if layer._recording is not None]
    if busy:
        raise RuntimeError(f"layer {busy[0]!r} is being recorded already: a record cannot be inside another")
    recording = Recording(layers, cu_seqlens, norms_only, batch_dim, samples)
    clear(model)
    hooks = [
        model.register_forward_pre_hook(recording.enter_model, with_kwargs=True),
        model.register_forward_hook(recording.leave_model, always_call=True),
    ]
    for layer in layers:
        layer._recording = recording
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            del layer._recording
    for layer, calls in {layer: recording.calls(layer) for layer in layers}.items():
        _finish(layer, calls, norms_only)


def _finish(layer: nn.Module, calls: list[Call], norms_only: bool) -> None:
    if not calls:
        return
    if norms_only:
        records[layer] = calls
        return
    for parameter, parts in ((layer.lora_A, [call.a for call in calls]), (layer.lora_B, [call.b for call in calls])):
        if parts[0] is not None:
            parameter.grad_sample = parts[0] if len(parts) == 1 else torch.cat(parts)


def clear(model: nn.Module) -> None:
    """Forget what was recorded: `grad_sample` of every adapter parameter, and what a norms-only record keeps."""
    for layer in _layers(model):
        records.pop(layer, None)
        for parameter in (layer.lora_A, layer.lora_B):
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample


def _steps(t: Tensor):
    return _backend.sample_steps(_backend.choose(t.device, t.dtype).name)


def _recorded(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in (layer.lora_A, layer.lora_B) if getattr(p, "grad_sample", None) is not None]


def _squared_norms(model: nn.Module) -> Tensor:
    squares, found = [], {}
    for layer, name in _layers(model).items():
        if layer in records:
            parts = [torch.cat([call.squares for call in records[layer]])]
        else:
            parts = [_steps(p.grad_sample).squared_norms(p.grad_sample) for p in _recorded(layer)]
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
    return _squared_norms(model).sqrt()


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
    layers = _layers(model)
    adapters = {p for layer in layers for p in (layer.lora_A, layer.lora_B)}
    loose = [name for name, p in model.named_parameters() if p.grad is not None and p not in adapters]
    if loose:
        raise ValueError(f"{loose[0]!r} has a gradient but is no adapter's: it would stay unclipped; freeze it")
    if any(call.weigh is None for layer in layers for call in records.get(layer, ())):
        raise RuntimeError("this norms-only record was clipped already, which used it up")
    sample_norms = norms(model)
    weights = max_norm / sample_norms.clamp_min(max_norm)
    for layer in layers:
        if layer in records:
            _weigh(layer, weights)
        for p in _recorded(layer):
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


class NoiseScale(NamedTuple):
    """`value` = `trace` / `squared_norm`, scalar tensors: unbiased estimates of the trace of the covariance of a sample's
    gradient and of the squared norm of the true gradient. Average the last two over steps before dividing."""

    value: Tensor
    trace: Tensor
    squared_norm: Tensor


@torch.no_grad()
def noise_scale(model: nn.Module) -> NoiseScale:
    """The simple gradient-noise scale ``tr(Σ) / |G|²`` (arXiv 1812.06162): the batch size at which noise and signal are equal.

    From b recorded gradients ``g_i`` with mean ``m``: ``tr(Σ) = Σ |g_i - m|² / (b - 1)`` and ``|G|² = |m|² - tr(Σ) / b``, both
    unbiased. Assumes that every sample has the same weight in the loss: a sum over samples, or a mean over as many in each
    micro-batch (the value is the same for both; `trace` and `squared_norm` carry the loss's factor squared). Of this
    process's samples only. `squared_norm` may come out negative where noise is all there is, and `value` with it.

    Raises:
        ValueError: fewer than two samples.
        RuntimeError: as `norms`.
    """
    squares = _squared_norms(model)
    b = squares.shape[0]
    if b < 2:
        raise ValueError(f"the noise of a gradient needs at least 2 samples, got {b}")
    total = squares.new_zeros(())
    for layer in _layers(model):
        if layer in records:
            parts = [sum(part) for part in zip(*(call.totals for call in records[layer]))]
        else:
            parts = [p.grad_sample.sum(0) for p in _recorded(layer)]
        for part in parts:
            total += part.to(squares.dtype).square().sum().to(total.device)
    mean_squared = total / b**2
    trace = (squares.sum() - b * mean_squared) / (b - 1)
    squared_norm = mean_squared - trace / b
    return NoiseScale(trace / squared_norm, trace, squared_norm)
