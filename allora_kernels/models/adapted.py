"""What is adapted in a model: its adapters, the modules saved whole, and the report on them."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..layer import bases
from ..layer.adapter import DEFAULT_ADAPTER, ALLoRALayer, NamedAdapter
from ..layer.wrapped import WrappedALLoRALinear
from ..layer.zero import whole_shape
from .experts import ADAPTERS
from .names import clean_name, some
from .saved_whole import ModuleOfEachAdapter
from .selection import stacked_weights

SAVED_WHOLE = "_allora_saved_whole"
"""Attribute of a module that `apply_allora` was told to train and save whole."""


@dataclass(frozen=True)
class AdaptReport:
    """What is adapted in a model, and what is not and why. `str()` of it is meant to be read."""

    adapted: dict[str, tuple[int, int, int]]
    """Name of each adapted layer: its (out_features, in_features, r)."""
    modules_to_save: tuple[str, ...]
    """Names of the modules trained and saved whole."""
    trainable: int
    """Number of trainable parameters."""
    total: int
    """Number of parameters of the whole model, adapters included."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name of each module that was asked for, or is linear, and left alone: the reason."""
    stacked: int = 0
    """Number of parameters, of those left alone, in stacks of weights (3-D), as of the experts of a mixture."""
    experts: dict[str, int] = field(default_factory=dict)
    """Of `adapted`, each name that is a parameter with the weights of a mixture's experts: how many they are."""
    bases: dict[str, str] = field(default_factory=dict)
    """Name of each adapted layer whose frozen product another library computes: what does."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters; `adapted` describes the active one."""
    active: str | None = None
    """The name of the active adapter; None where there is none."""

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        lines = [
            f"{len(self.adapted)} layers adapted: {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        ]
        sizes = {name: f"{self.experts[name]} experts of " if name in self.experts else "" for name in self.adapted}
        described = {
            name: f"{sizes[name]}[{n}, {k}], r={r}{f', on {self.bases[name]}' if name in self.bases else ''}"
            for name, (n, k, r) in self.adapted.items()
        }
        for (name, description), count in grouped(described).items():
            lines.append(f"  {count} x {name} {description}")
        if len(self.adapters) > 1:
            others = ", ".join(name for name in self.adapters if name != self.active)
            lines.append(f"adapter {self.active} is active, beside {others}")
        if self.modules_to_save:
            lines.append(f"trained and saved whole: {', '.join(self.modules_to_save)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone:")
        if self.stacked:
            lines.append(
                f"  in 3-D parameters, as of experts: {self.stacked:,} parameters, {self.stacked / self.total:.2%} of all"
            )
        for (name, reason), count in grouped(self.skipped).items():
            lines.append(f"  {count} x {name}: {reason}")
        return "\n".join(lines)


def grouped(entries: Mapping) -> dict[tuple, int]:
    """The entries that differ only in their layer numbers, counted."""
    counts: dict[tuple, int] = {}
    for name, value in entries.items():
        key = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), value)
        counts[key] = counts.get(key, 0) + 1
    return counts


def adapter_layers(model: nn.Module) -> dict[str, ALLoRALayer]:
    """Every adapted layer of `model` by name. A layer that is shared appears once, under its first name. What adapts a stack of
    experts is called ``<experts module>.allora.<parameter>`` and has `grouped` set."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ALLoRALayer)}


def layers_or_raise(model: nn.Module) -> dict[str, ALLoRALayer]:
    """`adapter_layers`, of which there is one at least.

    Raises:
        ValueError: there is none.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: apply_allora(model) first")
    return layers


def layers_of(model: nn.Module) -> dict[str, ALLoRALayer]:
    """The adapted layers of `model` by the names of what they adapt: a layer, or of experts a parameter."""
    return {
        clean_name(name).replace(f".{ADAPTERS}.", ".") if layer.grouped else clean_name(name): layer
        for name, layer in adapter_layers(model).items()
    }


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters of `model`, in the order in which they were added; empty where it has none.

    Raises:
        ValueError: its layers do not all have the same ones.
    """
    layers = adapter_layers(model)
    names = {layer.adapter_names: name for name, layer in layers.items()}
    if len({frozenset(found) for found in names}) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        raise ValueError(
            f"{first} has adapters {list(one)} and {second} has {list(other)}: all layers must have the same"
        )
    return next(iter(names), ())


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that `model` computes with, outside of `adapter_rows`.

    Raises:
        ValueError: it has none, or its layers have different ones active.
    """
    active = {layer.adapter_name: name for name, layer in layers_or_raise(model).items()}
    if len(active) > 1:
        (one, first), (other, second) = list(active.items())[:2]
        raise ValueError(
            f"adapter {one!r} is active in {first} and {other!r} in {second}: set_adapter(model, name) first"
        )
    return next(iter(active))


