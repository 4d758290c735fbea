"""Adapters on disk, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json` in one folder."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..layer.linear import FusedALLoRALinear, is_conv1d
from .adapt import AdaptReport, adapter_layers, attach, report, saved_modules
from .adapter_config import CONFIG_FILE, AdapterConfig, config_for, read_config
from .selection import (
    check_unadapted,
    clean_name,
    find_saved,
    module_slots,
    select_layers,
    some,
    unwrap,
)

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")


def save_adapter(model: nn.Module, path: str | os.PathLike, *, base_model_name_or_path: str | None = None) -> None:
    """Write the adapters of `model`, and the modules it was told to save whole, into the folder `path`.

    The format is PEFT's, so `PeftModel.from_pretrained(base, path)` loads it. Tensors keep their dtypes; lora_A is
    ``[r, K]`` and lora_B ``[N, r]`` also where the layer is a Conv1D. Both files are complete on disk before either
    takes its place: an interrupted save leaves the adapter that was there.

    Args:
        model: a model with adapters; wrappers of torch.compile and data parallelism are seen through.
        path: a folder, made where it does not exist. Other files in it are left alone.
        base_model_name_or_path: for the config; None for the name that a transformers model carries.

    Raises:
        ValueError: the model has no adapters, or only one as its root; `path` is a file; layers differ in eta or norm;
            a parameter is sharded or on the meta device.
        OSError: the folder cannot be written.
    """
    root, folder = unwrap(model), Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, but {folder} is a file")
    layers = _layers_of(root)
    if not layers:
        raise ValueError("the model has no adapters to save: apply_allora(model) first")
    if root in layers.values():
        raise ValueError("the model is itself a FusedALLoRALinear, and a nameless layer has no place in the file")
    saved = saved_modules(root)
    config = config_for(root, layers, saved, base_model_name_or_path)
    tensors = _tensors_to_save(layers, saved)
    _warn_of_losses(root, layers, saved)
    _replace_files(folder, tensors, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, path: str | os.PathLike) -> AdaptReport:
    """Load an adapter that `save_adapter` or PEFT saved into `model`, in place.

    A model without adapters gets those the files describe, with the eta and norm of the config (plain LoRA,
    ``norm=None``, where PEFT saved it). A model with adapters must have the same layers, ranks and saved modules, and
    keeps its own eta and norm. Values are cast to the dtype the model's adapters have. PEFT's
    scaling (alpha/r, or alpha/√r with rslora), which this library's layer does not have, is multiplied into lora_B, so
    the model computes what PEFT's does; lora_dropout is dropped.

    Args:
        model: the base model, or one with adapters of the same shape.
        path: the folder.

    Returns:
        AdaptReport: what is adapted now.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: the adapter is a pickle (only safetensors are read) or broken; the config describes another kind of
            layer (DoRA, trained biases, ...); names, shapes or dtypes do not fit the model; the model cannot be
            adapted. The model is untouched then.
    """
    root, folder = unwrap(model), Path(path)
    config = read_config(folder)
    factors, whole = _read_tensors(folder)
    layers: Mapping[str, nn.Module] = _layers_of(root)
    saved, skipped = saved_modules(root), {}
    fresh = not layers
    if fresh:
        check_unadapted(model)
        saved = find_saved(root, config.modules_to_save, must_match=False)
        layers, skipped = select_layers(root, config.target_modules, config.exclude_modules, saved)
        if config.narrowed:
            layers = {name: layer for name, layer in layers.items() if name in factors}
    problems = [*_layer_problems(config, factors, layers, skipped), *_whole_problems(whole, saved)]
    if problems:
        raise ValueError(f"{folder} does not fit the model: {some(problems, separator='; ')}")

    if fresh:
        attach(root, layers, {name: config.rank(name) for name in layers}, config.eta, config.norm, saved)
        layers = _layers_of(root)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(factors[name]["lora_A"])
            layer.lora_B.copy_(_scaled(factors[name]["lora_B"], config.scaling(name)))
        for key, target in _state_of(saved).items():
            target.copy_(whole[key])
    return report(root, skipped)


def _layers_of(root: nn.Module) -> dict[str, FusedALLoRALinear]:
    return {clean_name(name): layer for name, layer in adapter_layers(root).items()}


def _state_of(saved: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {clean_name(f"{name}.{key}"): t for name, module in saved.items() for key, t in module.state_dict().items()}


# --- writing --------------------------------------------------------------------------------------------------------


def _tensors_to_save(layers: Mapping[str, FusedALLoRALinear], saved: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    tensors = _state_of(saved)
    for name, layer in layers.items():
        for factor, shape in (("lora_A", (layer.r, layer.in_features)), ("lora_B", (layer.out_features, layer.r))):
            tensors[f"{name}.{factor}.weight"] = t = getattr(layer, factor)
            if tuple(t.shape) != shape:
                raise ValueError(f"{name}.{factor} is {list(t.shape)} and not {list(shape)}: gather its shards first")
    for key, t in tensors.items():
        if t.is_meta or hasattr(t, "full_tensor"):
            raise ValueError(f"{key} is {'on the meta device' if t.is_meta else 'sharded'}: gather its values first")
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    return {_PREFIX + key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _warn_of_losses(root: nn.Module, layers: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    kept = {p for module in (*layers.values(), *saved.values()) for p in module.parameters()}
    lost = [clean_name(name) for name, p in root.named_parameters() if p.requires_grad and p not in kept]
    if lost:
        warnings.warn(f"trained but not saved, as modules_to_save does not name them: {some(lost)}", stacklevel=3)
    slots = module_slots(root)
    shared = [name for name, layer in layers.items() if len(slots[layer]) > 1]
    if shared:
        warnings.warn(f"PEFT will adapt these shared layers under their first name only: {some(shared)}", stacklevel=3)


def _replace_files(folder: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Write both files aside, then rename them into place; on an error what was there is there again."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        save_file(dict(tensors), aside / WEIGHTS_FILE, metadata={"format": "pt"})
        (aside / CONFIG_FILE).write_text(config, encoding="utf-8")
        # safetensors makes files that only their owner can read, whatever the umask.
        shutil.copymode(aside / CONFIG_FILE, aside / WEIGHTS_FILE)
        former = folder / CONFIG_FILE
        backup = aside / "former_config"
        if former.exists():
            shutil.copy2(former, backup)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            _flush_to_disk(aside / file)
        os.replace(aside / CONFIG_FILE, former)
        try:
            os.replace(aside / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        except BaseException:
            os.replace(backup, former) if backup.exists() else former.unlink()
            raise
        if os.name == "posix":
            _flush_to_disk(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``({layer: {"lora_A": tensor, "lora_B": tensor}}, {any other name: tensor})``, on the CPU."""
    file = folder / WEIGHTS_FILE
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
        if not key.startswith(_PREFIX):
            raise ValueError(f"{file}: names must begin with {_PREFIX!r}, got {key!r}")
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = t
        else:
            whole[name] = t
    return factors, whole


