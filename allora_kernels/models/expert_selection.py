"""Which stacks of a mixture's experts get adapters, and why the others do not."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..layer.adapter import ALLoRALayer
from ..layer.zero import whole_shape
from .experts import ADAPTERS, ExpertsAdapter, goes_through_registry
from .names import clean_name, is_excluded, module_names, name_list, some
from .selection import ADAPTABLE_DTYPES, stacked_weights


@dataclass(frozen=True)
class Stack:
    """One stack of weights: the parameter called `parameter` of the experts module `module`."""

    module: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        """The frozen parameter, stored ``[E, N, K]``, or ``[E, K, N]`` where the module is transposed."""
        return self.module._parameters[self.parameter]

    @property
    def adapter(self) -> ExpertsAdapter | None:
        """What adapts it, if anything does."""
        adapters = self.module._modules.get(ADAPTERS)
        return None if adapters is None or self.parameter not in adapters else adapters[self.parameter]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(E, N, K)``, whichever way it is stored."""
        experts, *sizes = whole_shape(self.weight)
        return experts, *(reversed(sizes) if self.module.is_transposed else sizes)

    def new_adapter(self, r: int, eta: float, norm: str | None, dtype: torch.dtype | None) -> ExpertsAdapter:
        """An adapter for it, which does nothing yet."""
        like = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        return ExpertsAdapter(self.sizes, self.module.is_transposed, r, eta, norm, **like)