def known_adapter(model: nn.Module, name: str) -> str:
    """`name`, where `model` has an adapter called so.

    Raises:
        ValueError: it has not; says what it has, and which of those resembles it.
        TypeError: `name` is no str.
    """
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {type(name).__name__}")
    layers_or_raise(model)
    names = adapter_names(model)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the model has no adapter {name!r}, only {some([repr(n) for n in names])}{hint}")
    return name


def chosen_adapter(model: nn.Module, name: str | None, call: str) -> str:
    """`name`, or where it is None the only adapter's.

    Raises:
        ValueError: the model has several and `name` is None: says that `call` needs it.
    """
    if name is not None:
        return known_adapter(model, name)
    names = adapter_names(model)
    if len(names) > 1:
        raise ValueError(f"the model has adapters {', '.join(map(repr, names))}: say which one, {call}")
    return known_adapter(model, names[0]) if names else DEFAULT_ADAPTER


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """lora_A ``[r, K]`` and lora_B ``[N, r]`` of every adapted layer, of experts ``[E, r, K]`` and ``[E, N, r]``, for an
    optimizer; without the parameters of `modules_to_save`.

    Args:
        model: a model with adapters, or without (then the list is empty).
        adapter: the name of one; None for all that the model has.

    Raises:
        ValueError: there is no adapter of that name.
    """
    return [p for own in _adapters_of(model, adapter) for p in (own.lora_A, own.lora_B)]


def adapter_parameter_groups(
    model: nn.Module, lr: float, *, loraplus_lr_ratio: float = 1.0, adapter: str | None = None
) -> list[dict[str, Any]]:
    """`adapter_parameters` as two groups for a torch optimizer: every lora_A at `lr`, every lora_B at
    ``loraplus_lr_ratio * lr``, as LoRA+ has it (arXiv 2402.12354, which calls the ratio λ).

    Args:
        model: a model with adapters.
        lr: the learning rate of lora_A, > 0.
        loraplus_lr_ratio: > 0; 1 for one learning rate, 16 is common. With a larger one, `lr` is to be a smaller one.
        adapter: the name of one; None for all that the model has.

    Raises:
        ValueError: a number is not finite and positive, the model has no adapters, or none of that name.
        TypeError: a number is no number.
    """
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    own = _adapters_of(model, adapter)
    if not own:
        raise ValueError(
            "the model has no adapters: apply_allora(model) first; for a PeftModel there is "
            "peft.optimizers.create_loraplus_optimizer"
        )
    return [
        {"params": [factors.lora_A for factors in own], "lr": lr},
        {"params": [factors.lora_B for factors in own], "lr": lr * loraplus_lr_ratio},
    ]


def _adapters_of(model: nn.Module, adapter: str | None) -> list[NamedAdapter]:
    if adapter is not None:
        known_adapter(model, adapter)
    return [
        layer.adapter(name)
        for layer in adapter_layers(model).values()
        for name in ([adapter] if adapter is not None else layer.adapter_names)
    ]


def saved_modules(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Module]:
    """The modules that `apply_allora` was told to train and save whole, by name; of several adapters, `adapter`'s (None: the
    active one's)."""
    found, inside = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, ModuleOfEachAdapter):
            inside.update(module.copies.values())
            found[clean_name(name)] = module.active if adapter is None else module.copies[adapter]
        elif SAVED_WHOLE in module.__dict__ and module not in inside:
            found[clean_name(name)] = module
    return found


def report(model: nn.Module, skipped: Mapping[str, str] | None = None) -> AdaptReport:
    """The report on `model` as it is."""
    parameters = list(model.parameters())
    layers = layers_of(model)
    return AdaptReport(
        adapted={name: (layer.out_features, layer.in_features, layer.r) for name, layer in layers.items()},
        experts={name: layer.experts for name, layer in layers.items() if layer.grouped},
        modules_to_save=tuple(saved_modules(model)),
        trainable=sum(whole_shape(p).numel() for p in parameters if p.requires_grad),
        total=sum(map(bases.numel, parameters)),
        skipped=dict(skipped or {}),
        stacked=_stacked(model, skipped or {}),
        bases={name: layer.base_kind for name, layer in layers.items() if isinstance(layer, WrappedALLoRALinear)},
        adapters=adapter_names(model),
        active=active_adapter(model) if layers else None,
    )


def _stacked(model: nn.Module, skipped: Mapping[str, str]) -> int:
    left_alone = {
        p for name, m in model.named_modules() if clean_name(name) in skipped for p in stacked_weights(m).values()
    }
    return sum(p.numel() for p in left_alone)
