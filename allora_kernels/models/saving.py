"""Saving adapters in PEFT's format, by `save_adapter` and by the `save_pretrained` of a model that has them."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..layer.adapter import ALLoRALayer
from ..layer.zero import whole_shape
from .adapted import adapter_layers, adapter_parameters, chosen_adapter, layers_of, saved_modules
from .adapter_config import config_for
from .adapter_files import PREFIX, factor_key, write_adapter
from .expert_files import file_names, misread_by_others, stacks_to_file
from .expert_selection import Stack, adapted_stacks
from .experts import ADAPTERS
from .names import clean_name, module_slots, some, unwrap
from .saved_whole import ModuleOfEachAdapter
from .sharded import any_in_pieces, together, whole_on_cpu, writes_files


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    adapter: str | None = None,
    base_model_name_or_path: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter of `model`, and the modules it was told to save whole, into the folder `path`.

    The format is PEFT's, so `PeftModel.from_pretrained(base, path)` loads it. Tensors keep their dtypes; lora_A is
    ``[r, K]`` and lora_B ``[N, r]`` also where the layer is a Conv1D. Both files take their places by one rename, when they are
    on disk: whatever interrupts a save leaves the former adapter or the new one.

    Where the adapters are sharded (FSDP2, tensor parallelism, DeepSpeed's ZeRO-3), every process must call it. Process 0
    gathers and writes; the others return when the files are there, and raise where it fails.

    Args:
        model: a model with adapters; wrappers of torch.compile and data parallelism are seen through.
        path: a folder, made where it does not exist. Other files in it are left alone.
        adapter: which one, where there are several (see `add_adapter`); a folder holds one.
        base_model_name_or_path: for the config; None for the name that a transformers model carries.
        state_dict: whole values by parameter name, in the place of the model's own, for an engine that gathers them itself.

    Raises:
        ValueError: the model has no adapters, or only one as its root; it has several and `adapter` does not say which, or has
            none of that name; `path` is a file; layers differ in eta or norm; a parameter is on the meta device, in pieces that
            are no DTensor, or missing in `state_dict`.
        RuntimeError: it failed in another process.
        OSError: the folder cannot be written.
    """
    root, folder = unwrap(model), Path(path)
    sharded = state_dict is None and any_in_pieces(root, _parameters)
    in_step = together if sharded else lambda act: act()
    config, tensors = in_step(lambda: prepare_save(root, folder, adapter, base_model_name_or_path, state_dict))
    whole = values_in_file(root, tensors)

    def write() -> None:
        if writes_files(tensors):
            write_adapter(folder, whole, config)

    in_step(write)


