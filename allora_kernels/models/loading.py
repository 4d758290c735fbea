"""Loading an adapter that `save_adapter` or PEFT saved."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..layer.adapter import DEFAULT_ADAPTER, ALLoRALayer, computed_factor
from ..layer.linear import is_conv1d
from ..layer.sharding import reshard
from ..layer.zero import whole_shape
from .adapt import attach, check_adapter_name
from .adapted import AdaptReport, adapter_names, chosen_adapter, layers_of, report, saved_modules
from .adapter_config import AdapterConfig, read_config
from .adapter_files import PREFIX, WEIGHTS_FILE, adapter_file, split_key
from .adapters import add_adapter
from .expert_files import file_names, from_file, shapes_in_file, turned_round
from .expert_selection import Stack, adapted_stacks, beside_experts, select_stacks
from .names import some, unwrap
from .saving import state_of
from .selection import check_unadapted, find_saved, select_layers
from .sharded import copy_into


def load_adapter(model: nn.Module, path: str | os.PathLike, *, adapter: str | None = None) -> AdaptReport:
    """Load an adapter that `save_adapter` or PEFT saved into `model`, in place.

    A model without adapters gets those the files describe, with the eta and norm of the config (plain LoRA,
    ``norm=None``, where PEFT saved it). A model with adapters must have the same layers, ranks and saved modules, and
    keeps its own eta and norm. Values are cast to the dtype the model's adapters have. PEFT's
    scaling (alpha/r, or alpha/√r with rslora), which this library's layer does not have, is multiplied into lora_B, so
    the model computes what PEFT's does; lora_dropout is dropped. Where the adapters are sharded, every process loads its part
    of them, from a folder that it can read; how they were sharded when they were saved does not matter.

    Args:
        model: the base model, or one with adapters of the same shape.
        path: the folder.
        adapter: into which adapter, where the model has several (see `add_adapter`). A name that is new to the model adds
            one, with the ranks, eta and norm of the config; on a model without adapters it is the name of the first.

    Returns:
        AdaptReport: what is adapted now.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: the adapter is a pickle (only safetensors are read) or broken; the config describes another kind of
            layer (DoRA, trained biases, ...); names, shapes or dtypes do not fit the model; the model cannot be
            adapted; it has several adapters and `adapter` does not say which; `adapter` is new and `add_adapter` refuses it.
            The model is untouched then.
    """
    root, folder = unwrap(model), Path(path)
    config = read_config(folder)
    factors, whole = _read_tensors(folder)
    layers: Mapping[str, nn.Module] = {name: layer for name, layer in layers_of(root).items() if not layer.grouped}
    stacks = adapted_stacks(root)
    names = adapter_names(root)
    added = adapter is not None and bool(names) and adapter not in names
    if adapter is not None:
        check_adapter_name(adapter)
    into = (
        adapter
        if added
        else chosen_adapter(root, adapter if names else None, f"load_adapter(model, {str(path)!r}, adapter=name)")
    )
    saved, skipped = saved_modules(root, None if added else into), {}
    declared = find_saved(root, config.modules_to_save, must_match=False)
    fresh = not (layers or stacks)
    if fresh:
        check_unadapted(model)
        saved = declared
        layers, skipped = select_layers(root, config.target_modules, config.exclude_modules, saved)
        stacks, _ = select_stacks(root, False, config.target_parameters, None, saved)
        if config.narrowed:
            layers = {name: layer for name, layer in layers.items() if name in factors}
        if stacks:
            layers, skipped = beside_experts(root, [], layers, skipped, stacks)
    factors, by_stack = _apart(factors, stacks)
    problems = [
        *_stack_problems(config, by_stack, stacks),
        *_layer_problems(config, factors, layers, skipped, None if added else into),
        *_whole_problems(whole, saved, declared),
        *_computed_factors({} if fresh or added else layers_of(root), into),
    ]
    if problems:
        raise ValueError(f"{folder} does not fit the model: {some(problems, separator='; ')}")

    # What is written into parameters that FSDP2 holds whole for now is lost.
    reshard(root)
    if fresh:
        into = adapter or DEFAULT_ADAPTER
        ranks = {name: config.rank(name) for name in (*layers, *stacks)}
        attach(root, layers, ranks, config.eta, config.norm, saved, stacks=stacks, adapter_name=into)
    elif added:
        pattern = {f"^{re.escape(name)}": config.rank(name) for name in layers}
        add_adapter(model, into, config.r, config.eta, config.norm, rank_pattern=pattern)
        saved = saved_modules(root, into)
    for name, layer in layers_of(root).items():
        own, found = layer.adapter(into), by_stack[name] if layer.grouped else factors[name]
        a, b = found["lora_A"], _scaled(found["lora_B"], config.scaling(name))
        copy_into(own.lora_A, from_file(layer, "lora_A", a) if layer.grouped else a)
        copy_into(own.lora_B, from_file(layer, "lora_B", b) if layer.grouped else b)
    for key, target in state_of(saved).items():
        copy_into(target, whole[key])
    return report(root, skipped)


# --- reading --------------------------------------------------------------------------------------------------------


def _computed_factors(layers: Mapping[str, ALLoRALayer], adapter: str) -> Iterator[str]:
    for name, layer in layers.items():
        if reason := computed_factor(layer.adapter(adapter)):
            yield f"of {name} {reason}"


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``({layer: {"lora_A": tensor, "lora_B": tensor}}, {any other name: tensor})``, on the CPU."""
    file = adapter_file(folder, WEIGHTS_FILE)
    if not file.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder} holds a pickle, adapter_model.bin, which could run code when read; only {WEIGHTS_FILE} is "
                "loaded. Save it from PEFT again with safe_serialization=True"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no (whole) safetensors file: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for key, t in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: names must begin with {PREFIX!r}, got {key!r}")
        name = key.removeprefix(PREFIX)
        if found := split_key(name):
            layer, factor = found
            factors.setdefault(layer, {})[factor] = t
        else:
            whole[name] = t
    return factors, whole


def _apart(factors: Mapping[str, Mapping[str, Tensor]], stacks: Mapping[str, Stack]) -> tuple[dict, dict]:
    """``(the factors of layers, those of stacks by the name of their parameter)``."""
    in_file = file_names(stacks)
    taken = set(in_file.values())
    return (
        {name: found for name, found in factors.items() if name not in taken},
        {name: factors[key] for name, key in in_file.items() if key in factors},
    )


def _stack_problems(
    config: AdapterConfig, factors: Mapping[str, Mapping[str, Tensor]], stacks: Mapping[str, Stack]
) -> Iterable[str]:
    for name, stack in stacks.items():
        r = config.rank(name)
        if name not in factors:
            yield f"it has no lora_A and lora_B for {name}"
        elif stack.adapter is not None and stack.adapter.r != r:
            yield f"{name} has r={stack.adapter.r} in the model and r={r} in the file"
        elif reason := turned_round(stack, r, factors[name], config.oriented):
            yield f"{name}: {reason}"
        else:
            yield from _factor_problems(name, factors[name], shapes_in_file(stack, r))
        if stack.weight.is_meta:
            yield f"{name} is on the meta device: load the model's weights first"


def _factor_problems(name: str, factors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> Iterable[str]:
    for factor, shape in shapes.items():
        t = factors.get(factor)
        if t is None:
            yield f"it has no {factor} for {name}"
        elif list(t.shape) != shape:
            yield f"{name}.{factor} must be {shape}, got {list(t.shape)}"
        elif not t.is_floating_point():
            yield f"{name}.{factor} must have a floating-point dtype, got {t.dtype}"


def _layer_problems(
    config: AdapterConfig,
    factors: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
    adapter: str | None,
) -> Iterable[str]:
    for name in sorted(factors.keys() - layers.keys()):
        yield f"it adapts {name}: {skipped.get(name, 'not a layer of the model that target_modules names')}"
    for name, layer in layers.items():
        if name not in factors:
            yield f"it has no lora_A and lora_B for {name}"
            continue
        n, k = (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)
        r = config.rank(name)
        if isinstance(layer, ALLoRALayer) and adapter is not None and layer.adapter(adapter).r != r:
            yield f"{name} has r={layer.adapter(adapter).r} in the model and r={r} in the file"
        if layer.weight.is_meta:
            yield f"{name} is on the meta device: load the model's weights first"
        yield from _factor_problems(name, factors[name], {"lora_A": [r, k], "lora_B": [n, r]})


def _whole_problems(
    whole: Mapping[str, Tensor], saved: Mapping[str, nn.Module], declared: Mapping[str, nn.Module]
) -> Iterable[str]:
    """What is wrong with the tensors of modules saved whole: those of the model, and those that the config declares."""
    for name in sorted(saved.keys() ^ declared.keys()):
        yield f"{name} is in modules_to_save of the {'model' if name in saved else 'file'} only"
    state = state_of({**declared, **saved})
    for key in sorted(whole.keys() - state.keys()):
        yield f"it has a tensor {key}, which belongs to no adapter and to no module in modules_to_save"
    for key, target in state.items():
        t = whole.get(key)
        if t is None:
            yield f"it has no tensor {key}, which is in modules_to_save"
        elif t.shape != whole_shape(target):
            yield f"{key} must be {list(whole_shape(target))}, got {list(t.shape)}"
        elif t.is_floating_point() != target.is_floating_point():
            yield f"{key} must be {target.dtype} or alike, got {t.dtype}"
        elif target.is_meta:
            yield f"{key} is on the meta device: load the model's weights first"


def _scaled(lora_B: Tensor, scaling: float) -> Tensor:
    return lora_B if scaling == 1 else lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling
