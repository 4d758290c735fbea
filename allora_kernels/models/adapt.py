"""Put ALLoRA adapters on a model's linear layers."""

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..layer.adapter import DEFAULT_ADAPTER, ALLoRALayer, CallState
from ..layer.bases import keep_backward, kind_of, let_pack, obstacle_of
from ..layer.functional import check_rule
from ..layer.linear import FusedALLoRALinear
from ..layer.wrapped import WrappedALLoRALinear
from .adapted import SAVED_WHOLE, AdaptReport, report
from .expert_selection import Stack, beside_experts, select_stacks
from .experts import put_adapters
from .head import watch_head
from .names import clean_name, matches_end, module_slots, pattern_value, some
from .saving import save_adapters_alone
from .selection import check_unadapted, find_saved, missing_targets, nothing_matches, select_layers

# What makes torch's encoder modules read their linears' weights themselves in eval mode, past any adapter.
_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_FAST_PATH_BEFORE = "_allora_fast_path_before"


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
    experts: bool = False,
    target_parameters: Collection[str] | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
) -> AdaptReport:
    """Replace the linear layers of `model` that `target_modules` names by `FusedALLoRALinear`s, in place.

    Everything else is frozen, except `modules_to_save`. The new layers share the frozen weights, so the model computes
    what it did before until it is trained. A layer that hangs in the model under several names is adapted once, and
    stays shared. Arguments named as in PEFT mean what they mean there.

    Args:
        model: any `nn.Module`; layers of type `nn.Linear` and transformers' Conv1D are adapted. So are bitsandbytes' Linear4bit
            and Linear8bitLt, torchao's weight-only nn.Linear and transformers' FP8Linear, by a `WrappedALLoRALinear` each.
        r: rank, as in `FusedALLoRALinear`.
        eta: η, as there.
        norm: the rule, as there.
        target_modules: ``"all-linear"`` (all but the output head of a language model and the classification head of a
            ``...ForSequenceClassification``); a list of names, each matching a module of that full name or that ends in
            ``"." + name``; or a regular expression that must match the full name.
        exclude_modules: modules to leave out, as a list or a regular expression in the same way.
        modules_to_save: modules to train and save whole, with all they contain. As in PEFT a name matches every module
            whose full name ends in it (``"classifier"`` also matches ``"pre_classifier"``). Their parameters keep
            their dtype.
        autocast_adapter_dtype: on a float16 or bfloat16 layer, make the adapter float32 (else the layer's dtype).
        rank_pattern: regular expression of a module's name, or of its end: rank, where it is not r. The first that
            matches counts. Of experts, the name is the parameter's.
        experts: also adapt all experts of a mixture that transformers keeps as 3-D parameters, a pair of factors each. The
            routers stay frozen. What a model without linear layers to adapt takes is ``target_modules=[]``.
        target_parameters: adapt these of them: names of parameters, or what such a name ends in after a dot, as
            ``["mlp.experts.down_proj"]``.
        adapter_name: what the adapter is called, where `add_adapter` puts others beside it.

    Returns:
        AdaptReport: what was replaced, and what was left alone and why: other quantized layers, layers with a forward pass of
        their own, stacks of weights in 3-D parameters (the experts of a mixture) with their share, and layers whose weight
        another module reads directly (as `nn.MultiheadAttention` does), where an adapter would be passed by without a word.
        A name in a list of `target_modules` that matches nothing is a warning, with the names it resembles.

    Raises:
        ValueError: nothing matches; the model is itself a linear layer, already has adapters, or is wrapped for
            distributed training; a name in `modules_to_save` or a pattern in `rank_pattern` matches nothing; a module
            to save shares a parameter with one that is not saved; an invalid regular expression; r, eta or norm out
            of range; experts that can get no adapter, where they were asked for; a layer of bitsandbytes, adapted or not, has
            lost its backward pass. The model is untouched then.
        TypeError: an argument of the wrong type. The model is untouched then.
    """
    check_rule(r, eta, norm)
    check_adapter_name(adapter_name)
    model = check_unadapted(model)
    saved = find_saved(model, modules_to_save)
    stacks, left_alone = select_stacks(model, experts, target_parameters, exclude_modules, saved)
    layers, skipped = select_layers(model, target_modules, exclude_modules, saved)
    if stacks:
        layers, skipped = beside_experts(model, target_modules, layers, skipped | left_alone, stacks)
    if not (layers or stacks):
        raise ValueError(nothing_matches(model, target_modules, skipped))
    ranks = ranks_of((*layers, *stacks), r, eta, norm, rank_pattern)
    for target, near in missing_targets(model, target_modules).items():
        warnings.warn(f"target_modules: the model has no module {target!r}{near}", stacklevel=2)
    for name, near in missing_targets(model, exclude_modules, or_parameters=True).items():
        warnings.warn(f"exclude_modules: the model has no module {name!r}{near}", stacklevel=2)
    attach(model, layers, ranks, eta, norm, saved, autocast_adapter_dtype, stacks, adapter_name)
    return report(model, skipped)


