"""Whether a whole model gives its adapters the right gradients, by those of its first and last adapted layer."""

import torch
from torch import Tensor, nn

from allora_kernels import reference

from .judging import expectation, fault

TOLERANCES = {"ours": 2.0, "ours-fp32": 2.0, "peft": 8.0, "peft-fp32": 8.0}
"""How many times plain torch's error a variant's gradients may have, as in the section "layer"; others are not compared."""

_COMPILED = 0.25
"""How far compiled gradients may be from uncompiled ones, over these: the roundings of a whole model lie between them."""


def gradient_fault(step, variant: str, compiled: bool) -> str | None:
    """What is wrong with the gradients that `step` (a `model.Step`) gives the adapters of the first and the last adapted layer,
    in words; None if nothing is. No adapter is changed."""
    if variant not in TOLERANCES:
        return None
    layers = [module for module in step.model.modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]
    watched = {"first": layers[0], "last": layers[-1]}
    with torch.compiler.set_stance("force_eager" if compiled else "default"):
        seen = _seen(step, list(watched.values()))
    plain = {name: [p.grad for p in _factors(layer)] for name, layer in watched.items()}
    for name, layer in watched.items():
        found = _fault(layer, *seen[layer], plain[name], TOLERANCES[variant])
        if found is not None:
            return f"of the {name} adapted layer {found}"
    if compiled:
        step.backward()
        for name, layer in watched.items():
            for factor, p, other in zip("AB", _factors(layer), plain[name]):
                distance = (p.grad.float() - other.float()).norm() / other.float().norm()
                if not distance <= _COMPILED:
                    return f"of the {name} adapted layer the compiled d{factor} is {distance:.2g} from the eager one"
    return None


def _seen(step, layers: list[nn.Module]) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Each layer's x and upstream gradient, as rows, in one forward and backward pass."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(layer: nn.Module, args: tuple, y: Tensor) -> None:
        x = args[0].detach()
        if y.requires_grad:
            y.register_hook(lambda g: seen.__setitem__(layer, (x.flatten(0, -2), g.flatten(0, -2))))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        step.backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A and lora_B of this library's layer, or of PEFT's."""
    if isinstance(layer.lora_A, nn.ModuleDict):
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.lora_A, layer.lora_B


@torch.no_grad()
def _fault(layer: nn.Module, x: Tensor, g: Tensor, grads: list[Tensor], tolerance: float) -> str | None:
    a, b = _factors(layer)
    # PEFT's layers have no rule: theirs is plain LoRA.
    norm, eta = getattr(layer, "norm", None), getattr(layer, "eta", 1.0)

    def by_formula(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        own_x, own_g, own_a, own_b = (t if dtype is None else t.to(dtype) for t in (x, g, a, b))
        s = reference.down_project(own_x, own_a, torch.promote_types(own_x.dtype, own_a.dtype))
        c = None if norm is None else reference.weight_coefficient(own_a, own_b, eta, norm)
        return reference.adapter_grads(own_g, own_x, s, own_b, c, eta, norm, False, own_a.dtype, own_b.dtype)[1:]

    return fault(expectation(("dA", "dB"), by_formula(None), by_formula(torch.float64)), grads, tolerance)
