"""What a call would do and why, in words and data."""

from dataclasses import dataclass, replace

import torch

from . import backend as _backend


@dataclass(frozen=True)
class Explanation:
    """`backend` and `reason` as the call would choose them; `plan` maps each step to what runs it."""

    backend: str
    reason: str
    fallback: bool
    plan: dict[str, str]
    own_product: str | None = None
    """Why a layer of another library computes y and dX itself, where it does."""

    @property
    def fused(self) -> bool:
        """Whether the kernels run the layer, the frozen product too."""
        return self.backend == "triton" and self.own_product is None

    def why(self, base: str) -> str:
        """`reason`, and what of the layer another library's `base` computes, if it does."""
        if self.own_product is None:
            return self.reason
        why = "" if self.own_product == self.reason else f" ({self.own_product})"
        return f"{base} computes y and dx{why}, the adapter is added by {self.backend}: {self.reason}"

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.reason})"]
        lines += [f"  {step}: {what}" for step, what in self.plan.items()]
        return "\n".join(lines)


def _choose(device: torch.device, dtype: torch.dtype) -> _backend.Choice:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, of which the plan "
            "depends: explain on a machine that has one, or leave device out"
        )
    return _backend.choose(device, dtype)


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
    """The `Explanation` of one call on ``x [rows, in_features]``; ValueError where torch sees no such GPU as `device`."""
    compute = torch.promote_types(dtype, adapter_dtype)
    choice = _choose(device, compute)
    if choice.name == "triton":
        from csrc_triton import LayerCall, plan_steps

        plan = plan_steps(LayerCall(rows, out_features, in_features, r, norm, dtype, compute), device)
    else:
        plan = dict.fromkeys(("adapted_linear", "fused_linear", "adapter_grads"), "torch")
    return Explanation(choice.name, choice.reason, choice.fallback, plan)


def explain_dequantized(base: str, by: str, *call) -> Explanation:
    """`explain` of a call on another library's `base`, whose weight is dequantized `by` something."""
    found, dtype = explain(*call), call[-2]
    weight = f"{base}, dequantized once a pass by {by}, for an x in {dtype}"
    return replace(found, plan={"weight": weight, **found.plan})


def explain_disabled(base: str = "torch") -> Explanation:
    """The `Explanation` of a call on a disabled layer, whose frozen product `base` computes."""
    plan = {"frozen_linear": base}
    return Explanation("eager", "the adapter is disabled: the frozen layer alone", False, plan)


def explain_wrapped(
    rows: int,
    out_features: int,
    in_features: int,
    r: int,
    norm: str | None,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    base: str,
    why: str,
    in_place: bool,
) -> Explanation:
    """The `Explanation` of a call on a layer whose y and dX another library's `base` computes; `why` it does."""
    compute = torch.promote_types(dtype, adapter_dtype)
    choice = _choose(device, compute)
    where = "in place" if in_place else "into a copy, as the layer or a hook may keep what it returned"
    if choice.name == "triton":
        from csrc_triton import LayerCall, plan_added_steps

        plan = plan_added_steps(LayerCall(rows, out_features, in_features, r, norm, dtype, compute), device)
    else:
        plan = dict.fromkeys(("down_project", "low_rank_add (y)", "adapter_grads", "low_rank_add (dx)"), "torch")
    plan = {step: f"{what}, {where}" if "low_rank_add" in step else what for step, what in plan.items()}
    product = f"{base}, its own product" + ("" if why == choice.reason else f" ({why})")
    return Explanation(choice.name, choice.reason, choice.fallback, {"y and dx": product, **plan}, why)
