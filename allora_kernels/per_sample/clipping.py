"""Norms of the recorded gradients, and their clipped sum."""

import math

import torch
from torch import Tensor, nn

from ..layer import backend as _backend
from ..layer.adapter import ALLoRALayer
from ..layer.sharding import is_sharded
from ..layer.zero import gives_gradients_away
from .fsdp import averaged
from .kept import Block, Call, Kept, records
from .recorded import adapted_layers
from .steps import sample_steps


def _steps(t: Tensor):
    return sample_steps(_backend.choose(t.device, t.dtype).name)


def grad_samples(adapter: nn.Module) -> list[nn.Parameter]:
    """The parameters of `adapter` that have a `grad_sample`."""
    return [p for p in (adapter.lora_A, adapter.lora_B) if getattr(p, "grad_sample", None) is not None]


def recorded_adapters(layer: ALLoRALayer) -> list[tuple[nn.Module, Kept]]:
    """Each adapter of `layer` that has recorded gradients, and what was kept of it beside `grad_sample`.

    Raises:
        RuntimeError: it was removed since.
    """
    if layer not in records:
        # Set by other hands, or read from a file together with the model.
        found = []
        for adapter in map(layer.adapter, layer.adapter_names):
            if made := grad_samples(adapter):
                places, count = getattr(made[0], "grad_sample_of", (None, made[0].grad_sample.shape[0]))
                found.append((adapter, Kept([], count, places, named=places is not None)))
        return found
    found = []
    for name, kept in records[layer].items():
        if name not in layer.adapter_names or kept.adapter() is not layer.adapter(name).lora_A:
            raise RuntimeError(
                f"gradients of adapter {name!r} were recorded, and it was removed since: call per_sample.clear(model) before "
                "remove_adapter"
            )
        found.append((layer.adapter(name), kept))
    return found


def squared_norms(model: nn.Module) -> Tensor:
    """The squares of `norms`."""
    squares, found, blocks = [], {}, []
    for layer, name in adapted_layers(model).items():
        recorded = recorded_adapters(layer)
        blocks += [(kept.block, name) for _, kept in recorded if kept.block is not None]
        named = any(kept.named for _, kept in recorded)
        for adapter, kept in recorded:
            if kept.calls:
                parts = [torch.cat([call.squares for call in kept.calls])]
            else:
                parts = [_steps(p.grad_sample).squared_norms(p.grad_sample) for p in grad_samples(adapter)]
            if kept.places is not None and not named:
                raise RuntimeError(
                    f"layer {name!r} has gradients of {len(kept.places)} of {kept.count} samples: not every layer took part in "
                    "every backward pass"
                )
            squares += map(kept.spread, parts)
            if parts:
                found.setdefault(kept.count, name)
    if not squares:
        raise RuntimeError(
            "no per-sample gradient was recorded: run forward and backward inside per_sample.record(model)"
        )
    _check_one_batch(blocks)
    if len(found) > 1:
        (b, first), (other, second) = list(found.items())[:2]
        raise RuntimeError(
            f"layer {first!r} has gradients of {b} samples, layer {second!r} of {other}: not every layer took part in every "
            "backward pass"
        )
    device = squares[0].device
    return torch.stack([part.to(device) for part in squares]).sum(0)


def _check_one_batch(blocks: list[tuple[Block, str]]) -> None:
    """RuntimeError where a block had ended before another began."""
    if not blocks:
        return
    (latest, after), (earliest, before) = max(blocks, key=lambda b: b[0].began), min(blocks, key=lambda b: b[0].ended)
    if earliest.ended < latest.began:
        raise RuntimeError(
            f"layer {before!r} has gradients from a record that ended before that of layer {after!r} began: they may be of "
            "other samples. Call per_sample.clear(model) between, or norms and clip_ of the part that was recorded"
        )


def norms(model: nn.Module) -> Tensor:
    """The norm of each recorded sample's gradient, over all adapters together: ``[b]`` in fp32 or better. In a batch of
    `adapter_rows` b counts all samples; those without an adapter have 0.

    Raises:
        RuntimeError: nothing was recorded, layers have different numbers of samples or gradients from records that followed
            one another, or a recorded adapter was removed since.
    """
    return squared_norms(model).sqrt()


