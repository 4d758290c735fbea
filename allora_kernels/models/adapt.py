"""Put ALLoRA adapters on a model's linear layers, and merge them back into plain ones."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..layer.functional import check_rule
from ..layer.linear import FusedALLoRALinear
from .selection import (
    check_unadapted,
    clean_name,
    find_saved,
    matches_end,
    module_slots,
    nothing_matches,
    pattern_value,
    select_layers,
    some,
    unwrap,
)

_SAVED_WHOLE = "_allora_saved_whole"
# What makes torch's encoder modules read their linears' weights themselves in eval mode, past any adapter.
_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_FAST_PATH_BEFORE = "_allora_fast_path_before"


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

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        lines = [
            f"{len(self.adapted)} layers adapted: {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        ]
        for (name, (n, k, r)), count in grouped(self.adapted).items():
            lines.append(f"  {count} x {name} [{n}, {k}], r={r}")
        if self.modules_to_save:
            lines.append(f"trained and saved whole: {', '.join(self.modules_to_save)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone:")
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


def apply_allora(
    model: nn.Module,
    r: int = 16,
    eta: float = 2.0,
    norm: str | None = "row",
    target_modules: str | Collection[str] = "all-linear",
    exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    rank_pattern: Mapping[str, int] | None = None,
) -> AdaptReport:
    """Replace the linear layers of `model` that `target_modules` names by `FusedALLoRALinear`s, in place.

    Everything else is frozen, except `modules_to_save`. The new layers share the frozen weights, so the model computes
    what it did before until it is trained. A layer that hangs in the model under several names is adapted once, and
    stays shared. Arguments named as in PEFT mean what they mean there.

    Args:
        model: any `nn.Module`; layers of type `nn.Linear` and transformers' Conv1D are adapted.
        r, eta, norm: rank and ALLoRA rule, as in `FusedALLoRALinear`.
        target_modules: ``"all-linear"`` (all but the output head of a language model and the classification head of a
            ``...ForSequenceClassification``); a list of names, each matching a module of that full name or that ends in
            ``"." + name``; or a regular expression that must match the full name.
        exclude_modules: modules to leave out, as a list or a regular expression in the same way.
        modules_to_save: modules to train and save whole, with all they contain. As in PEFT a name matches every module
            whose full name ends in it (``"classifier"`` also matches ``"pre_classifier"``). Their parameters keep
            their dtype.
        autocast_adapter_dtype: on a float16 or bfloat16 layer, make the adapter float32 (else the layer's dtype).
        rank_pattern: regular expression of a module's name, or of its end: rank, where it is not r. The first that
            matches counts.

    Returns:
        AdaptReport: what was replaced, and what was left alone and why: quantized layers, layers with a forward pass of
        their own, and layers whose weight another module reads directly (as `nn.MultiheadAttention` does), where an
        adapter would be passed by without a word.

    Raises:
        ValueError: nothing matches; the model is itself a linear layer, already has adapters, or is wrapped for
            distributed training; a name in `modules_to_save` or a pattern in `rank_pattern` matches nothing; a module
            to save shares a parameter with one that is not saved; an invalid regular expression; r, eta or norm out
            of range. The model is untouched then.
        TypeError: an argument of the wrong type. The model is untouched then.
    """
    check_rule(r, eta, norm)
    model = check_unadapted(model)
    saved = find_saved(model, modules_to_save)
    layers, skipped = select_layers(model, target_modules, exclude_modules, saved)
    if not layers:
        raise ValueError(nothing_matches(model, target_modules, skipped))
    ranks = {name: pattern_value(rank_pattern, name, r, "rank_pattern") for name in layers}
    for key, rank in (rank_pattern or {}).items():
        try:
            check_rule(rank, eta, norm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"rank_pattern[{key!r}]: {error}") from None
        if not any(matches_end(key, name, "rank_pattern") for name in layers):
            raise ValueError(f"rank_pattern[{key!r}] matches none of the layers to adapt: {some(layers)}")
    attach(model, layers, ranks, eta, norm, saved, autocast_adapter_dtype)
    return report(model, skipped)


def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every `FusedALLoRALinear` in `model` by the plain layer with weight ``W + BA``, in place.

    A transformers Conv1D becomes a Conv1D again. Weights are summed in float32 or wider and rounded to their dtype; the
    frozen weights themselves are not written to. Merge for inference or export, not to train on.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no adapters, or is itself a `FusedALLoRALinear` (use its `merge()`).
    """
    root = unwrap(model)
    layers = adapter_layers(root)
    if not layers:
        raise ValueError("the model has no adapters to merge")
    if root in layers.values():
        raise ValueError("the model is itself a FusedALLoRALinear, which cannot be replaced in place: use its merge()")
    slots = module_slots(root)
    while layers:
        # Each layer is let go of before the next is merged, so that at most one more weight is in memory than before.
        _, layer = layers.popitem()
        _put(slots.pop(layer), _plain(layer))
    _restore_fast_paths(root)
    for module in root.modules():
        module.__dict__.pop(_SAVED_WHOLE, None)
    return model


def adapter_layers(model: nn.Module) -> dict[str, FusedALLoRALinear]:
    """Every adapted layer of `model` by name. A layer that is shared appears once, under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedALLoRALinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A ``[r, K]`` and lora_B ``[N, r]`` of every adapted layer; without the parameters of `modules_to_save`."""
    return [p for layer in adapter_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `apply_allora` was told to train and save whole, by name."""
    return {clean_name(name): m for name, m in model.named_modules() if _SAVED_WHOLE in m.__dict__}


# --- replacing ------------------------------------------------------------------------------------------------------


def _put(slots: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, attribute in slots:
        setattr(parent, attribute, module)


def attach(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    eta: float,
    norm: str | None,
    saved: Mapping[str, nn.Module],
    autocast_adapter_dtype: bool = True,
) -> None:
    """Replace `layers` by adapted ones and freeze all but them and `saved`. On an error nothing has changed."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    adapted = {}
    try:
        for name, linear in layers.items():
            widen = autocast_adapter_dtype and linear.weight.dtype in (torch.float16, torch.bfloat16)
            adapted[linear] = FusedALLoRALinear.from_linear(
                linear, ranks[name], eta, norm, adapter_dtype=torch.float32 if widen else None
            )
    except BaseException:
        # Out of memory, most likely: the layers made so far have frozen their weights.
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
        raise
    slots = module_slots(model)
    for p, _ in flags:
        p.requires_grad_(False)
    for linear, layer in adapted.items():
        _put(slots[linear], layer)
    for module in saved.values():
        setattr(module, _SAVED_WHOLE, True)
        module.requires_grad_(True)
    leave_fast_paths(model, FusedALLoRALinear)


def report(model: nn.Module, skipped: Mapping[str, str] | None = None) -> AdaptReport:
    """The report on `model` as it is."""
    parameters = list(model.parameters())
    return AdaptReport(
        adapted={clean_name(n): (m.out_features, m.in_features, m.r) for n, m in adapter_layers(model).items()},
        modules_to_save=tuple(saved_modules(model)),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        skipped=dict(skipped or {}),
    )


def _plain(layer: FusedALLoRALinear) -> nn.Module:
    linear = layer.merge()
    if not layer.fan_in_fan_out:
        return linear
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(linear.weight.mT.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv.train(layer.training)


def leave_fast_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Make torch's encoder modules call their layers of class `adapted` in eval mode too, where they would read the weights."""
    for module in model.modules():
        for cls, attribute in _FAST_PATHS.items():
            value = getattr(module, attribute, None)
            if isinstance(module, cls) and value and any(isinstance(m, adapted) for m in module.modules()):
                setattr(module, _FAST_PATH_BEFORE, value)
                setattr(module, attribute, type(value)(0))


def _restore_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for cls, attribute in _FAST_PATHS.items():
            if isinstance(module, cls) and _FAST_PATH_BEFORE in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(_FAST_PATH_BEFORE))
