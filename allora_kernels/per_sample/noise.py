"""How noisy a gradient is: from the recorded gradients of its samples."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .clipping import grad_samples, recorded_adapters, squared_norms
from .recorded import adapted_layers


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
        ValueError: fewer than two samples, or samples that `adapter_rows` gave each an adapter of its own.
        RuntimeError: as `norms`.
    """
    squares = squared_norms(model)
    b = squares.shape[0]
    if b < 2:
        raise ValueError(f"the noise of a gradient needs at least 2 samples, got {b}")
    total = squares.new_zeros(())
    for adapter, kept in (pair for layer in adapted_layers(model) for pair in recorded_adapters(layer)):
        if kept.places is not None:
            raise ValueError("noise_scale is of samples that all train one adapter, and adapter_rows gave each its own")
        if kept.calls:
            parts = [sum(part) for part in zip(*(call.totals for call in kept.calls)) if part[0] is not None]
        else:
            parts = [p.grad_sample.sum(0) for p in grad_samples(adapter)]
        for part in parts:
            total += part.to(squares.dtype).square().sum().to(total.device)
    mean_squared = total / b**2
    trace = (squares.sum() - b * mean_squared) / (b - 1)
    squared_norm = mean_squared - trace / b
    return NoiseScale(trace / squared_norm, trace, squared_norm)
