"""Merging adapters into plain layers, and taking that back."""

import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ..layer.adapter import ALLoRALayer
from ..layer.wrapped import WrappedALLoRALinear
from .adapt import leave_fast_paths, put, restore_fast_paths
from .adapted import SAVED_WHOLE, active_adapter, adapter_layers, adapter_names
from .expert_selection import adapted_stacks
from .experts import (
    dtypes_before_merging,
    experts_with_adapters,
    forget_merged,
    merge_experts,
    merged_experts,
    unmerge_experts,
)
from .names import module_slots, unwrap
from .saved_whole import ModuleOfEachAdapter
from .saving import save_adapters_alone, save_models_again
from .sharded import cut_up_by

_BEFORE_MERGING = "_allora_before_merging"
"""Attribute of a merged layer: the adapted one and its weight's dtype in a tuple, which keeps it out of the model's modules. Of
a module saved whole: an empty one."""

_EACH_BEFORE_MERGING = "_allora_each_before_merging"
"""Attribute of the active adapter's copy of a module saved whole: what had all copies, in a tuple."""


def merge_adapter(model: nn.Module, *, keep: bool = False) -> nn.Module:
    """Replace every `FusedALLoRALinear` in `model` by the plain layer with weight ``W + BA`` (of several adapters, the active
    one's), in place; likewise the parameters of experts with adapters, whose modules stay and run the implementation that the
    config names again.

    A transformers Conv1D becomes a Conv1D again. Weights are summed in float32 or wider and rounded to their dtype; the
    frozen weights themselves are not written to. Merge for inference or export, not to train on.

    Args:
        model: a model with adapters.
        keep: keep the adapted layers beside the merged ones, for `unmerge_adapter`. Costs the memory of the frozen weights.
            What an earlier merge kept is let go of.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no adapters, several of them without `keep`, a disabled one or one on a quantized layer; it is
            in `adapter_rows`, cut up by FSDP, tensor parallelism or DeepSpeed's ZeRO-3, or is itself a `FusedALLoRALinear` (use
            its `merge()`). The model is untouched then.
    """
    root = unwrap(model)
    layers = adapter_layers(root)
    if not layers:
        raise ValueError("the model has no adapters to merge")
    if root in layers.values():
        raise ValueError(
            f"the model is itself a {type(root).__name__}, which cannot be replaced in place: use its merge()"
        )
    if wrapped := [(name, layer) for name, layer in layers.items() if isinstance(layer, WrappedALLoRALinear)]:
        name, layer = wrapped[0]
        raise ValueError(f"{name}: {layer.why_it_cannot_merge}")
    if by := cut_up_by(model):
        raise ValueError(
            f"the model's parameters are cut up by {by}: save_adapter, load it in one process, and merge there"
        )
    if disabled := [name for name, layer in layers.items() if not layer.enabled]:
        raise ValueError(
            f"{disabled[0]} is disabled, so W + BA is not what the model computes: set_enabled(model, True) before merging"
        )
    names = adapter_names(root)
    if len(names) > 1 and not keep:
        raise ValueError(
            f"the model has adapters {', '.join(map(repr, names))}, and merging one would lose the others: remove_adapter "
            "them, or merge_adapter(model, keep=True), which keeps them all for unmerge_adapter"
        )
    if any(layer._state.rows is not None for layer in layers.values()):
        raise ValueError("inside adapter_rows W + BA is not what the model computes: merge outside")
    active_adapter(root)
    _warn_of_ties(root, layers)
    for module in root.modules():
        # Of a merge before this one nothing can be put back any more.
        for kept in (_BEFORE_MERGING, _EACH_BEFORE_MERGING):
            module.__dict__.pop(kept, None)
        forget_merged(module)
    save_models_again(root)
    slots = module_slots(root)
    layers = {name: layer for name, layer in layers.items() if not layer.grouped}
    for experts in experts_with_adapters(root).values():
        merge_experts(experts, keep)
    while layers:
        # Each layer is let go of before the next is merged, so that at most one more weight is in memory than before.
        _, layer = layers.popitem()
        merged = _plain(layer)
        if keep:
            setattr(merged, _BEFORE_MERGING, (layer, layer.weight.dtype))
        put(slots.pop(layer), merged)
    restore_fast_paths(root)
    for each in [module for module in root.modules() if isinstance(module, ModuleOfEachAdapter)]:
        # There are several adapters, so they are kept.
        setattr(each.active, _EACH_BEFORE_MERGING, (each,))
        put(slots[each], each.active)
    for module in root.modules():
        if module.__dict__.pop(SAVED_WHOLE, None) and keep:
            setattr(module, _BEFORE_MERGING, ())
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Put back, in place, the adapted layers that ``merge_adapter(model, keep=True)`` replaced: frozen weights and adapters as
    they were, bit for bit. What was done to the merged weights since is dropped; where they were moved to, the layers follow.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no layers merged with ``keep=True``, has adapters of its own, or was cast to another dtype
            since. The model is untouched then.
    """
    root = unwrap(model)
    if adapter_layers(root):
        raise ValueError("the model has adapters, so they are not merged")
    found = {name: m for name, m in root.named_modules() if _BEFORE_MERGING in m.__dict__}
    merged = {name: m for name, m in found.items() if m.__dict__[_BEFORE_MERGING]}
    experts = merged_experts(root)
    if not (merged or experts):
        raise ValueError("nothing to unmerge: only merge_adapter(model, keep=True) keeps what that takes")
    dtypes = {name: (m.__dict__[_BEFORE_MERGING][1], m.weight.dtype) for name, m in merged.items()}
    for name, (before, now) in (dtypes | {name: dtypes_before_merging(m) for name, m in experts.items()}).items():
        if before != now:
            raise ValueError(f"{name} was {before} when it was merged and is {now} now: cast the model back")
    for module in experts.values():
        unmerge_experts(module)
    slots = module_slots(root)
    for module in merged.values():
        layer, _ = module.__dict__[_BEFORE_MERGING]
        put(slots[module], layer.to(module.weight.device).train(module.training))
    for module in found.values():
        if not module.__dict__.pop(_BEFORE_MERGING):
            setattr(module, SAVED_WHOLE, True)
    for module in [module for module in root.modules() if _EACH_BEFORE_MERGING in module.__dict__]:
        (each,) = module.__dict__.pop(_EACH_BEFORE_MERGING)
        put(slots[module], each)
        for other in each.copies.values():
            other.to(next(module.parameters()).device)
    leave_fast_paths(root, ALLoRALayer)
    save_adapters_alone(root)
    return model


def _warn_of_ties(root: nn.Module, layers: Mapping[str, ALLoRALayer]) -> None:
    if not getattr(getattr(root, "config", None), "tie_word_embeddings", False):
        return
    owners = Counter(p for module in root.modules() for p in module._parameters.values() if p is not None)
    frozen = {name: layer.weight for name, layer in layers.items() if not layer.grouped}
    frozen |= {name: stack.weight for name, stack in adapted_stacks(root).items()}
    if tied := [name for name, weight in frozen.items() if owners[weight] > 1]:
        warnings.warn(
            f"{tied[0]} shared its weight with another module and has one of its own now, but config.tie_word_embeddings "
            "is still True: tie_weights() and resize_token_embeddings() would tie it again and lose the adapter; set it "
            "False first",
            stacklevel=3,
        )


def _plain(layer: ALLoRALayer) -> nn.Module:
    linear = layer.merge()
    if not layer.fan_in_fan_out:
        return linear
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(linear.weight.mT.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv.train(layer.training)
