"""`adapter_config.json`: what of PEFT's LoRA settings this library writes and understands."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..layer.adapter import ALLoRALayer
from ..layer.functional import check_rule
from .adapter_files import CONFIG_FILE, adapter_file
from .names import clean_name, matches_end, module_names, pattern_value

# PEFT's task of a transformers class, by the end of its name, and the heads PEFT then insists on finding in the file.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
# Settings of PEFT's LoraConfig under which its layer computes something else than W x + scaling * B(A x). Not velora_config,
# under which only the gradients are others.
OTHER_LAYERS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens",
)  # fmt: skip
# Those under which PEFT changes the model beside its layers.
_OTHER_MODELS = ("trainable_token_indices", "layer_replication", "megatron_config")
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, ...) subtract from them. None is as False.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_for(
    root: nn.Module,
    layers: Mapping[str, ALLoRALayer],
    saved: Mapping[str, nn.Module],
    base: str | None,
    adapter: str,
) -> dict[str, Any]:
    """The config of `adapter` on these layers, with these modules to save; ValueError if layers differ in eta or norm."""
    own = {name: layer.adapter(adapter) for name, layer in layers.items()}
    rules = {(of.eta, of.norm) for of in own.values()}
    if len(rules) > 1:
        raise ValueError(f"the file holds one (eta, norm) for all layers, but they have {sorted(rules, key=str)}")
    ((eta, norm),) = rules
    r = Counter(of.r for of in own.values()).most_common(1)[0][0]
    # The caret keeps PEFT, which matches the ends of names, from giving a layer another one's rank.
    other_ranks = {f"^{re.escape(name)}": of.r for name, of in own.items() if of.r != r}
    stacks = {name for name, layer in layers.items() if layer.grouped}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(root, saved),
        "base_model_name_or_path": base or getattr(getattr(root, "config", None), "name_or_path", None) or None,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": _exact_target(root, {name: layer for name, layer in layers.items() if name not in stacks}),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "allora_eta": eta,
        "allora_norm": norm,
        **({"target_parameters": _exact_parameters(root, stacks)} if stacks else {}),
    }


def _exact_target(root: nn.Module, layers: Mapping[str, nn.Module]) -> list[str] | str:
    """What makes PEFT adapt `layers` and nothing else: their names, unless one is also the end of another's name."""
    ends = tuple(f".{name}" for name in layers)
    if any(names[0].endswith(ends) for names in module_names(root).values() if names[0] not in layers):
        return "|".join(re.escape(name) for name in layers)
    return sorted(layers)


def _exact_parameters(root: nn.Module, wanted: Collection[str]) -> list[str]:
    """What makes PEFT adapt these parameters; ValueError where it would adapt others too, as it knows only ends of names."""
    # As PEFT looks for them: a shared module under its first name only, a tied parameter in each of its modules.
    owned = (f"{name}.{p}" for name, module in root.named_modules() for p, _ in module.named_parameters(recurse=False))
    for name in map(clean_name, owned):
        for end in wanted:
            if name.endswith(f".{end}") and name not in wanted:
                raise ValueError(f"PEFT's target_parameters cannot name {end} without {name}, which has no adapter")
    return sorted(wanted)


def _task_type(root: nn.Module, saved: Mapping[str, nn.Module]) -> str | None:
    """PEFT's task of `root`; None where PEFT would then look for a head that is not in the file."""
    classes = [cls.__name__ for cls in type(root).__mro__]
    for ending, (task, heads) in _TASKS.items():
        if any(name.endswith(ending) for name in classes):
            present = [n for names in module_names(root).values() for n in names if heads and n.endswith(heads)]
            return task if set(present) <= saved.keys() and (present or not heads) else None
    return None


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter_config.json decides which layers are adapted and what they compute."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    target_modules: str | list[str]
    target_parameters: list[str] | None
    exclude_modules: str | list[str] | None
    modules_to_save: list[str] | None
    narrowed: bool
    """Whether target_modules is narrowed further by layer numbers."""
    eta: float
    norm: str | None
    oriented: bool
    """Whether who saved it is known to tell in- and output of experts by how they are stored (PEFT before 0.20 did not)."""

    def rank(self, name: str) -> int:
        """r of the layer called `name`."""
        return pattern_value(self.rank_pattern, name, self.r, "rank_pattern")

    def scaling(self, name: str) -> float:
        """PEFT's factor before BA, for the layer called `name`."""
        r = self.rank(name)
        return pattern_value(self.alpha_pattern, name, self.alpha, "alpha_pattern") / (
            math.sqrt(r) if self.rslora else r
        )


def read_config(folder: Path) -> AdapterConfig:
    """The config in `folder`; ValueError or FileNotFoundError unless it describes an adapter this library can load."""
    file = adapter_file(folder, CONFIG_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {folder}: there is no {CONFIG_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    try:
        return _parse_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _parse_config(config: Mapping[str, Any]) -> AdapterConfig:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for setting in OTHER_LAYERS + _OTHER_MODELS:
        if config.get(setting):
            raise ValueError(
                f"{setting}={config[setting]!r} is another layer than LoRA's W + BA, which is all this loads"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none' (biases are frozen here), got {config['bias']!r}")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r} changes the base weights: save the adapter from PEFT "
            "with path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    if ("allora_eta" in config) != ("allora_norm" in config):
        raise ValueError("allora_eta and allora_norm must be there together, or neither (plain LoRA)")
    eta, norm = config.get("allora_eta", 2.0), config.get("allora_norm")
    target, excluded, saved = (config.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save"))
    stacks = config.get("target_parameters")
    if not (stacks is None or _is_list_of(stacks, str)):
        raise ValueError(f"target_parameters must be a list of names, got {stacks!r}")
    target = [] if target is None and stacks else target
    if not (isinstance(target, str) or _is_list_of(target, str)):
        raise ValueError(f"target_modules must be a list of names or a regular expression, got {target!r}")
    if not (excluded is None or isinstance(excluded, str) or _is_list_of(excluded, str)):
        raise ValueError(f"exclude_modules must be a list of names or a regular expression, got {excluded!r}")
    if not (saved is None or _is_list_of(saved, str)):
        raise ValueError(f"modules_to_save must be a list of names, got {saved!r}")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not (isinstance(ranks, dict) and isinstance(alphas, dict)):
        raise ValueError(f"rank_pattern and alpha_pattern must be objects, got {ranks!r} and {alphas!r}")
    for r in (config.get("r"), *ranks.values()):
        check_rule(r, eta, norm)
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha and alpha_pattern must be finite numbers, got {alpha!r}")
    for pattern in (*ranks, *alphas):
        matches_end(pattern, "", "rank_pattern or alpha_pattern")
    return AdapterConfig(
        r=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=bool(config.get("use_rslora")),
        target_modules=target,
        target_parameters=stacks or None,
        exclude_modules=excluded,
        modules_to_save=saved,
        narrowed=config.get("layers_to_transform") is not None,
        eta=eta,
        norm=norm,
        oriented="allora_eta" in config or _version(config.get("peft_version")) >= (0, 20),
    )


def _version(text: Any) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return tuple(map(int, found.groups())) if found else ()


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
