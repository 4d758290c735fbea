"""Which of a model's modules get an adapter, which are trained whole, and why the others do not."""

import difflib
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..layer import bases
from ..layer.adapter import ALLoRALayer
from ..layer.linear import computes_as_linear, is_conv1d
from ..layer.zero import whole_shape
from .experts import goes_through_registry
from .names import clean_name, matcher, module_names, module_slots, name_list, some, unwrap
from .weight_readers import use_of

ADAPTABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_unadapted(model: nn.Module) -> nn.Module:
    """`model` unwrapped; ValueError unless adapters can be put on it: it has none,
    its parameters exist, and it is no linear layer itself."""
    model, outermost = unwrap(model), model
    if isinstance(model, ALLoRALayer):
        raise ValueError(f"the model is itself a {type(model).__name__}, so it already has an adapter")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        adapted = "FusedALLoRALinear.from_linear" if bases.kind_of(model) is None else "WrappedALLoRALinear"
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: use {adapted}(linear)"
        )
    for name, module in outermost.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "ALLoRALayer" in kinds:
            raise ValueError(
                f"the model already has adapters (at {name}): merge_adapter(model) first, or "
                "add_adapter(model, name) for one more beside them"
            )
        if "BaseTunerLayer" in kinds:
            raise ValueError(f"the model already has PEFT adapters (at {name}): merge_and_unload() them first")
        check_no_wrapper(module)
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(f"{name} is not initialised yet: call the model on a batch first")
    return model


def check_no_wrapper(module: nn.Module) -> None:
    """ValueError where `module` itself is a wrapper that does not see adapters which are put into it."""
    if {cls.__name__ for cls in type(module).__mro__} & {"DistributedDataParallel", "FullyShardedDataParallel"}:
        raise ValueError(f"put adapters on the model before {type(module).__name__} wraps it, so that it sees them")


def find_saved(
    model: nn.Module, modules_to_save: Collection[str] | None, must_match: bool = True
) -> dict[str, nn.Module]:
    """The outermost modules whose name ends in one of `modules_to_save`, by name."""
    wanted = name_list(modules_to_save, "modules_to_save") if modules_to_save is not None else ()
    all_names = module_names(model)
    # An adapter's own name is the user's choice.
    named = {part for m in all_names if isinstance(m, ALLoRALayer) for part in m.modules() if part is not m}
    found = {
        ns[0]: m for m, ns in all_names.items() if m not in named and any(n.endswith(w) for n in ns for w in wanted)
    }
    inner = {child for module in found.values() for child in module.modules() if child is not module}
    found = {name: module for name, module in found.items() if module not in inner}
    for w in wanted if must_match else ():
        if not any(name.endswith(w) for names in all_names.values() for name in names):
            children = some([name for name, _ in model.named_children()])
            raise ValueError(f"modules_to_save: no module's name ends in {w!r}; the model's own parts are {children}")

    for name, top in found.items():
        for module in top.modules():
            if (kind := bases.kind_of(module)) is not None:
                raise ValueError(
                    f"modules_to_save: {name} has a {kind}, whose weight is quantized and cannot be trained"
                )
    inside = {module for top in found.values() for module in top.modules()}
    owner = {p: name for name, top in found.items() for p in top.parameters()}
    for p, name in owner.items():
        if not p.is_floating_point():
            raise ValueError(f"modules_to_save: {name} has a {p.dtype} parameter (quantized?), which cannot be trained")
    for module in model.modules():
        for key, p in module._parameters.items():
            if module not in inside and p is not None and p in owner:
                other = ".".join([*all_names.get(module, [])[:1], key])
                raise ValueError(
                    f"modules_to_save: {owner[p]} shares a parameter with {other} (tied weights), which would change "
                    "unsaved: name both modules, or untie them"
                )
    return found


