"""Opacus 1.6: our layers under `opacus.PrivacyEngine`, in the modes "hooks" and "ghost".

Importing this module registers the layers' grad sampler and norm sampler with Opacus and makes its `ModuleValidator`, which
`PrivacyEngine.make_private` asks first, refuse a model whose adapters would silently get no per-sample gradient.
"""

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler, register_norm_sampler
from opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from opacus.validators.module_validator import ModuleValidator
from torch import Tensor, nn

from ..layer import backend as _backend
from ..layer.adapter import ALLoRALayer
from ..layer.batches import batch_norms, uses_the_batch
from ..layer.linear import FusedALLoRALinear
from ..layer.routing import among_experts
from ..layer.switching import state_of_call
from ..layer.wrapped import WrappedALLoRALinear
from ..per_sample.samples import Samples
from ..per_sample.steps import sample_steps
from ..reference import WEIGHT_NORMS


@torch.no_grad()
def _inputs(layer: ALLoRALayer, activations: list[Tensor], backprops: Tensor) -> tuple[str, tuple, Samples]:
    x = activations[0]
    if x.dim() < 2:
        raise ValueError(f"Opacus needs inputs [b, ..., K], got {list(x.shape)}")
    if x.shape[0] != layer.max_batch_len:
        # Of all calls of the layer; Opacus would take what is missing for samples without a gradient.
        raise ValueError(
            f"which sample each row is of cannot be told: a layer is called on {layer.max_batch_len} samples and on an input "
            f"that leads with {x.shape[0]} ({list(x.shape)}), as positions do that all samples share: adapt other layers"
        )
    if state_of_call(layer, layer._state).rows is not None:
        raise RuntimeError("Opacus sees no adapter_rows: run each adapter's samples on their own")
    samples = Samples.equal(x.shape[0], x.shape[1:-1].numel())
    # The output has x's dtype, but for autocast: there it has autocast's, and the layer's products are in that.
    dtype = backprops.dtype
    rows = x.reshape(samples.rows, x.shape[-1]).to(dtype)
    g = backprops.reshape(samples.rows, backprops.shape[-1])
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    if dtype == x.dtype:
        dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
    name = _backend.choose(x.device, dtype).name
    steps = _backend.steps(name)
    c = steps.weight_coefficient(a, b, layer.eta, layer.norm) if layer.norm in WEIGHT_NORMS else None
    return name, (g, rows, steps.down_project(rows, a, dtype), b, c, layer.eta, layer.norm), samples


