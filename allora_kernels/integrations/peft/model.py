"""`get_allora_model` and `load_allora_model`: a PeftModel whose adapters train by ALLoRA's rule."""

import contextlib
import copy
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import peft
from peft import LoraConfig, PeftModel
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from ...layer import bases
from ...models.adapt import check_gradients_pass, leave_fast_paths
from ...models.names import module_slots, some
from ...models.selection import check_unadapted, obstacle
from .config import ALLoRAConfig
from .dispatch import cannot_be_ruled, take_over
from .ruled import RuledLoraLayer


class ALLoRAModel(LoraModel):
    """PEFT's LoraModel, which is told the rule of each adapter that is added, and refuses one without."""

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if isinstance(config, ALLoRAConfig):
            config.check()
        elif not config.inference_mode:
            raise ValueError(
                f"a {type(config).__name__} says no eta and norm, so the adapter would train as plain LoRA: add an "
                "ALLoRAConfig(..., allora_eta=2.0, allora_norm='row') instead, or load the folder with load_allora_model"
            )

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with undone_on_error(model):
            result = super().inject_adapter(model, *args, **kwargs)
            _see_to_layers(model)
            return result

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        take_over(layer)
        if isinstance(lora_config, ALLoRAConfig) and not isinstance(layer, RuledLoraLayer):
            reason = f"a layer {type(layer).__name__} of PEFT's, which another adapter has brought"
            raise cannot_be_ruled(f"the target {target_name!r}", reason)
        # PEFT 0.18 does not show a layer that is there already the config of its next adapter.
        if isinstance(layer, RuledLoraLayer) and isinstance(lora_config, ALLoRAConfig):
            layer.set_rule(adapter_name, lora_config.allora_eta, lora_config.allora_norm)


def get_allora_model(
    model: nn.Module,
    config: LoraConfig,
    eta: float = 2.0,
    norm: str | None = "row",
    *,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """`peft.get_peft_model` for ALLoRA: adapters on `model`, in place, that run fused and train by the rule.

    Args:
        model: the base model, any that PEFT takes, also with quantized layers of bitsandbytes or torchao.
        config: which layers, ranks and modules to save, as PEFT reads them; ``lora_alpha`` must equal ``r``. It is copied.
        eta: η, as in `allora_kernels.allora_linear`.
        norm: the rule, as there.
        adapter_name: as in `peft.get_peft_model`.
        autocast_adapter_dtype: as there.
        low_cpu_mem_usage: as there.
        revision: as there.

    Returns:
        The PeftModel; its ``peft_config`` holds an `ALLoRAConfig`.

    Raises:
        ValueError: a setting that ALLoRA has no meaning for (dropout, a scaling, DoRA, ...), with the line to write; a
            target that cannot be ALLoRA, such as an embedding, a quantized layer without a backward pass or one whose weight
            another module reads itself; a layer of bitsandbytes that has lost its backward pass, target or not; a model that
            has adapters; what PEFT refuses. The model is untouched then.
        TypeError: `config` is no LoraConfig; r is no int or eta no number.
    """
    declared = ALLoRAConfig.from_lora_config(config, eta, norm)
    check_unadapted(model)
    with undone_on_error(model):
        peft_model = peft.get_peft_model(
            model,
            declared,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            revision=revision,
        )
        return _adopt(peft_model)


def load_allora_model(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    **hub: Any,
) -> PeftModel:
    """`PeftModel.from_pretrained` for an ALLoRA adapter: fused, with the eta and norm it was saved with.

    Args:
        model: the base model; or a PeftModel of `get_allora_model`'s, which gets another adapter of this name.
        folder: what ``save_pretrained`` of such a model wrote, or `allora_kernels.save_adapter`; or a repository's name.
        adapter_name: as in `PeftModel.from_pretrained`.
        is_trainable: as there.
        autocast_adapter_dtype: as there.
        low_cpu_mem_usage: as there.
        hub: ``subfolder``, ``revision``, ``token``, ... for a repository.

    Returns:
        The PeftModel.

    Raises:
        ValueError: the folder holds no ALLoRA adapter; its weights are not those of the layers that the config names in this
            model; the model has an adapter of that name, or adapters that are not ALLoRA's; what `get_allora_model` refuses.
            The model is untouched then.
    """
    folder = os.fspath(folder)
    config = ALLoRAConfig.from_pretrained(folder, **hub)
    config.inference_mode = not is_trainable
    settings = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    with undone_on_error(model):
        if isinstance(model, PeftModel):
            if not isinstance(model.base_model, ALLoRAModel):
                raise ValueError("model is a PeftModel without ALLoRA: give load_allora_model the base model")
            if adapter_name in model.peft_config:
                raise ValueError(f"model has an adapter {adapter_name!r} already: give adapter_name another name")
            # PEFT 0.18 takes one of them.
            known = inspect.signature(model.add_adapter).parameters
            model.add_adapter(adapter_name, config, **{name: on for name, on in settings.items() if name in known})
            peft_model = model
        else:
            check_unadapted(model)
            kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            peft_model = _adopt(kind(model, config, adapter_name, **settings))
        # Weights that a transformers model has under other names than when they were saved.
        renamed = getattr(model, "_checkpoint_conversion_mapping", {})
        weights = peft.utils.load_peft_weights(folder, device="cpu", key_mapping=renamed, **hub)
        with _base_kept(peft_model, weights, folder):
            try:
                result = peft_model.load_adapter(
                    folder, adapter_name, is_trainable=is_trainable, key_mapping=renamed, **settings, **hub
                )
            except KeyError:
                lacking = some(sorted(_of_modules_saved(peft_model, adapter_name) - weights.keys()))
                raise ValueError(f"{folder} does not fit the model: it has no {lacking}, of modules_to_save") from None
            except RuntimeError as error:
                raise ValueError(f"{folder} does not fit the model: {error}") from None
            # PEFT names those of another adapter, too, where this one's name is a part of theirs.
            own = re.compile(rf"\.(?:lora_\w+|modules_to_save)\.{re.escape(adapter_name)}(?:\.|$)")
            problems = [f"it has no {key}" for key in result.missing_keys if own.search(key)]
            problems += [f"the model has no {key}" for key in result.unexpected_keys]
            if problems:
                raise ValueError(f"{folder} does not fit the model: {some(problems, separator='; ')}")
    if is_trainable:
        # As PEFT does for an adapter that it has put on while it loads.
        peft_model.set_requires_grad(adapter_name)
    return peft_model


def _of_modules_saved(peft_model: PeftModel, adapter_name: str) -> set[str]:
    """The names in the file of the adapter's modules that are saved whole."""
    wrappers = [(n, m) for n, m in peft_model.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    return {f"{n}.{key}" for n, m in wrappers for key in m.modules_to_save[adapter_name].state_dict()}


@contextlib.contextmanager
def _base_kept(peft_model: PeftModel, weights: Mapping[str, Tensor], folder: str) -> Iterator[None]:
    """ValueError where PEFT would load some of `weights` over the frozen model, which it does without a word; but for
    embeddings, which it saves where they were resized. Where what is inside raises, those are put back."""
    own = peft_model.state_dict()
    overwritten = {key: own[key].clone() for key in weights.keys() & own.keys()}
    embeddings = _embeddings(peft_model.get_base_model())
    spared = {key for key, p in peft_model.named_parameters(remove_duplicate=False) if p in embeddings}
    if frozen := sorted(overwritten.keys() - spared):
        raise ValueError(
            f"{folder} does not fit the model: {some(frozen)} would replace frozen weights; modules_to_save in its config "
            "does not name them"
        )
    try:
        yield
    except BaseException:
        for key, before in overwritten.items():
            own[key].copy_(before)
        raise


def _embeddings(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of `model`'s input and output embeddings, as far as it says which they are."""
    found = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embeddings, nn.Module):
            found.update(embeddings.parameters())
        elif isinstance(embeddings, nn.Parameter):
            found.add(embeddings)
    return found


def _adopt(peft_model: PeftModel) -> PeftModel:
    """See to it that every later adapter is told its rule; ValueError as `_see_to_layers`."""
    _see_to_layers(peft_model)
    peft_model.base_model.__class__ = ALLoRAModel
    return peft_model


def _see_to_layers(model: nn.Module) -> None:
    """Have nothing computed past an adapter, nor without a backward pass; ValueError where one with a rule would be."""
    slots = module_slots(model)
    for name, layer in model.named_modules():
        if isinstance(layer, RuledLoraLayer) and layer.allora_norm:
            reason = obstacle(layer.base_layer, {layer.base_layer: slots[layer]})
            if reason is not None:
                raise ValueError(
                    f"{name}: {reason}: leave it out, with exclude_modules=[...] or narrower target_modules"
                )
    check_gradients_pass(model)
    leave_fast_paths(model, RuledLoraLayer)
    for module in model.modules():
        bases.keep_backward(module)


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Where what is inside raises, give `model`'s modules back the attributes, containers and flags they had."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    containers = [
        (value, copy.copy(value))
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    # Where layers are replicated PEFT writes their number there.
    configs = [(m.config, dict(vars(m.config))) for m, _ in modules if hasattr(getattr(m, "config", None), "__dict__")]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for config, settings in configs:
            vars(config).clear()
            vars(config).update(settings)
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, before in containers:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
        raise
