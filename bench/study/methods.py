"""A method: which parameters are trained, with which adapter, in which groups of the optimizer."""

import copy
import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .tasks import Task, label_names, model_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

RANK = 8
LORAPLUS_RATIO = 16
NORMS, ETAS_SQUARED = ("row", "matrix", "factor", "entry", "token"), (1, 2, 4)


@dataclass(frozen=True)
class Method:
    """What is trained. LoRA, DoRA and LoRA+ are PEFT's own, ALLoRA is this library's."""

    name: str
    kind: str
    """frozen (nothing), head (the classifier alone), full, lora, dora, lora+, allora or allora+."""
    alpha: float = 1.0
    """alpha/r."""
    dropout: float = 0.0
    norm: str | None = None
    eta_squared: float | None = None
    side: str | None = None
    """Where ALLoRA's coefficient is applied: None for both factors, else A or B."""

    def settings(self) -> dict[str, Any]:
        """What belongs to the identity of a cell, with what no method varies."""
        fixed = {"r": RANK} if self.kind not in ("frozen", "head", "full") else {}
        fixed |= {"ratio": LORAPLUS_RATIO} if self.kind in ("lora+", "allora+") else {}
        return {**asdict(self), **fixed}


def allora(norm: str, eta_squared: float, side: str | None = None) -> Method:
    """ALLoRA by its rule."""
    place = "" if side is None else f", on {side} only"
    return Method(f"ALLoRA {norm} η²={eta_squared:g}{place}", "allora", norm=norm, eta_squared=eta_squared, side=side)


FROZEN, HEAD, FULL = Method("frozen", "frozen"), Method("head only", "head"), Method("full fine-tuning", "full")
LORA, LORA_2 = Method("LoRA", "lora"), Method("LoRA α/r=2", "lora", alpha=2.0)
LORA_DROPOUT = Method("LoRA dropout 0.1", "lora", dropout=0.1)
LORA_2_DROPOUT = Method("LoRA α/r=2 dropout 0.1", "lora", alpha=2.0, dropout=0.1)
DORA, LORA_PLUS = Method("DoRA", "dora"), Method("LoRA+", "lora+")
ALLORA_RULES = tuple(allora(norm, eta) for norm in NORMS for eta in ETAS_SQUARED)
ALLORA = allora("row", 4)
ALLORA_PLUS = replace(ALLORA, name=f"{ALLORA.name} with LoRA+", kind="allora+")
ALLORA_SIDES = (allora("row", 4, "A"), allora("row", 4, "B"))
METHODS = {
    m.name: m
    for m in (
        FROZEN, HEAD, FULL, LORA, LORA_2, LORA_DROPOUT, LORA_2_DROPOUT, DORA, LORA_PLUS, *ALLORA_RULES, *ALLORA_SIDES,
        ALLORA_PLUS,
    )
}  # fmt: skip


# --- the model ------------------------------------------------------------------------------------------------------


@functools.cache
def _base(task: Task, classes: int) -> "nn.Module":
    import torch
    import transformers

    folder = model_folder(task.model)
    if task.kind == "classification":
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(folder, num_labels=classes, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(task: Task, method: Method, seed: int) -> "nn.Module":
    """The model to train. One seed gives every method the same head, and every adapter the same A."""
    import transformers

    model = copy.deepcopy(_base(task, len(label_names(task))))
    transformers.set_seed(seed)
    for head in heads(model):
        # As transformers draws a head that the checkpoint does not have.
        head.weight.data.normal_(0.0, model.config.initializer_range)
        head.bias.data.zero_()
    return adapt(model, method, "classifier" if task.kind == "classification" else None)


def heads(model: "nn.Module") -> "list[nn.Linear]":
    """The classification head, as a list of one or none; of a PeftModel the copy that is trained."""
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "classifier"]
    return [getattr(module, "modules_to_save", {"default": module})["default"] for module in named]


def adapt(model: "nn.Module", method: Method, head: str | None) -> "nn.Module":
    """`model` with the parameters of `method`, and the head, left to train."""
    from peft import LoraConfig, get_peft_model

    from allora_kernels.integrations.peft import get_allora_model

    if method.kind in ("frozen", "head"):
        for name, p in model.named_parameters():
            p.requires_grad_(method.kind == "head" and head is not None and name.startswith(f"{head}."))
        return model
    if method.kind == "full":
        return model
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK * method.alpha,
        lora_dropout=method.dropout,
        use_dora=method.kind == "dora",
        target_modules="all-linear",
        modules_to_save=[head] if head else None,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
    )
    if method.norm is None:
        return get_peft_model(model, config)
    eta = math.sqrt(method.eta_squared)
    # The coefficient does not leave dA as a factor of its rows, so "A only" is the rule with dB's factor divided out
    # again, and "B only" is plain LoRA with dB's factor put in.
    model = get_allora_model(model, config, eta=eta, norm=None if method.side == "B" else method.norm)
    if method.side is not None:
        _rescale_b(model, eta, method.norm, divide=method.side == "A")
    return model


def _rescale_b(model: "nn.Module", eta: float, norm: str, divide: bool) -> None:
    """Multiply, or divide, each gradient of lora_B by the coefficient of its row."""
    from allora_kernels.reference import weight_coefficient

    def rescaled(layer):
        lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

        def hook(gradient):
            c = weight_coefficient(lora_A.detach(), lora_B.detach(), eta, norm)[:, None].to(gradient.dtype)
            return gradient / c if divide else gradient * c

        lora_B.register_hook(hook)

    if norm not in ("row", "matrix"):
        raise ValueError(f"the coefficient on one factor only is for the rules row and matrix, got {norm!r}")
    for layer in adapted_layers(model).values():
        rescaled(layer)


def adapted_layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """Every layer with an adapter, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


# --- the optimizer --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": {"betas": [0.9, 0.999], "weight_decay": 0.0, "head_learning_rate": 1e-2},
    "sgd": {"momentum": 0.9, "weight_decay": 0.0, "head_learning_rate": 0.3},
}
"""Settings of each; the head's learning rate is the same for every method, so that what is tuned is the method's own."""
RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)}
"""The grid of learning rates, one for all methods."""


def make_optimizer(model: "nn.Module", method: Method, name: str, rate: float) -> "torch.optim.Optimizer":
    """The optimizer of `method`: PEFT's where its learning rates are LoRA+'s; the head in a group of its own, except where
    it is all there is."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    settings = dict(OPTIMIZERS[name])
    head_rate = settings.pop("head_learning_rate")
    cls = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    if method.kind in ("lora+", "allora+"):
        decay = settings.pop("weight_decay")
        optimizer = create_loraplus_optimizer(
            model, cls, lr=rate, loraplus_lr_ratio=LORAPLUS_RATIO, loraplus_weight_decay=decay, **settings
        )
    else:
        optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=rate, **settings)
    if method.kind != "head" and (in_head := {p for head in heads(model) for p in head.parameters()}):
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in in_head]
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({"params": list(in_head), "lr": head_rate})
    return optimizer