def _layer_problems(
    config: AdapterConfig,
    factors: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
) -> Iterable[str]:
    for name in sorted(factors.keys() - layers.keys()):
        yield f"it adapts {name}: {skipped.get(name, 'not a layer of the model that target_modules names')}"
    for name, layer in layers.items():
        if name not in factors:
            yield f"it has no lora_A and lora_B for {name}"
            continue
        n, k = (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)
        r = config.rank(name)
        if isinstance(layer, FusedALLoRALinear) and layer.r != r:
            yield f"{name} has r={layer.r} in the model and r={r} in the file"
        if layer.weight.is_meta:
            yield f"{name} is on the meta device: load the model's weights first"
        for factor, shape in (("lora_A", [r, k]), ("lora_B", [n, r])):
            t = factors[name].get(factor)
            if t is None:
                yield f"it has no {factor} for {name}"
            elif list(t.shape) != shape:
                yield f"{name}.{factor} must be {shape}, got {list(t.shape)}"
            elif not t.is_floating_point():
                yield f"{name}.{factor} must have a floating-point dtype, got {t.dtype}"


def _whole_problems(whole: Mapping[str, Tensor], saved: Mapping[str, nn.Module]) -> Iterable[str]:
    state = _state_of(saved)
    for key in sorted(whole.keys() - state.keys()):
        yield f"it has a tensor {key}, which belongs to no adapter and to no module in modules_to_save"
    for key, target in state.items():
        t = whole.get(key)
        if t is None:
            yield f"it has no tensor {key}, which is in modules_to_save"
        elif t.shape != target.shape:
            yield f"{key} must be {list(target.shape)}, got {list(t.shape)}"
        elif t.is_floating_point() != target.is_floating_point():
            yield f"{key} must be {target.dtype} or alike, got {t.dtype}"
        elif target.is_meta:
            yield f"{key} is on the meta device: load the model's weights first"


def _scaled(lora_B: Tensor, scaling: float) -> Tensor:
    return lora_B if scaling == 1 else lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling
