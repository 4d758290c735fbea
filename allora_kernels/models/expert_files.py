"""The adapters of experts in PEFT's files, where they are those of `target_parameters`.

PEFT wraps a module once for each adapted parameter, so of two parameters of a module the first is called ``base_layer``. Its
lora_A ``[E·r, K]`` runs over experts slowest, as ours does, but its lora_B ``[N, r·E]`` over experts fastest.
"""

import sys
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor, nn

from ..layer.adapter import FACTORS, ALLoRALayer
from .adapter_files import PREFIX, factor_key
from .expert_selection import Stack
from .experts import ExpertsAdapter

_FORMER_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""The last parts of names that PEFT 0.21 takes for those of experts as transformers 4 had them, by the kind of mixture."""


def misread_by_others(root: nn.Module, layers: Mapping[str, ALLoRALayer], stacks: Mapping[str, Stack]) -> list[str]:
    """The names of those of `layers`, `stacks` among them, whose adapters PEFT and transformers put elsewhere or nowhere when
    they read them, as they take their names for older checkpoints': a mixture's dense layers and shared experts are called as
    the experts once were, and what renames parameters may match names that are new already."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    conversions = sys.modules.get("transformers.conversion_mapping")
    kinds = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})
    ends = _FORMER_EXPERTS.get("mixtral" if kind == "mixtral" else kinds.get(kind), ())
    renamings, in_file = _renamings(root, kind, conversions), file_names(stacks)
    return [
        name
        for name, layer in layers.items()
        if (not layer.grouped and name.rpartition(".")[2] in ends) or _is_renamed(in_file.get(name, name), renamings)
    ]


def _renamings(root: nn.Module, kind: str | None, conversions: ModuleType | None) -> list:
    """What PEFT renames a file's tensors by, for models of this kind."""
    if conversions is None or not hasattr(root, "base_model_prefix"):
        return []
    if conversions.get_checkpoint_conversion_mapping(kind) is None:
        return []
    found = conversions.get_model_conversion_mapping(root)
    return [conversion for conversion in found if isinstance(conversion, conversions.WeightRenaming)]


def _is_renamed(name: str, renamings: list) -> bool:
    """Whether PEFT puts the adapter on another place than `name`: a prefix that it takes away, it puts back."""
    key = f"{name}.lora_A.default.weight"
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return not (PREFIX + factor_key(name, "lora_A")).endswith("".join(key.rsplit(".default", 1)))


def file_names(stacks: Mapping[str, Stack]) -> dict[str, str]:
    """What PEFT calls each of `stacks`, which are in the order of their modules' parameters."""
    owners = {name: name.rpartition(".")[0] for name in stacks}
    names, wrappers = {}, dict.fromkeys(owners.values(), 0)
    for name in reversed(stacks):
        owner = owners[name]
        names[name] = owner + ".base_layer" * wrappers[owner]
        wrappers[owner] += 1
    return names


def to_file(adapter: ExpertsAdapter, factor: str, value: Tensor) -> Tensor:
    """PEFT's ``[E·r, K]`` of our lora_A ``[E, r, K]``, or ``[N, r·E]`` of our lora_B ``[E, N, r]``."""
    if factor == "lora_A":
        return value.reshape(-1, adapter.in_features)
    return value.permute(1, 2, 0).reshape(adapter.out_features, -1)


def stacks_to_file(tensors: Mapping[str, Tensor], stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """`tensors` by their keys in the file, with our factors of `stacks` among them as `to_file` makes them."""
    made = {}
    for name, wrapper in file_names(stacks).items():
        for factor in FACTORS:
            key = PREFIX + factor_key(wrapper, factor)
            if key in tensors:
                made[key] = to_file(stacks[name].adapter, factor, tensors[key]).contiguous()
    return {**tensors, **made}


def from_file(adapter: ExpertsAdapter, factor: str, value: Tensor) -> Tensor:
    """Undo `to_file`."""
    if factor == "lora_A":
        return value.reshape(adapter.experts, adapter.r, adapter.in_features)
    return value.reshape(adapter.out_features, adapter.r, adapter.experts).permute(2, 0, 1)


def shapes_in_file(stack: Stack, r: int) -> dict[str, list[int]]:
    """What the factors of `stack` must be in the file."""
    experts, n, k = stack.sizes
    return {"lora_A": [experts * r, k], "lora_B": [n, r * experts]}


def turned_round(stack: Stack, r: int, factors: Mapping[str, Tensor], oriented: bool) -> str | None:
    """Why factors are, or may be, those of a PEFT that took in- and output of such a stack the other way round: before 0.20 it
    always took the parameter's second dimension for the input, in 0.19 the third where the module is transposed. `oriented`:
    they come from a program that is known not to."""
    experts, n, k = stack.sizes
    other = {"lora_A": [experts * r, n], "lora_B": [k, r * experts]}
    if {factor: list(t.shape) for factor, t in factors.items()} != other or (n == k and oriented):
        return None
    how = "its in- and output may be" if n == k else "its in- and output are"
    return f"{how} the other way round, as PEFT before 0.20 saved experts: train it again with a newer one"
