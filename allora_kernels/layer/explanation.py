"""What a call would do and why, in words and data."""

from dataclasses import dataclass

import torch

from . import backend as _backend


@dataclass(frozen=True)
class Explanation:
    """`backend` and `reason` as the call would choose them; `plan` maps each step to what runs it."""

    backend: str
    reason: str
    fallback: bool
    plan: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.reason})"]
        lines += [f"  {step}: {what}" for step, what in self.plan.items()]
        return "\n".join(lines)


def explain(
    rows: int,
    out_features: int,
    in_features: int,
    r: int,
    norm: str | None,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> Explanation:
    """The `Explanation` of one call on ``x [rows, in_features]``."""
    compute = torch.promote_types(dtype, adapter_dtype)
    choice = _backend.choose(device, compute)
    if choice.name == "triton":
        from csrc_triton import plan_steps

        plan = plan_steps(rows, out_features, in_features, r, norm, dtype, compute, device)
    else:
        plan = dict.fromkeys(("adapted_linear", "fused_linear", "adapter_grads"), "torch")
    return Explanation(choice.name, choice.reason, choice.fallback, plan)


def explain_disabled() -> Explanation:
    """The `Explanation` of a call on a disabled layer."""
    plan = {"frozen_linear": "torch"}
    return Explanation("eager", "the adapter is disabled: the frozen layer alone", False, plan)