def prepare_save(
    root: nn.Module,
    folder: Path,
    adapter: str | None = None,
    base: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[str, dict[str, Tensor]]:
    """``(config as JSON, tensors by their names in the file)``, the model's own tensors and no copies."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, but {folder} is a file")
    layers = layers_of(root)
    if not layers:
        raise ValueError("the model has no adapters to save: apply_allora(model) first")
    if root in layers.values():
        raise ValueError(f"the model is itself a {type(root).__name__}, and a nameless layer has no place in the file")
    name = chosen_adapter(root, adapter, f"save_adapter(model, {str(folder)!r}, adapter=name)")
    saved, stacks = saved_modules(root, name), adapted_stacks(root)
    config = config_for(root, layers, saved, base, name)
    tensors = _tensors_to_save(layers, stacks, saved, name, state_dict)
    _warn_of_losses(root, layers, saved, stacks)
    return json.dumps(config, indent=2, sort_keys=True) + "\n", tensors


def values_in_file(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `prepare_save` found, on the CPU and as the file has it; `{}` where another process writes."""
    # Gathered first: the files' layout mixes the experts, over which factors are sharded.
    return stacks_to_file(whole_on_cpu(tensors), adapted_stacks(root))


def state_of(saved: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of the modules that are saved whole, by their names in the file."""
    states = {name: module.state_dict(keep_vars=True) for name, module in saved.items()}
    return {clean_name(f"{name}.{key}"): t for name, state in states.items() for key, t in state.items()}


def _parameters(root: nn.Module) -> list[Tensor]:
    return adapter_parameters(root) + [p for module in saved_modules(root).values() for p in module.parameters()]


def _tensors_to_save(
    layers: Mapping[str, ALLoRALayer],
    stacks: Mapping[str, Stack],
    saved: Mapping[str, nn.Module],
    adapter: str,
    state_dict: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    given = None if state_dict is None else {clean_name(key): t for key, t in state_dict.items()}

    def value(key: str, own: Tensor) -> Tensor:
        if given is not None and key not in given:
            raise ValueError(f"state_dict has no {key}")
        return own if given is None else given[key]

    tensors = {key: value(key, t) for key, t in state_of(saved).items()}
    in_file = file_names(stacks)
    for name, layer in layers.items():
        own = layer.adapter(adapter)
        place = f"{name}.adapters.{adapter}" if len(layer.adapter_names) > 1 else name
        owner, _, parameter = name.rpartition(".")
        place = f"{owner}.{ADAPTERS}.{parameter}" if layer.grouped else place
        experts = (layer.experts,) if layer.grouped else ()
        for factor, shape in (("lora_A", (own.r, layer.in_features)), ("lora_B", (layer.out_features, own.r))):
            t, shape = value(f"{place}.{factor}", getattr(own, factor)), (*experts, *shape)
            if tuple(whole_shape(t)) != shape:
                raise ValueError(f"{place}.{factor} is {list(t.shape)} and not {list(shape)}: gather its shards first")
            tensors[factor_key(in_file.get(name, name), factor)] = t
    for key, t in tensors.items():
        if t.is_meta:
            raise ValueError(f"{key} is on the meta device: gather its values first")
    return {PREFIX + key: t for key, t in tensors.items()}


def _warn_of_losses(
    root: nn.Module,
    layers: Mapping[str, ALLoRALayer],
    saved: Mapping[str, nn.Module],
    stacks: Mapping[str, Stack],
) -> None:
    # What belongs to another adapter is saved with that one.
    of_others = [m for m in root.modules() if isinstance(m, ModuleOfEachAdapter)]
    kept = {p for module in (*layers.values(), *saved.values(), *of_others) for p in module.parameters()}
    lost = [clean_name(name) for name, p in root.named_parameters() if p.requires_grad and p not in kept]
    if lost:
        warnings.warn(f"trained but not saved, as modules_to_save does not name them: {some(lost)}", stacklevel=5)
    slots = module_slots(root)
    owners = {**layers, **{name: stack.module for name, stack in stacks.items()}}
    shared = [name for name, owner in owners.items() if len(slots[owner]) > 1]
    if shared:
        warnings.warn(f"PEFT will adapt these shared layers under their first name only: {some(shared)}", stacklevel=5)
    if misread := misread_by_others(root, layers, stacks):
        warnings.warn(
            f"PEFT (0.21) and transformers load the adapters on {some(misread)} wrongly, as other parts of this kind of model "
            "had such names in older checkpoints: load this folder with allora_kernels.load_adapter, or leave them out",
            stacklevel=5,
        )


# --- save_pretrained ------------------------------------------------------------------------------------------------


class _SavePretrained:
    """In the place of a model's own `save_pretrained` while it has adapters: writes them alone, as `PeftModel`'s does.

    An attribute of the model and no closure, so that it goes with the model through deepcopy and pickle.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.former = model.__dict__.get("save_pretrained")

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        variant: str | None = None,
        distributed_checkpoint: bool = False,
        **_,
    ) -> None:
        """`save_adapter` into `save_directory`; what concerns the base's weights, as max_shard_size, has no effect.

        Raises:
            ValueError: the base model has no name, so nothing would say what the adapter is for; an argument that cannot be
                honoured; or as `save_adapter`.
        """
        refused = {"push_to_hub": push_to_hub, "variant": variant, "distributed_checkpoint": distributed_checkpoint}
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}={value!r}: the model has adapters, and only they are saved: {_INSTEAD}")
        if not getattr(getattr(self.model, "config", None), "name_or_path", None):
            raise ValueError(
                "the model has adapters, and only they are saved, but its base has no name_or_path to load it from again: "
                f"{_INSTEAD}; save the base before apply_allora, and load it from there"
            )
        if state_dict is not None and not state_dict:
            # So Trainer calls it where the engine gathers nothing and writes a checkpoint of its own.
            warnings.warn(
                f"no values were given, so no adapter is written to {save_directory}: set "
                "stage3_gather_16bit_weights_on_model_save in DeepSpeed's config, or call save_adapter in every process",
                stacklevel=2,
            )
            return
        if is_main_process or (state_dict is None and any_in_pieces(self.model, _parameters)):
            save_adapter(self.model, save_directory, state_dict=state_dict)


_INSTEAD = "call save_adapter(model, folder), or merge_adapter(model) first to save a plain model"


def save_adapters_alone(root: nn.Module) -> None:
    """From now on `save_pretrained` of `root`, and of the parts of it that have one, writes the adapters."""
    for module in root.modules():
        if callable(getattr(type(module), "save_pretrained", None)) and adapter_layers(module):
            module.save_pretrained = _SavePretrained(module)


def save_models_again(root: nn.Module) -> None:
    """Undo `save_adapters_alone`."""
    for module in root.modules():
        if isinstance(hook := module.__dict__.get("save_pretrained"), _SavePretrained):
            del module.save_pretrained
            if hook.former is not None:
                module.save_pretrained = hook.former