@register_grad_sampler([FusedALLoRALinear, WrappedALLoRALinear])
@torch.no_grad()
def grad_sample(layer: ALLoRALayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """``{lora_A: [b, R, K], lora_B: [b, N, R]}`` in the parameters' dtypes, C included, for activations ``[x [b, ..., K]]``.
    Zero for a forward pass with the adapter disabled."""
    name, common, samples = _inputs(layer, activations, backprops)
    needs = (layer.lora_A.requires_grad, layer.lora_B.requires_grad)
    if not state_of_call(layer, layer._state).enabled:
        trained = [p for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
        return {p: p.new_zeros(samples.count, *p.shape) for p in trained}
    _, *grads = sample_steps(name).sample_grads(*common, False, *needs, samples)
    return {p: g.to(p.dtype) for p, g in zip((layer.lora_A, layer.lora_B), grads) if g is not None}


@register_norm_sampler([FusedALLoRALinear, WrappedALLoRALinear])
@torch.no_grad()
def norm_sample(layer: ALLoRALayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """``{lora_A: [b], lora_B: [b]}``: the norms of `grad_sample`'s tensors."""
    name, common, samples = _inputs(layer, activations, backprops)
    steps = sample_steps(name)
    if not state_of_call(layer, layer._state).enabled:
        trained = [p for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
        return {p: p.new_zeros(samples.count) for p in trained}
    norms = {}
    for p, dtypes in ((layer.lora_A, (layer.lora_A.dtype, None)), (layer.lora_B, (None, layer.lora_B.dtype))):
        if p.requires_grad:
            squares = steps.sample_squared_norms(*common, False, *dtypes, samples)[-1]
            norms[p] = squares.clamp_min(0).sqrt()
    return norms


def reasons_against(model: nn.Module) -> list[str]:
    """Why adapters of `model` would silently get no per-sample gradient, or a wrong one, from Opacus; empty if they get it."""
    reasons, owners = [], {}
    adapted = [name for name, module in model.named_modules() if isinstance(module, ALLoRALayer)]
    if adapted:
        reasons += [
            f"{name!r} ({type(norm).__name__}) normalizes each sample by the whole batch, so that no sample has a gradient of "
            "its own: call its eval(), or put a GroupNorm in its place"
            for name, norm in batch_norms(model).items()
            if uses_the_batch(norm)
        ]
    for name, module in model.named_modules():
        if by_functorch := _trained_by_functorch(name, module, adapted):
            reasons.append(by_functorch)
        if isinstance(module, ALLoRALayer):
            if len(module.adapter_names) > 1:
                reasons.append(
                    f"layer {name!r} has several adapters, of which those that take no part get no per-sample gradient: "
                    "remove_adapter(model, name) all but the one to train"
                )
            trained = [p for p in (module.lora_A, module.lora_B) if p.requires_grad]
            if trained and module.grouped:
                reasons.append(
                    f"{name!r} adapts the experts of a mixture, whose rows are sorted by expert and not by sample"
                )
            elif trained and among_experts(name):
                reasons.append(
                    f"layer {name!r} is among experts, and rows that are routed to it would count as samples: adapt other "
                    "layers, or call the list of experts otherwise where each of them sees every sample"
                )
            if trained and not module.training:
                reasons.append(
                    f"layer {name!r} is in eval mode, where Opacus does not look at its inputs: call train()"
                )
            if module._recording is not None:
                reasons.append(f"layer {name!r} is in per_sample.record, which has its own per-sample gradients")
            for p in trained:
                if owners.setdefault(p, name) != name:
                    reasons.append(f"layers {owners[p]!r} and {name!r} share an adapter, whose norms Opacus cannot add")
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and not _calls_its_adapters(module):
            reasons.append(
                f"layer {name!r} ({type(module).__name__}) reads lora_A and lora_B by their weights and does not call them, so "
                "Opacus's hooks on them never run: use FusedALLoRALinear, or PEFT's own layer"
            )
        if getattr(module, "gradient_checkpointing", False) is True:
            reasons.append(
                f"{name or 'the model'!r} has gradient checkpointing on: Opacus counts the recomputed calls too and hands "
                "out no gradient; call gradient_checkpointing_disable()"
            )
    return reasons


def _trained_by_functorch(name: str, module: nn.Module, adapted: list[str]) -> str | None:
    """Why Opacus would run `module`, an adapted layer or what holds some, by functorch, which cannot run them."""
    own = [parameter for parameter, p in module.named_parameters(recurse=False) if p.requires_grad]
    if type(module) in GradSampleModule.GRAD_SAMPLERS:
        return None
    if isinstance(module, ALLoRALayer):
        # Experts have a reason of their own.
        trained = module.lora_A.requires_grad or module.lora_B.requires_grad
        known = module.grouped or not trained
        return None if known else f"Opacus has no grad sampler for {type(module).__name__}, the class of layer {name!r}"
    below = [layer for layer in adapted if not name or layer.startswith(f"{name}.")]
    if not (own and below):
        return None
    return (
        f"{repr(name) if name else 'the model'} trains {own[0]!r} itself, so that Opacus would run all of it by functorch, "
        f"layer {below[0]!r} too: freeze {own[0]!r}, or hold it in a module of its own"
    )


def _calls_its_adapters(module: nn.Module) -> bool:
    return type(module).forward.__module__.split(".")[0] == "peft"


_validate = ModuleValidator.validate.__func__


def _validate_adapters_too(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
    errors = _validate(cls, module, strict=False)
    errors += [IllegalModuleConfigurationError(reason) for reason in reasons_against(module)]
    if strict and errors:
        raise UnsupportedModuleError(errors)
    return errors


# Opacus keeps validators by exact class and shows them one module at a time; what is refused here needs the whole model.
ModuleValidator.validate = classmethod(_validate_adapters_too)
