"""What runs each LoRA layer of a model, and why."""

from dataclasses import dataclass

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...layer import bases
from ...layer.functional import MAX_RANK
from ...models.adapted import grouped
from .dispatch import fused_class
from .fused import FusedLoraLayer


@dataclass(frozen=True)
class PeftReport:
    """`str()` of it has one line a kind of layer. "Fused" means what it does in `allora_kernels.explain`."""

    fused: dict[str, str]
    """Name of each layer whose next call the kernels run, the frozen product too: its shape, rank and rule, and why."""
    not_fused: dict[str, str]
    """Name of each layer whose next call is this library's, by eager torch or on the frozen layer's own product: likewise."""
    pefts: dict[str, str]
    """Name of each LoRA layer whose next call is PEFT's own: why."""

    @property
    def ours(self) -> dict[str, str]:
        """All layers whose next call is not PEFT's own."""
        return {**self.fused, **self.not_fused}

    def __str__(self) -> str:
        layers = len(self.ours) + len(self.pefts)
        lines = [f"{len(self.fused)} of {layers} LoRA layers fused; {len(self.pefts)} run PEFT's own forward pass"]
        for entries in (self.fused, self.not_fused, self.pefts):
            lines += [f"  {count} x {name}: {what}" for (name, what), count in grouped(entries).items()]
        return "\n".join(lines)


def explain(model: nn.Module, rows: int = 2048) -> PeftReport:
    """What the next call of each LoRA layer of `model` on `rows` rows takes, and why; ValueError if it has none."""
    fused, not_fused, pefts = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, FusedLoraLayer):
            _, factors, reason = module._next_call()
            what = f"[{module.out_features}, {module.in_features}], r={'/'.join(map(str, module.r.values()))}"
            if reason is not None:
                pefts[name] = f"{what}, {reason}"
                continue
            found = module.explain(rows)
            what = f"{what}, {module._in_words(factors)}"
            why = found.why(bases.name_of(module.base_layer))
            if found.fused:
                fused[name] = f"{what}, fused: {why}"
            else:
                not_fused[name] = f"{what}, not fused: {why}"
        elif isinstance(module, LoraLayer):
            pefts[name] = reason_to_leave(module) or "PEFT's own layer: accelerate_lora(model) switches it"
    if not (fused or not_fused or pefts):
        raise ValueError("the model has no LoRA layers: adapt it with peft.get_peft_model or get_allora_model first")
    return PeftReport(fused, not_fused, pefts)


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