@torch.no_grad()
def clip_(model: nn.Module, max_norm: float) -> Tensor:
    """Write ``Σ_i min(1, max_norm / ‖g_i‖) g_i`` into ``grad`` of the adapters and return the norms ``[b]`` before.

    ``g_i`` is the recorded gradient of sample i over all adapters, with the loss's own factor (1/b where it is a mean).
    No second backward pass. Replaces what ``grad`` held. In DistributedDataParallel and under FSDP2 the clipped sums are
    averaged over the processes, as they average gradients; every process must call it then.

    Args:
        model: what was recorded. Give it the DistributedDataParallel, or a module that holds one, and not what it wraps, which
            does not know of the other processes.
        max_norm: finite and > 0.

    Raises:
        ValueError: `max_norm` is not > 0; or a parameter has a gradient that was not recorded, which would stay unclipped.
        RuntimeError: as `norms`; or a norms-only record was clipped before, or what it sums from was written to since; or
            DeepSpeed's ZeRO trains the model.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be a finite number > 0, got {max_norm!r}")
    recorded = [pair for layer in adapted_layers(model) for pair in recorded_adapters(layer)]
    written = {p for adapter, kept in recorded for p in _recorded_factors(adapter, kept)}
    if any(map(gives_gradients_away, written)):
        raise RuntimeError(
            "DeepSpeed's ZeRO has taken the gradients as the backward pass found them, so its step would not see them clipped: "
            "train in DistributedDataParallel or under FSDP2"
        )
    replicas = _replicas(model)
    known = written.union(p for parameters in replicas.values() for p in parameters if p.requires_grad)
    loose = [name for name, p in model.named_parameters() if p.grad is not None and p not in known]
    if loose:
        raise ValueError(
            f"{loose[0]!r} has a gradient that was not recorded and would stay unclipped: freeze it, and call "
            "zero_grad(set_to_none=True) before the record"
        )
    to_sum = [call.weighing for _, kept in recorded for call in kept.calls]
    if None in to_sum:
        raise RuntimeError("this norms-only record was clipped already, which used it up")
    if any(weighing.is_stale for weighing in to_sum):
        raise RuntimeError(
            "a norms-only record sums again from the layers' inputs, and one of them was written to since the backward pass: "
            "call clip_ before an input is reused, or record without norms_only"
        )
    sample_norms = norms(model)
    weights = max_norm / sample_norms.clamp_min(max_norm)
    for adapter, kept in recorded:
        own = kept.own(weights.to(adapter.lora_A.device))
        if kept.calls:
            _weigh(adapter, kept.calls, own)
        for p in grad_samples(adapter):
            w = own.to(p.device, torch.promote_types(torch.float32, p.grad_sample.dtype))
            _set_grad(p, _steps(p.grad_sample).weighted_sum(p.grad_sample, w, p.dtype))
    for replica, parameters in replicas.items():
        group = replica.process_group
        for p in _with_gradient_anywhere(parameters, group):
            if p not in written:
                # Of this process's samples it has none: what is there DDP brought from others.
                _set_grad(p, torch.zeros_like(p))
            torch.distributed.all_reduce(p.grad, group=group)
            p.grad /= group.size()
    return sample_norms


def _recorded_factors(adapter: nn.Module, kept: Kept) -> list[nn.Parameter]:
    """Those of lora_A and lora_B that gradients were recorded of: the other one was frozen."""
    if not kept.calls:
        return grad_samples(adapter)
    return [p for p, there in zip((adapter.lora_A, adapter.lora_B), kept.calls[0].factors) if there]


def _replicas(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Each DistributedDataParallel in `model`: the adapters' parameters that it holds in each process, in one order for all."""
    found = {}
    for replica in model.modules():
        if isinstance(replica, nn.parallel.DistributedDataParallel):
            layers = [module for module in replica.modules() if isinstance(module, ALLoRALayer)]
            owners = [layer.adapter(name) for layer in layers for name in layer.adapter_names]
            found[replica] = [p for owner in owners for p in (owner.lora_A, owner.lora_B)]
    return found


def _with_gradient_anywhere(parameters: list[nn.Parameter], group) -> list[nn.Parameter]:
    """Those of `parameters` that have a gradient in any process of `group`, which may have run other layers or named other
    adapters each."""
    if not parameters:
        return []
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    torch.distributed.all_reduce(there, group=group)
    return [p for p, found in zip(parameters, there.tolist()) if found]


def _weigh(adapter: nn.Module, calls: list[Call], weights: Tensor) -> None:
    sums: list[Tensor | None] = [None, None]
    for call, w in zip(calls, weights.split([call.samples.count for call in calls])):
        for i, part in enumerate(call.weighing.sums(w)):
            sums[i] = part if sums[i] is None else sums[i] + part
        # G and x are not needed any more; the norms stay.
        call.weighing = None
    for p, total in zip((adapter.lora_A, adapter.lora_B), sums):
        if total is not None:
            _set_grad(p, total)


def _set_grad(p: nn.Parameter, grad: Tensor) -> None:
    """Make `grad`, which is of this process's samples and whole, the gradient of p. Where processes hold a part of p each
    (FSDP2) it is averaged over them, as the gradients of the loss are, and each keeps its part."""
    if is_sharded(p):
        grad = averaged(grad, p)
    if p.grad is None:
        p.grad = grad
    else:
        p.grad.copy_(grad)
