"""What several runs over one base model work on, and whether they can: nothing is written."""

import copy
import os
from collections.abc import Mapping

import torch
import transformers

from ..models.adapt import check_adapter_name
from ..models.adapted import report, saved_modules
from ..models.adapters import add_adapter
from .config import FinetuneConfig
from .machine import processes
from .preparing import Prepared, class_names, load, on_base, put_adapter, read

SHARED = ("model", "task", "max_length", "target_modules", "experts", "bf16", "quantize", "gradient_checkpointing")
"""Settings that belong to the base model or to all of its adapters."""


def check_together(configs: Mapping[str, FinetuneConfig]) -> None:
    """ValueError or TypeError unless these runs, by name, can share a base model."""
    if not configs:
        raise ValueError("there are no runs: give at least one")
    if processes() > 1:
        raise ValueError(f"several runs over one base model take one process, and here are {processes()}")
    if next(iter(configs.values())).quantize == "8bit":
        raise ValueError(
            "several runs over one base model cannot have quantize '8bit', whose layers take one adapter: use '4bit'"
        )
    outputs: dict[str, str] = {}
    (first, one), *_ = configs.items()
    for name, config in configs.items():
        check_adapter_name(name)
        for setting in SHARED:
            mine, other = getattr(config, setting), getattr(one, setting)
            if mine != other:
                raise ValueError(
                    f"runs {first!r} and {name!r} have {setting} {other!r} and {mine!r}, which must be equal: they share the "
                    "base model"
                )
        if config.experts and name != first:
            raise ValueError(
                f"runs {first!r} and {name!r} have experts, whose rows are routed and take one adapter: train each run by "
                "itself, without --adapters"
            )
        if (other := outputs.setdefault(os.path.abspath(os.path.expanduser(config.output)), name)) != name:
            raise ValueError(f"runs {other!r} and {name!r} have one output, {config.output}: give each its own")


def prepare_together(configs: Mapping[str, FinetuneConfig]) -> dict[str, Prepared]:
    """Read all data, load the base model once, and put an adapter on it for each run, with the initial values of a single run.

    Raises:
        ValueError, TypeError: as `prepare`, and which run; runs have different classes; the model has a loss of a whole batch.
    """
    texts, classes = {}, {}
    for name, config in configs.items():
        try:
            texts[name] = read(config)
            classes[name] = class_names(config, texts[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"run {name!r}: {error}") from error
    (first, one), *_ = configs.items()
    for name, found in classes.items():
        if found != classes[first]:
            raise ValueError(
                f"runs {first!r} and {name!r} have classes {classes[first]} and {found}, which must be equal: their logits "
                "are one tensor"
            )
    base = load(one, classes[first])
    if one.task == "causal-lm" and getattr(base.model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{one.model} adds a loss of its router (output_router_logits in its config), which is of a whole batch with all "
            "runs in it: train each run by itself, without --adapters"
        )
    # What a single run draws its adapter from, and its head's initial values, by seed.
    starts = {one.seed: (torch.get_rng_state(), _heads(base))}
    for config in configs.values():
        if config.seed not in starts:
            if base.heads:
                other = load(config, classes[first])
                starts[config.seed] = torch.get_rng_state(), _heads(other)
                del other
            else:
                transformers.set_seed(config.seed)
                starts[config.seed] = torch.get_rng_state(), {}
    for name, config in configs.items():
        state, heads = starts[config.seed]
        torch.set_rng_state(state)
        if name == first:
            put_adapter(config, base, name)
        else:
            add_adapter(base.model, name, config.r, config.eta, config.norm)
        for key, head in saved_modules(base.model, name).items():
            head.load_state_dict(heads[key])
    whole = report(base.model)
    return {name: on_base(config, base, texts[name], whole) for name, config in configs.items()}


def _heads(base) -> dict[str, dict[str, torch.Tensor]]:
    return {name: copy.deepcopy(base.model.get_submodule(name).state_dict()) for name in base.heads}
