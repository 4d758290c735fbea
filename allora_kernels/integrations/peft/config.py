"""`ALLoRAConfig`: a LoraConfig that says eta and norm too, and what of PEFT's settings ALLoRA has no meaning for."""

import copy
import functools
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from torch import nn

from ...layer.functional import check_rule
from ...models.adapter_config import OTHER_LAYERS, PLAIN_INITS
from .dispatch import make_layer

_OTHER_LAYER = "it makes another layer than W + BA"
# Settings of LoraConfig that leave ALLoRA as it is only by their default, and why. Not every version has each.
_NO_MEANING = {
    "lora_dropout": "ALLoRA has no dropout",
    "use_rslora": "ALLoRA has no scaling",
    "bias": "the layer under the adapter is frozen",
    **dict.fromkeys(OTHER_LAYERS, _OTHER_LAYER),
    "velora_config": "it has a gradient of its own",
    "target_parameters": "PEFT trains them as plain LoRA",
}
_OF_EXPERTS = (
    ". Where it is None, PEFT took some of target_modules for a mixture's experts, which are no linear layers: name others, as "
    "['q_proj', 'v_proj'], or use apply_allora(model, experts=True) and, for its files, load_adapter"
)


@dataclass
class ALLoRAConfig(LoraConfig):
    """PEFT's LoraConfig of an adapter that trains by ALLoRA's rule.

    `peft.get_peft_model`, `PeftModel.add_adapter` and `save_pretrained` take it as they take a LoraConfig; saved, it has two
    keys more, which PEFT ignores with a warning where it loads the folder itself.

    Args:
        allora_eta: η, as in `allora_kernels.allora_linear`.
        allora_norm: the rule, as there.

    Everything else is as in LoraConfig.

    Raises:
        ValueError: a setting that ALLoRA has no meaning for, with the line to write; r, eta or norm out of range.
        TypeError: r is no int, eta no number or a pattern no dict.
    """

    allora_eta: float = field(default=2.0, metadata={"help": "eta: the coefficient where the adapter is zero"})
    allora_norm: str | None = field(
        default="row", metadata={"help": "the norm in the coefficient; None for plain LoRA"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    @classmethod
    def from_lora_config(cls, config: LoraConfig, eta: float, norm: str | None) -> "ALLoRAConfig":
        """The same settings with a rule, in a config of their own: `config` is left alone."""
        if isinstance(config, cls):
            raise TypeError("config is an ALLoRAConfig: pass a plain peft.LoraConfig, and the rule as eta= and norm=")
        if type(config) is not LoraConfig:
            raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
        if config._custom_modules:
            raise ValueError("config has custom modules of its own, which would not be ALLoRA: use a fresh LoraConfig")
        settings = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(config) if f.init}
        return cls(**settings, allora_eta=eta, allora_norm=norm)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "ALLoRAConfig":
        """As LoraConfig's, which `from_pretrained` ends in; ValueError unless the settings are an ALLoRA adapter's."""
        missing = {"allora_eta", "allora_norm"} - kwargs.keys()
        if missing:
            raise ValueError(
                f"the adapter's config has no {' and no '.join(sorted(missing))}, so it is not ALLoRA's: load it with "
                "PeftModel.from_pretrained, and call accelerate_lora(model) for the fused kernels"
            )
        eta, norm = kwargs.pop("allora_eta"), kwargs.pop("allora_norm")
        return cls.from_lora_config(LoraConfig.from_peft_type(**kwargs), eta, norm)

    def check(self) -> None:
        """Raise as the class does unless these settings make an ALLoRA adapter."""
        for f in fields(self):
            value, reason = getattr(self, f.name), _NO_MEANING.get(f.name)
            if reason and value and value != f.default:
                hint = _OF_EXPERTS if f.name == "target_parameters" else ""
                raise ValueError(
                    f"{f.name}={value!r} has no meaning here, as {reason}: write {f.name}={f.default!r}{hint}"
                )
            if value and not reason and f.metadata.get("is_lora_variant"):
                raise ValueError(f"{f.name} has no meaning here, as {_OTHER_LAYER}: leave it out")
        if self.init_lora_weights not in PLAIN_INITS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the base weights, which ALLoRA leaves as they are: "
                f"write init_lora_weights=True, or one of {PLAIN_INITS[1:]}"
            )
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if not isinstance(pattern, dict):
                raise TypeError(f"{name} must be a dict of patterns and numbers, got {pattern!r}")
        for r in (self.r, *ranks.values()):
            check_rule(r, self.allora_eta, self.allora_norm)
        if self.lora_alpha != self.r:
            raise ValueError(
                f"lora_alpha={self.lora_alpha!r} with r={self.r} is a scaling, and ALLoRA has none: write lora_alpha={self.r}"
            )
        # In order, as the first pattern that matches counts.
        if list(alphas.items()) != list(ranks.items()):
            raise ValueError(
                f"alpha_pattern={alphas} with rank_pattern={ranks} gives some layers a scaling, and ALLoRA has none: write "
                f"alpha_pattern={ranks}"
            )

    def _register_custom_module(self, mapping: dict) -> None:
        raise TypeError(
            "an ALLoRAConfig names the class of its layers itself: _register_custom_module is for LoraConfig"
        )

    @property
    def _custom_modules(self) -> dict:
        """What PEFT asks first for a layer's class. Made at each reading, so that a copy of the config speaks for itself."""
        return {nn.Module: functools.partial(make_layer, self)}

    @_custom_modules.setter
    def _custom_modules(self, value: None) -> None:
        """LoraConfig's constructor sets it to None."""