def select_layers(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
    saved: Mapping[str, nn.Module],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """``(layers to adapt by name, {name of a module left alone: reason})``, see `apply_allora`."""
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    wanted = (lambda name: True) if everything else matcher(target_modules, "target_modules")
    excluded = matcher(exclude_modules if exclude_modules is not None else (), "exclude_modules")
    heads = _output_heads(model) if everything else {}
    in_saved = {module for top in saved.values() for module in top.modules()}
    all_names, slots = module_names(model), module_slots(model)

    layers, skipped = {}, {}
    for module, names in all_names.items():
        worth_a_word = not everything or looks_linear(module) or stacked_weights(module)
        if module in in_saved or not any(map(wanted, names)) or not worth_a_word:
            continue
        reason = "in exclude_modules" if any(map(excluded, names)) else heads.get(module) or obstacle(module, slots)
        if reason:
            skipped[names[0]] = reason
        else:
            layers[names[0]] = module
    for target, near in missing_targets(model, target_modules).items():
        skipped[target] = f"target_modules names it, but the model has no such module{near}"
    return layers, skipped


def missing_targets(
    model: nn.Module, target_modules: str | Collection[str] | None, or_parameters: bool = False
) -> dict[str, str]:
    """Each of a list of `target_modules` (`or_parameters`, 3-D ones) that no module's name is or ends in: what to say of it, as
    names it resembles."""
    if isinstance(target_modules, str) or target_modules is None:
        return {}
    names = {name for names in module_names(model).values() for name in names}
    dotted = [f".{name}" for name in names]
    stacked = [n for n, p in model.named_parameters(remove_duplicate=False) if len(whole_shape(p)) == 3]
    missing = {}
    for target in target_modules:
        if any(name.endswith(f".{target}") for name in dotted):
            continue
        if owner := next((n for n in stacked if f".{clean_name(n)}".endswith(f".{target}")), None):
            if not or_parameters:
                missing[target] = f": it is a 3-D parameter ({clean_name(owner)}), which target_parameters names"
            continue
        # Compared with the ends of names that have as many parts as what was written.
        parts = target.count(".") + 1
        ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
        near = [end for end in difflib.get_close_matches(target, ends, n=3) if not end.rpartition(".")[2].isdecimal()]
        missing[target] = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return missing


def _output_heads(model: nn.Module) -> dict[nn.Module, str]:
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    if head is not None:
        return {head: "output head, which all-linear leaves out"}
    if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
        return {}
    reason = "classification head, which all-linear leaves out (name it in modules_to_save to train it)"
    heads = [getattr(model, attribute, None) for attribute in ("score", "classifier")]
    return {module: reason for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def looks_linear(module: nn.Module) -> bool:
    """Also True for other libraries' (quantized) linear layers, so that they are reported and not forgotten."""
    sized = hasattr(module, "in_features") and hasattr(module, "out_features") and not module._modules
    return isinstance(module, nn.Linear) or is_conv1d(module) or sized


def stacked_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` itself that are stacks of weights, as of a mixture's experts: 3-D, and no convolution's."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.utils.parametrize.ParametrizationList)):
        return {}
    own = {name: (p, whole_shape(p)) for name, p in module._parameters.items() if p is not None}
    return {name: p for name, (p, shape) in own.items() if len(shape) == 3 and shape[0] > 1 and min(shape[1:]) > 1}


def obstacle(module: nn.Module, slots: Mapping[nn.Module, list[tuple[nn.Module, str]]]) -> str | None:
    """Why `module`, which hangs in `slots`, cannot be adapted; None where it can."""
    kind = type(module).__name__
    if bases.kind_of(module) is not None:
        # It goes on to run its own forward pass and hooks.
        return bases.obstacle_of(module) or _reader_of_weight(slots[module]) or _kept_in_list(module, slots[module])
    if stacked := stacked_weights(module):
        shapes = ", ".join(f"{name} {list(whole_shape(p))}" for name, p in stacked.items())
        remedy = (
            "unless asked for by experts=True"
            if goes_through_registry(module)
            else "here, as transformers does not dispatch it"
        )
        return f"{kind} holds stacks of weights as 3-D parameters ({shapes}), which get no adapter {remedy}"
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"{kind} is neither nn.Linear nor transformers' Conv1D"
    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype not in ADAPTABLE_DTYPES:
        return f"{kind} with a {str(weight.dtype).removeprefix('torch.')} weight (quantized)"
    if type(weight) is not nn.Parameter:
        return f"{kind} whose weight is no plain nn.Parameter (quantized, sharded, parametrized, or fake, of a FakeTensorMode)"
    if reason := _reader_of_weight(slots[module]) or _kept_in_list(module, slots[module]):
        return reason
    if hasattr(module, "_hf_hook"):
        return (
            f"{kind}: accelerate's hooks are on it (device_map, offloading), which the adapted layer would not run: load the "
            "model on one device"
        )
    own_forward = isinstance(module, nn.Linear) and not computes_as_linear(module)
    if own_forward or "forward" in module.__dict__:
        return f"{kind} with a forward pass of its own, which the adapted layer would not run"
    if bases.intercepted(module):
        return f"{kind} with hooks, which the adapted layer would not run: register them after the adapters"
    if 0 in whole_shape(weight):
        return f"{kind} with an empty weight"
    return None


def _reader_of_weight(slots: list[tuple[nn.Module, str]]) -> str | None:
    # Where one of several parents calls it, an adapter has an effect; a fused kernel that takes its weight may come any time.
    readers = [parent for parent, attribute in slots if _reads_weight_of(parent, attribute)]
    fused = [parent for parent, attribute in slots if _gives_weight_to_fused_kernel(parent, attribute)]
    if not fused and (not readers or len(readers) < len(slots)):
        return None
    return (
        f"{type((fused or readers)[0]).__name__} reads this layer's weight itself, so an adapter would have no effect"
    )


def _reads_weight_of(parent: nn.Module, attribute: str) -> bool:
    use = use_of(parent, attribute)
    return use.takes_weight and not use.may_call


def _gives_weight_to_fused_kernel(parent: nn.Module, attribute: str) -> bool:
    if isinstance(parent, nn.MultiheadAttention):
        return True
    # Mamba's kernels take these three weights where they run, and elsewhere the layers are called. State-space parameters
    # tell a Mamba mixer, whatever its class.
    if attribute not in ("x_proj", "dt_proj", "out_proj") or not {"A_log", "D"} <= parent._parameters.keys():
        return False
    use = use_of(parent, attribute)
    return use.takes_weight or not use.known


def _kept_in_list(module: nn.Module, slots: list[tuple[nn.Module, str]]) -> str | None:
    for parent, attribute in slots:
        # What can be called by its name is, and a list of it may be for other ends.
        for name, value in () if attribute.isidentifier() else parent.__dict__.items():
            if isinstance(value, (list, tuple)) and any(item is module for item in value):
                kind = type(parent).__name__
                return f"{kind} has this layer in a plain list too ({name}), where no adapted one would take its place"
    return None


def nothing_matches(model: nn.Module, target_modules, skipped: Mapping[str, str]) -> str:
    """The message for a `select_layers` that found no layer."""
    existing = [names[0] for module, names in module_names(model).items() if looks_linear(module)]
    if not existing:
        return f"target_modules={target_modules!r}: the model has no linear layers at all"
    because = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:6])
    return (
        f"target_modules={target_modules!r} leaves no layer to adapt{f' ({because})' if because else ''}. "
        f"The model's linear layers: {some(existing)}"
    )
