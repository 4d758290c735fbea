"""Which LoRA layers of a model run fused, and why the others do not."""

from dataclasses import dataclass

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...layer.functional import MAX_RANK
from ...models.adapted import grouped
from .dispatch import fused_class
from .fused import FusedLoraLayer


@dataclass(frozen=True)
class PeftReport:
    """`str()` of it has one line a kind of layer."""

    fused: dict[str, str]
    """Name of each layer whose next call is fused: its shape, rank, rule and backend."""
    not_fused: dict[str, str]
    """Name of each LoRA layer whose next call is PEFT's own: why."""

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} LoRA layers fused, {len(self.not_fused)} not"]
        for entries in (self.fused, self.not_fused):
            lines += [f"  {count} x {name}: {what}" for (name, what), count in grouped(entries).items()]
        return "\n".join(lines)


def explain(model: nn.Module) -> PeftReport:
    """What the next call of each LoRA layer of `model` takes, and why; ValueError if it has none."""
    fused, not_fused = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, FusedLoraLayer):
            what = module.extra_repr()
            shape = f"[{module.out_features}, {module.in_features}], r={'/'.join(map(str, module.r.values()))}"
            if what.startswith("fused: "):
                fused[name] = f"{shape}, {what.removeprefix('fused: ')}"
            else:
                not_fused[name] = f"{shape}, {what.removeprefix('not fused: ')}"
        elif isinstance(module, LoraLayer):
            not_fused[name] = reason_to_leave(module) or "PEFT's own layer: accelerate_lora(model) switches it"
    if not fused and not not_fused:
        raise ValueError("the model has no LoRA layers: adapt it with peft.get_peft_model or get_allora_model first")
    return PeftReport(fused, not_fused)


def reason_to_leave(layer: LoraLayer) -> str | None:
    """Why `accelerate_lora` leaves one of PEFT's layers alone; None where it switches it."""
    fused = fused_class(type(layer))
    if fused is None:
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} has another forward pass"
    if "forward" in layer.__dict__:
        return "a forward pass of its own was put on it"
    if reason := fused.base_kind.refusal(layer.base_layer):
        return reason
    dropped = {name: d.p for name, d in layer.lora_dropout.items() if getattr(d, "p", 0) > 0}
    if dropped:
        return f"lora_dropout={max(dropped.values())}: the kernels have no dropout; train with lora_dropout=0.0"
    if layer.lora_variant:
        return f"a LoRA variant, {', '.join(sorted({type(v).__name__ for v in layer.lora_variant.values()}))}"
    if any(layer.lora_bias.values()):
        return "lora_bias=True"
    if max(layer.r.values(), default=0) > MAX_RANK:
        return f"rank {max(layer.r.values())} is over {MAX_RANK}"
    return None
