"""What the section "per-sample" compares: a whole training step of one layer whose per-sample gradients are clipped.

Each provider's step gives dX and the clipped sums of the adapter's gradients; all but this library's run plain LoRA (C = 1),
which is less work than ALLoRA. Each is checked against a loop over samples in fp64 before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import per_sample, reference
from allora_kernels.testing import Inputs

from .judging import Expected, expectation, fault
from .providers import ETA, frozen_linear, own_layer
from .steps import Step, taken


class Batch(NamedTuple):
    """A layer's inputs with x [b, T, K] and g [b, T, N], and what to clip to."""

    inputs: Inputs
    max_norm: float


@dataclass(frozen=True)
class Spec:
    """How a provider is built and judged: `norm` is the rule whose gradients it must give, `clips` whether it clips them. Its
    error may be `tolerance` times that of the loop in the batch's own dtypes."""

    description: str
    build: Callable[[Batch], Step]
    norm: str | None = None
    clips: bool = True
    tolerance: float = 8.0
    needs_opacus: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run here; None where it can."""
        if self.needs_opacus:
            try:
                import opacus  # noqa: F401
            except ImportError:
                return "opacus is not installed"
        return None


def _ours(how: str) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        inputs = batch.inputs
        layer = own_layer(inputs)

        def step():
            if how == "plain":
                layer(inputs.x).backward(inputs.g)
            else:
                with per_sample.record(layer, norms_only=how == "norms only"):
                    layer(inputs.x).backward(inputs.g)
                per_sample.clip_(layer, batch.max_norm)
                per_sample.clear(layer)
            return taken(inputs.x, layer.lora_A, layer.lora_B)

        return step

    return build


class _LoRA(nn.Module):
    """LoRA out of nn.Linears, which every mode of Opacus knows."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.base = frozen_linear(inputs)
        (r, k), n = inputs.lora_A.shape, inputs.weight.shape[0]
        self.down, self.up = nn.Linear(k, r, bias=False, device="meta"), nn.Linear(r, n, bias=False, device="meta")
        self.down.weight, self.up.weight = (nn.Parameter(t.clone()) for t in (inputs.lora_A, inputs.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _opacus(functorch: bool) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        x, g = batch.inputs.x, batch.inputs.g
        layer = GradSampleModule(_LoRA(batch.inputs), loss_reduction="sum", force_functorch=functorch)
        parameters = [layer.down.weight, layer.up.weight]
        optimizer = DPOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=batch.max_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )

        def step():
            layer(x).backward(g)
            optimizer.clip_and_accumulate()
            sums = [p.summed_grad for p in parameters]
            optimizer.zero_grad(set_to_none=True)
            return *taken(x), *sums

        return step

    return build


def _ghost(batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    x, g = batch.inputs.x, batch.inputs.g
    layer = GradSampleModuleFastGradientClipping(
        _LoRA(batch.inputs), loss_reduction="sum", max_grad_norm=batch.max_norm, use_ghost_clipping=True
    )
    parameters = (layer.down.weight, layer.up.weight)

    def step():
        # What Opacus's own loss does: a pass for the norms, then one more of the weighted losses.
        y = layer(x)
        y.backward(g, retain_graph=True)
        weights = layer.get_clipping_coef()
        dx, *_ = taken(x, *parameters)
        layer.disable_hooks()
        y.backward(g * weights.to(g.dtype)[:, None, None])
        layer.enable_hooks()
        for p in parameters:
            del p._norm_sample
        return dx, *taken(x, *parameters)[1:]

    return step


def _vmap(batch: Batch) -> Step:
    weight, bias = batch.inputs.weight, batch.inputs.bias

    def loss(x, a, b, g):
        return ((F.linear(x, weight, bias) + (x @ a.mT) @ b.mT) * g).sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None, 0))

    def step():
        inputs = batch.inputs
        dx, *samples = grads(inputs.x.detach(), inputs.lora_A, inputs.lora_B, inputs.g)
        norms = torch.stack([t.flatten(1).norm(dim=1) for t in samples]).norm(dim=0)
        weights = batch.max_norm / norms.clamp_min(batch.max_norm)
        return dx, *(torch.tensordot(weights, t, dims=1) for t in samples)

    return step


PROVIDERS = {
    "plain": Spec("FusedALLoRALinear, an ordinary step without clipping: the floor", _ours("plain"), "row", False, 2.0),
    "ours": Spec("`per_sample.record` and `clip_`, gradients kept", _ours("kept"), "row", tolerance=2.0),
    "ours-norms-only": Spec(
        "the same with `norms_only`: no gradient of a sample kept", _ours("norms only"), "row", tolerance=2.0
    ),
    "opacus-hooks": Spec("Opacus, mode `hooks`, on LoRA of `nn.Linear`s", _opacus(functorch=False), needs_opacus=True),
    "opacus-functorch": Spec("Opacus, mode `functorch`, on the same", _opacus(functorch=True), needs_opacus=True),
    "opacus-ghost": Spec("Opacus, mode `ghost`, on the same", _ghost, needs_opacus=True),
    "vmap-grad": Spec("`torch.func.vmap(grad)` of LoRA in plain torch, then clipping", _vmap),
}


def typical_norm(inputs: Inputs) -> float:
    """A median norm of a sample's gradient: clipping to it changes at least half of the samples under each rule."""
    return min(_loop(inputs, norm, None)[1].median().item() for norm in ("row", None))


class Judge:
    """Compares providers with a loop over the samples in fp64, done once for each rule, clipped or not."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._expected: dict[tuple, list[Expected]] = {}

    def verdict(self, spec: Spec, step: Step) -> str | None:
        """What is wrong with the provider's results, in words; None if nothing is."""
        key = (spec.norm, spec.clips)
        if key not in self._expected:
            inputs, max_norm = self._batch.inputs, self._batch.max_norm if spec.clips else None
            with torch.no_grad():
                eager, _ = _loop(inputs, spec.norm, max_norm)
                exact, _ = _loop(inputs.to(torch.float64), spec.norm, max_norm)
            self._expected[key] = expectation(("dx", "dA", "dB"), eager, exact)
        return fault(self._expected[key], step(), spec.tolerance)


@torch.no_grad()
def _loop(inputs: Inputs, norm: str | None, max_norm: float | None) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(dX, Σ dA, Σ dB) with each sample's (dA, dB) clipped to `max_norm` if one is given, and the norms before [b]."""
    lora_A, lora_B, dtype = inputs.lora_A, inputs.lora_B, inputs.lora_A.dtype
    c = None if norm is None else reference.weight_coefficient(lora_A, lora_B, ETA, norm)
    wide = torch.promote_types(dtype, torch.float32)
    total_a, total_b = (torch.zeros_like(t, dtype=wide) for t in (lora_A, lora_B))
    rows, norms = [], []
    for x, g in zip(inputs.x, inputs.g):
        s = reference.down_project(x, lora_A, dtype)
        ds, da, db = reference.adapter_grads(g, x, s, lora_B, c, ETA, norm, True, dtype, dtype)
        rows.append(reference.fused_linear(g, inputs.weight.mT, None, ds, lora_A.mT))
        squared = sum(t.to(wide).square().sum() for t in (da, db))
        norms.append(squared.sqrt())
        weight = 1.0 if max_norm is None else max_norm / norms[-1].clamp_min(max_norm)
        total_a += weight * da
        total_b += weight * db
    return (torch.stack(rows), total_a.to(dtype), total_b.to(dtype)), torch.stack(norms)