def ranks_of(
    layers: Collection[str], r: int, eta: float, norm: str | None, rank_pattern: Mapping[str, int] | None
) -> dict[str, int]:
    """The rank of each of `layers`, by name; ValueError or TypeError where `rank_pattern` is wrong or matches none of them."""
    ranks = {name: pattern_value(rank_pattern, name, r, "rank_pattern") for name in layers}
    for key, rank in (rank_pattern or {}).items():
        try:
            check_rule(rank, eta, norm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"rank_pattern[{key!r}]: {error}") from None
        if not any(matches_end(key, name, "rank_pattern") for name in layers):
            raise ValueError(f"rank_pattern[{key!r}] matches none of the layers to adapt: {some(layers)}")
    return ranks


def check_adapter_name(name: str) -> None:
    """ValueError or TypeError unless `name` can be an adapter's, which is a part of its parameters' names."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"an adapter's name must not be empty or contain a dot, got {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"an adapter cannot be called {name!r}, which is an attribute of torch.nn.ModuleDict: choose another"
        )


def check_gradients_pass(model: nn.Module, refuse: bool = True) -> None:
    """See to it that no quantized layer, with an adapter or without, gives the adapters in front of it a wrong gradient without
    a word.

    Args:
        refuse: whether a layer of bitsandbytes that has lost its backward pass is an error, as the model can be loaded anew; a
            warning says of kinds of layers that have none.
    """
    layers = {clean_name(name): module for name, module in model.named_modules() if kind_of(module) is not None}
    lost = {name: reason for name, module in layers.items() if (reason := obstacle_of(module))}
    refused = {name: reason for name, reason in lost.items() if refuse and reason.startswith("bitsandbytes ")}
    if not lost:
        return
    found = refused or lost
    where = f"{some(found)} to the adapters in front: {next(iter(found.values()))}"
    if refused:
        raise ValueError(f"no right gradient goes through {where}")
    warnings.warn(f"no right gradient goes through {where}", stacklevel=4)


# --- replacing ------------------------------------------------------------------------------------------------------


def put(slots: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Hang `module` at every (parent, attribute) of `slots`."""
    for parent, attribute in slots:
        setattr(parent, attribute, module)
        if attribute == "_orig_mod":
            # torch.compile(layer) goes on calling what it was given.
            parent._initialize()


def attach(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    eta: float,
    norm: str | None,
    saved: Mapping[str, nn.Module],
    autocast_adapter_dtype: bool = True,
    stacks: Mapping[str, Stack] = {},
    adapter_name: str = DEFAULT_ADAPTER,
) -> None:
    """Replace `layers` by adapted ones, put adapters on `stacks`, freeze all but them and `saved`; on an error, do nothing."""
    check_gradients_pass(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    adapted: dict[nn.Module, nn.Module] = {}
    on_experts: dict[nn.Module, dict[str, nn.Module]] = {}

    def dtype_for(layer: nn.Module | Stack) -> torch.dtype | None:
        widen = autocast_adapter_dtype and layer.weight.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if widen else None

    # Also of layers without an adapter, through which another's gradient goes.
    kept = [module for module in model.modules() if keep_backward(module)]
    try:
        for name, linear in layers.items():
            adapter = (ranks[name], eta, norm)
            make = FusedALLoRALinear.from_linear if kind_of(linear) is None else WrappedALLoRALinear
            adapted[linear] = make(linear, *adapter, adapter_dtype=dtype_for(linear))
        for name, stack in stacks.items():
            adapter = stack.new_adapter(ranks[name], eta, norm, dtype_for(stack))
            on_experts.setdefault(stack.module, {})[stack.parameter] = adapter
    except BaseException:
        # Out of memory, most likely: the layers made so far have frozen their weights.
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
        for module in kept:
            let_pack(module)
        raise
    slots = module_slots(model)
    for p, _ in flags:
        p.requires_grad_(False)
    for linear, layer in adapted.items():
        layer._state = CallState(adapter=adapter_name)
        put(slots[linear], layer)
    for module, adapters in on_experts.items():
        for adapter in adapters.values():
            adapter._state = CallState(adapter=adapter_name)
        put_adapters(module, nn.ModuleDict(adapters))
    for module in saved.values():
        setattr(module, SAVED_WHOLE, True)
        module.requires_grad_(True)
    leave_fast_paths(model, ALLoRALayer)
    save_adapters_alone(model)
    watch_head(model)
    _say_that_adapters_are_on_it(model)


def _say_that_adapters_are_on_it(model: nn.Module) -> None:
    """transformers' Trainer refuses a quantized model unless this attribute says so."""
    for module in model.modules():
        if getattr(module, "is_quantized", False) and hasattr(module, "_hf_peft_config_loaded"):
            module._hf_peft_config_loaded = True


def leave_fast_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Make torch's encoder modules call their layers of class `adapted` in eval mode too, where they would read the weights."""
    for module in model.modules():
        for cls, attribute in _FAST_PATHS.items():
            if not isinstance(module, cls):
                continue
            value = getattr(module, attribute, None)
            if value and any(isinstance(m, adapted) for m in module.modules()):
                setattr(module, _FAST_PATH_BEFORE, value)
                setattr(module, attribute, type(value)(0))


def restore_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths`."""
    for module in model.modules():
        for cls, attribute in _FAST_PATHS.items():
            if isinstance(module, cls) and _FAST_PATH_BEFORE in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(_FAST_PATH_BEFORE))