def _parameters(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of a module that goes through the registry."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def obstacle_of_experts(module: nn.Module) -> str | None:
    """Why the stacks of `module` can get no adapter; None where they can."""
    kind = type(module).__name__
    if not goes_through_registry(module):
        return (
            f"the forward pass of {kind} does not go through transformers' registry of experts functions "
            "(use_experts_implementation), so no adapter would have an effect"
        )
    if getattr(module, "_is_expert_parallel", False):
        return f"{kind} is spread over processes (expert parallelism), which its adapters are not: not supported"
    if "forward" in module.__dict__:
        return f"{kind} with a forward pass of its own (offloaded, or spread over processes), past our entry in the registry"
    for name in _parameters(module):
        weight = module._parameters.get(name)
        if type(weight) is not nn.Parameter:
            return f"{kind} whose {name} is no plain nn.Parameter (quantized, sharded or parametrized)"
        if weight.dtype not in ADAPTABLE_DTYPES:
            return f"{kind} with a {str(weight.dtype).removeprefix('torch.')} {name} (quantized)"
        shape = whole_shape(weight)
        if len(shape) != 3 or shape[0] != module.num_experts:
            return f"{kind} whose {name} is {list(shape)}, no stack of {module.num_experts} experts"
    if module.num_experts == 1:
        return f"{kind} with one expert, for which PEFT's files have another layout"
    return None


def all_stacks(model: nn.Module) -> dict[str, Stack]:
    """Every stack of experts in `model` that can get or has an adapter, by the name of its parameter."""
    return {
        f"{names[0]}.{parameter}": Stack(module, parameter)
        for module, names in module_names(model).items()
        if stacked_weights(module) and obstacle_of_experts(module) is None
        for parameter in module._parameters
        if parameter in _parameters(module)
    }


def adapted_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of `model` that have adapters, by the name of their parameter."""
    return {
        f"{names[0]}.{parameter}": Stack(module, parameter)
        for module, names in module_names(model).items()
        if isinstance(adapters := module._modules.get(ADAPTERS), nn.ModuleDict)
        and all(isinstance(a, ALLoRALayer) for a in adapters.values())
        for parameter in module._parameters
        if parameter in adapters
    }


def select_stacks(
    model: nn.Module,
    experts: bool,
    target_parameters: Collection[str] | None,
    exclude_modules: str | Collection[str] | None,
    saved: Mapping[str, nn.Module],
) -> tuple[dict[str, Stack], dict[str, str]]:
    """``(stacks to adapt by the name of their parameter, {name of an experts module left alone: reason})``.

    Raises:
        ValueError: both `experts` and `target_parameters` are given; nothing can be adapted; an entry of `target_parameters`
            names no parameter, or one that can get no adapter.
        TypeError: an argument of the wrong type.
    """
    if not isinstance(experts, bool):
        raise TypeError(f"experts must be a bool, got {type(experts).__name__}")
    if target_parameters is None and not experts:
        return {}, {}
    if target_parameters is not None and experts:
        raise ValueError("experts=True adapts all experts and target_parameters names some: give one of them")
    stacks, in_saved = all_stacks(model), {module for top in saved.values() for module in top.modules()}
    all_names = module_names(model)
    excluded = {
        name: reason
        for name, s in stacks.items()
        if (reason := _why_excluded(all_names[s.module], s, exclude_modules, in_saved))
    }
    if experts:
        found = {name: stack for name, stack in stacks.items() if name not in excluded}
        skipped = {name.rpartition(".")[0]: reason for name, reason in excluded.items()} | _refused(model)
        if not found:
            raise ValueError(f"experts=True: {_nothing_to_adapt(model, skipped)}")
        return found, skipped
    found = {}
    for target in name_list(target_parameters, "target_parameters"):
        named = _parameters_called(model, target)
        if not named:
            raise ValueError(f"target_parameters: the model has no parameter {target!r}{_near(model, target)}")
        for name in named:
            if name not in stacks:
                raise ValueError(f"target_parameters: {target!r} names {name}: {_why_no_stack(model, name)}")
            if name in excluded:
                raise ValueError(f"target_parameters: {target!r} names {name}, which is {excluded[name]}")
            found[name] = stacks[name]
    # In the model's order, which is that of the files.
    return {name: stack for name, stack in stacks.items() if name in found}, {}


def _why_excluded(owners: list[str], stack: Stack, exclude_modules, in_saved: Collection[nn.Module]) -> str | None:
    """`owners`: the names of its module."""
    if stack.module in in_saved:
        return "trained whole (modules_to_save)"
    names = [*owners, *(f"{owner}.{stack.parameter}" for owner in owners)]
    return "in exclude_modules" if is_excluded(exclude_modules, names) else None


def _refused(model: nn.Module) -> dict[str, str]:
    """Modules that look like experts and can get no adapter: the reason."""
    return {
        names[0]: reason
        for module, names in module_names(model).items()
        if (stacked_weights(module) or goes_through_registry(module)) and (reason := obstacle_of_experts(module))
    }


def _nothing_to_adapt(model: nn.Module, skipped: Mapping[str, str]) -> str:
    if skipped:
        because = some([f"{name}: {reason}" for name, reason in skipped.items()], most=2, separator="; ")
        return f"the model's experts can get no adapters ({because})"
    kinds = (nn.ModuleList, nn.ModuleDict)
    several = [n for n, m in model.named_modules() if isinstance(m, kinds) and n.rpartition(".")[2] == "experts"]
    if several:
        return f"the experts of {clean_name(several[0])} are modules of their own, whose linear layers target_modules reaches"
    return "the model has no experts in 3-D parameters"


def _parameters_called(model: nn.Module, target: str) -> list[str]:
    """The parameters whose name is `target` or ends in it, as PEFT matches them: each module's, tied ones too, by its first
    name, whichever of its names it is that matches."""
    return [
        f"{names[0]}.{parameter}".removeprefix(".")
        for module, names in {model: [""], **module_names(model)}.items()
        for parameter, value in module._parameters.items()
        if value is not None and any(f".{name}.{parameter}".endswith(f".{target}") for name in names)
    ]


def _near(model: nn.Module, target: str) -> str:
    parts = target.count(".") + 1
    ends = sorted({".".join(name.split(".")[-parts:]) for name in all_stacks(model)})
    near = difflib.get_close_matches(target, ends, n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; the experts have {some(map(repr, ends))}" if ends else f": {_nothing_to_adapt(model, _refused(model))}"


def _why_no_stack(model: nn.Module, name: str) -> str:
    owner, _, parameter = name.rpartition(".")
    module = next(m for m, names in module_names(model).items() if owner in names) if owner else model
    if len(whole_shape(module._parameters[parameter])) < 3:
        return "only stacks of experts' weights get adapters this way; target_modules reaches linear layers"
    return obstacle_of_experts(module) or "it is not one of the experts' two projections"


def beside_experts(
    model: nn.Module,
    target_modules: str | Collection[str],
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
    stacks: Mapping[str, Stack],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """`layers` without the routers where "all-linear" found them, and `skipped` with these and without what is adapted."""
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    frozen = _routers(model) if everything else set()
    reasons = {
        n: "router of a mixture of experts, which stays frozen" for n, layer in layers.items() if layer in frozen
    }
    adapted = {name.rpartition(".")[0] for name in stacks}
    return (
        {name: layer for name, layer in layers.items() if name not in reasons},
        {name: reason for name, reason in (skipped | reasons).items() if name not in adapted},
    )


def _routers(model: nn.Module) -> set[nn.Module]:
    """The linear layers that choose the experts of a mixture, where a model has them as such: they stay frozen."""
    called = {"gate", "router"}
    return {
        module
        for block in model.modules()
        for experts in block.children()
        if goes_through_registry(experts)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        # All of a router beside the experts; further below, what chooses among as many.
        and (
            name.partition(".")[0] in called
            or (module.out_features == experts.num_experts and not called.isdisjoint(name.split(".")))
        )
    }
