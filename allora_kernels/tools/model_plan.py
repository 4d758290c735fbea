"""`allora explain`: what would be adapted in a model, and what would run it, from its config alone."""

from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn

from ..models.adapt import apply_allora
from ..models.explained import ModelExplanation, explain
from ..training.base_model import model_source

if TYPE_CHECKING:
    from rich.console import Console


def meta_model(name: str, dtype: torch.dtype | None) -> nn.Module:
    """The model as its config describes it, on the meta device: no weight is read, no memory taken.

    Raises:
        ValueError: there is no such model, or transformers has no class for it.
    """
    source, where = model_source(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **where)
        architecture = (config.architectures or [None])[0]
        kind = getattr(transformers, architecture or "", None)
        with torch.device("meta"):
            model = kind(config) if kind else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} cannot be explained: {str(error).strip().splitlines()[0]}") from error
    return model.to(dtype or config.dtype or torch.float32)


def explain_model(
    console: "Console",
    name: str,
    rows: int,
    r: int,
    norm: str | None,
    target_modules: str | list[str],
    dtype: torch.dtype | None,
    device: torch.device,
    experts: bool = False,
) -> None:
    """Print on `console` (a rich Console) what `apply_allora` would do to the model, and a table of its linear layers.

    Raises:
        ValueError: as `meta_model`, `apply_allora` and `explain`.
    """
    model = meta_model(name, dtype)
    report = apply_allora(model, r, norm=norm, target_modules=target_modules, experts=experts)
    explanation = explain(model, rows, device)
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(_table(explanation, rows, device))
    for number, plan in enumerate(explanation.plans, start=1):
        console.print(f"plan {number}:", highlight=False)
        for step, what in plan:
            console.print(f"  {step}: {what}", highlight=False, soft_wrap=True)


def _table(explanation: ModelExplanation, rows: int, device: torch.device):
    from rich.table import Table

    plans = explanation.plans
    table = Table(
        "layers", "name", "[N, K]", "r", "fused", "why", title=f"{explanation.summary} ({device}, {rows} rows)"
    )
    for count, name, layer in explanation.grouped():
        plan = f", plan {plans.index(layer.plan) + 1}" if layer.plan else ""
        shape, rank = ", ".join(map(str, layer.shape)), "" if layer.r is None else str(layer.r)
        table.add_row(str(count), name, shape, rank, "yes" if layer.fused else "no", f"{layer.reason}{plan}")
    return table
