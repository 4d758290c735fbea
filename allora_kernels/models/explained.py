"""`explain`: for every linear layer of a model, whether the kernels run it, by which plan, and why not."""

from dataclasses import dataclass

import torch
from torch import nn

from ..layer.adapter import ALLoRALayer
from ..layer.wrapped import WrappedALLoRALinear
from .adapted import grouped, layers_of, saved_modules
from .names import clean_name, module_slots, unwrap
from .saved_whole import ModuleOfEachAdapter
from .selection import looks_linear, obstacle


@dataclass(frozen=True)
class LayerExplanation:
    """One linear layer: ``shape`` is (out_features, in_features), of experts (E, out_features,
    in_features); `r` None where it has no adapter."""

    shape: tuple[int, ...]
    r: int | None
    fused: bool
    """Whether the kernels run it, the frozen product too."""
    reason: str
    """Why they do, or what runs instead and why."""
    plan: tuple[tuple[str, str], ...] = ()
    """What runs each step, where the kernels do."""

    def __str__(self) -> str:
        rank = "no adapter" if self.r is None else f"r={self.r}"
        return f"{list(self.shape)}, {rank}, {'fused' if self.fused else 'not fused'}: {self.reason}"


@dataclass(frozen=True)
class ModelExplanation:
    """`layers` by name. `str()` of it has a line a kind of layer, and each plan once."""

    layers: dict[str, LayerExplanation]

    @property
    def summary(self) -> str:
        """One line: how many layers are fused, adapted without being fused, and plain."""
        adapted = [layer for layer in self.layers.values() if layer.r is not None]
        fused = sum(layer.fused for layer in adapted)
        plain = len(self.layers) - len(adapted)
        return f"{fused} of {len(adapted)} adapted layers fused; {plain} linear layers without an adapter"

    def grouped(self) -> list[tuple[int, str, LayerExplanation]]:
        """(how many, their name with * for numbers, what they have in common)."""
        return [(count, name, layer) for (name, layer), count in grouped(self.layers).items()]

    @property
    def plans(self) -> list[tuple[tuple[str, str], ...]]:
        """The different plans, in the order of the layers."""
        return list(dict.fromkeys(layer.plan for layer in self.layers.values() if layer.plan))

    def __str__(self) -> str:
        lines, plans = [self.summary], self.plans
        for count, name, layer in self.grouped():
            note = f" (plan {plans.index(layer.plan) + 1})" if layer.plan else ""
            lines.append(f"  {count} x {name} {layer}{note}")
        for number, plan in enumerate(plans, start=1):
            lines.append(f"plan {number}:")
            lines += [f"  {step}: {what}" for step, what in plan]
        return "\n".join(lines)


def explain(model: nn.Module, rows: int = 2048, device: torch.device | str | None = None) -> ModelExplanation:
    """What a call of each linear layer of `model` takes, for inputs of `rows` rows.

    Args:
        model: with or without adapters.
        rows: M, the tokens of a batch.
        device: where the calls would run; None for where each layer is. A model on the meta device costs no memory.

    Raises:
        ValueError: the model has no linear layer or is PEFT's, `rows` is below 1, `device` is a GPU that torch does not see, or
            inside `adapter_rows`.
        TypeError: `model` is no nn.Module.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    root = unwrap(model)
    if any(isinstance(m, ALLoRALayer) and m._state.rows is not None for m in root.modules()):
        raise ValueError(
            "inside adapter_rows layers call multi_adapter_linear, which is not explained: explain outside"
        )
    if any(cls.__name__ == "BaseTunerLayer" for module in root.modules() for cls in type(module).__mro__):
        raise ValueError("the model has PEFT's adapters: allora_kernels.integrations.peft.explain(model) tells of them")
    device = None if device is None else torch.device(device)
    slots = module_slots(root) | {root: []}
    of_each = [module for module in root.modules() if isinstance(module, ModuleOfEachAdapter)]
    saved = {module for top in (*saved_modules(root).values(), *of_each) for module in top.modules()}
    # A wrapped layer is told of with its adapter.
    inside = {layer.base_layer for layer in root.modules() if isinstance(layer, WrappedALLoRALinear)}
    names = {layer: name for name, layer in layers_of(root).items()}
    layers = {}
    for name, module in root.named_modules():
        if module in inside:
            continue
        if isinstance(module, ALLoRALayer):
            found = module.explain(rows, device)
            reason = found.reason if found.own_product is None else found.why(module.base_kind)
            if len(module.adapter_names) > 1:
                reason = f"{reason}; adapter {module.adapter_name!r} of {len(module.adapter_names)}"
            plan = tuple(found.plan.items()) if found.backend == "triton" else ()
            shape = (*((module.experts,) if module.grouped else ()), module.out_features, module.in_features)
            layers[names[module]] = LayerExplanation(shape, module.r, found.fused, reason, plan)
        elif looks_linear(module):
            if module in saved:
                reason = "trained whole (modules_to_save)"
            else:
                reason = obstacle(module, slots) or "no adapter was put on it"
            layers[clean_name(name)] = LayerExplanation(_shape(module), None, False, reason)
    if not layers:
        raise ValueError("the model has no linear layers to explain")
    return ModelExplanation(layers)


def _shape(module: nn.Module) -> tuple[int, int]:
    # transformers' Conv1D names its sizes otherwise.
    return getattr(module, "out_features", None) or module.nf, getattr(module, "in_features", None) or module.nx
