"""What is compared: one linear layer with an adapter, as each library or order of operations would run it.

A provider is named by what it does, and an entry of `PROVIDERS`. Each is checked against fp64 before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import FusedALLoRALinear, reference
from allora_kernels.layer import backend
from allora_kernels.testing import Inputs, with_factors

from . import orders
from .judging import Expected, expectation, fault
from .orders import ETA


@dataclass(frozen=True)
class Provider:
    """`forward(x)` is the adapted layer; `parameters` holds lora_A, lora_B and whatever else it trains, or nothing for the
    frozen floor; `plan` says what runs each step, where that is a choice."""

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()
    plan: dict[str, str] | None = None


@dataclass(frozen=True)
class Spec:
    """How a provider is built and judged.

    `formula` names what it computes: "frozen", "allora" (rule "row"), "lora" or "dora". Its error may be `tolerance` times
    that of the formula in plain torch of the same dtypes: foreign code is asked whether it computes the formula, not
    where it rounds. `adapter_dtype` overrides the case's. `autocast`: its forward pass runs under torch.autocast, so that it
    computes, and is judged, with factors of x's dtype.
    """

    description: str
    build: Callable[[Inputs], Provider]
    formula: str
    tolerance: float = 8.0
    adapter_dtype: torch.dtype | None = None
    needs: str | None = None
    autocast: bool = False

    def inputs(self, inputs: Inputs) -> Inputs:
        """The case's inputs with this provider's dtype of the adapter."""
        if self.adapter_dtype is None:
            return inputs
        a, b = (t.to(self.adapter_dtype) for t in (inputs.lora_A, inputs.lora_B))
        return inputs._replace(lora_A=a, lora_B=b)

    def obstacle(self, inputs: Inputs) -> str | None:
        """Why it cannot run on these inputs here; None where it can."""
        if self.needs == "peft":
            try:
                import peft  # noqa: F401
            except ImportError:
                return "peft is not installed"
        if self.needs == "triton":
            choice = backend.choose(inputs.x.device, inputs.x.dtype)
            if choice.name != "triton":
                return f"needs Triton's kernels: {choice.reason}"
        if self.autocast:
            if inputs.x.dtype == torch.float32:
                return "in fp32 autocast would compute the frozen layer in 16 bits, too"
        elif self.adapter_dtype is not None and self.adapter_dtype == inputs.lora_A.dtype:
            return "the same as the provider with the case's own adapter dtype"
        return None


def _frozen(inputs: Inputs) -> Provider:
    return Provider(lambda x: F.linear(x, inputs.weight, inputs.bias))


def frozen_linear(inputs: Inputs) -> nn.Linear:
    """The frozen layer itself, sharing `inputs`' weight and bias."""
    n, k = inputs.weight.shape
    linear = nn.Linear(k, n, bias=inputs.bias is not None, device="meta")
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        linear.bias = nn.Parameter(inputs.bias, requires_grad=False)
    return linear


def own_layer(inputs: Inputs) -> FusedALLoRALinear:
    """This library's layer on the frozen one, with copies of `inputs`' factors."""
    a, b = inputs.lora_A, inputs.lora_B
    layer = FusedALLoRALinear.from_linear(frozen_linear(inputs), r=len(a), eta=ETA, adapter_dtype=a.dtype)
    return with_factors(layer, a, b)


def _ours(inputs: Inputs) -> Provider:
    layer = own_layer(inputs)
    plan = layer.explain(rows=len(inputs.x)).plan
    return Provider(layer, (layer.lora_A, layer.lora_B), plan)


def _of_function(function: type[torch.autograd.Function], compile: bool = False) -> Callable[[Inputs], Provider]:
    def build(inputs: Inputs) -> Provider:
        lora_A, lora_B = (t.clone().requires_grad_() for t in (inputs.lora_A, inputs.lora_B))
        apply = function.apply
        if compile:
            # Each case is a fresh compilation; left alone, they would run into one function's limit of recompilations.
            torch.compiler.reset()
            apply = torch.compile(lambda *tensors: function.apply(*tensors), fullgraph=True, dynamic=False)
        return Provider(lambda x: apply(x, inputs.weight, inputs.bias, lora_A, lora_B), (lora_A, lora_B))

    return build


def peft_layer(linear: nn.Module, inputs: Inputs, use_dora: bool = False) -> nn.Module:
    """PEFT's LoRA layer on `linear`, dropout 0 and scaling 1, with `inputs`' factors."""
    from peft import LoraConfig, inject_adapter_in_model

    r = inputs.lora_A.shape[0]
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=["linear"], use_dora=use_dora)
    model = nn.ModuleDict({"linear": linear})
    # By which PEFT tells a model of bitsandbytes' layers.
    model.is_loaded_in_4bit = type(linear).__name__ == "Linear4bit"
    layer = inject_adapter_in_model(config, model)["linear"]
    layer.lora_A["default"].weight = nn.Parameter(inputs.lora_A.clone())
    layer.lora_B["default"].weight = nn.Parameter(inputs.lora_B.clone())
    return layer


def _peft(use_dora: bool = False, autocast: bool = False) -> Callable[[Inputs], Provider]:
    def build(inputs: Inputs) -> Provider:
        layer = peft_layer(frozen_linear(inputs), inputs, use_dora)
        magnitude = (layer.lora_magnitude_vector["default"].weight,) if use_dora else ()

        def under_autocast(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, x.dtype):
                return layer(x)

        forward = under_autocast if autocast else layer
        return Provider(forward, (layer.lora_A["default"].weight, layer.lora_B["default"].weight, *magnitude))

    return build


PROVIDERS = {
    "frozen": Spec("the same nn.Linear without an adapter, by the vendor's GEMM: the floor", _frozen, "frozen"),
    "ours": Spec("FusedALLoRALinear, C computed anew in each step", _ours, "allora", tolerance=2.0),
    "eager": Spec(
        "ALLoRA in plain torch as the paper writes it: BA made in fp32 for its norms, all of G scaled",
        _of_function(orders.EagerALLoRA),
        "allora",
    ),
    "compile": Spec("torch.compile of eager", _of_function(orders.EagerALLoRA, compile=True), "allora"),
    "eager-gram": Spec(
        "ALLoRA in plain torch in a cheaper order, this library's reference: no BA, C on rows of B and dB",
        _of_function(orders.GramALLoRA),
        "allora",
    ),
    "compile-gram": Spec("torch.compile of eager-gram", _of_function(orders.GramALLoRA, compile=True), "allora"),
    "peft": Spec("PEFT's LoRA layer, dropout 0, adapter in the case's dtype", _peft(), "lora", needs="peft"),
    "peft-fp32": Spec(
        "PEFT's LoRA layer as PEFT leaves it, without autocast: an fp32 adapter",
        _peft(),
        "lora",
        adapter_dtype=torch.float32,
        needs="peft",
    ),
    "peft-autocast": Spec(
        "the same under torch.autocast, as a Trainer with `bf16=True` runs it",
        _peft(autocast=True),
        "lora",
        adapter_dtype=torch.float32,
        needs="peft",
        autocast=True,
    ),
    "peft-dora": Spec("PEFT's DoRA layer", _peft(use_dora=True), "dora", needs="peft"),
    "addmm-in-place": Spec(
        "LoRA: vendor GEMM, then a rank-R addmm into y and into dX", _of_function(orders.AddmmInPlace), "lora"
    ),
    "epilogue-atomics": Spec(
        "LoRA: low-rank epilogue in both GEMMs; dS, dB and dA by fp32 atomics",
        _of_function(orders.EpilogueAtomics),
        "lora",
        needs="triton",
    ),
}  # fmt: skip


def forward_backward(provider: Provider, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """(y, dx, dA, dB, ...) of one forward and backward pass; of the frozen layer (y, dx)."""
    y = provider.forward(x)
    return y, *torch.autograd.grad(y, (x, *provider.parameters), g)


def by_formula(formula: str, inputs: Inputs, magnitude: Tensor | None) -> tuple[Tensor, ...]:
    """(y, dx, dA, dB) in plain torch, in the inputs' dtypes."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    if formula == "frozen":
        y = F.linear(x, inputs.weight, inputs.bias)
        return y, *torch.autograd.grad(y, x, inputs.g)
    if formula == "dora":
        merged = inputs.weight + (lora_B @ lora_A).detach()
        scale = (magnitude / merged.norm(dim=1)).to(x.dtype)
        y = scale * (x @ inputs.weight.mT + ((x.to(lora_A.dtype) @ lora_A.mT) @ lora_B.mT).to(x.dtype)) + inputs.bias
    else:
        norm = "row" if formula == "allora" else None
        y = reference.allora_linear(x, inputs.weight, inputs.bias, lora_A, lora_B, eta=ETA, norm=norm)
    return y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.g)


class Judge:
    """Compares providers' results on one layer with fp64, which it computes once for each formula and adapter dtype."""

    def __init__(self) -> None:
        self._expected: dict[tuple, list[Expected]] = {}

    def verdict(self, spec: Spec, provider: Provider, inputs: Inputs) -> str | None:
        """What is wrong with the provider's results on `inputs`, in words; None if nothing is."""
        x = inputs.x.detach().requires_grad_()
        results = forward_backward(provider, x, inputs.g)
        return fault(self._expectation(spec, provider, inputs), results, spec.tolerance)

    def _expectation(self, spec: Spec, provider: Provider, inputs: Inputs) -> list[Expected]:
        key = (spec.formula, inputs.lora_A.dtype, spec.autocast)
        if key not in self._expected:
            magnitude = provider.parameters[2].detach() if spec.formula == "dora" else None
            eager = by_formula(spec.formula, inputs.to(inputs.x.dtype) if spec.autocast else inputs, magnitude)
            wide = None if magnitude is None else magnitude.double()
            exact = by_formula(spec.formula, inputs.to(torch.float64), wide)
            self._expected[key] = expectation(("y", "dx", "dA", "dB")[: len(exact)], eager, exact)
        return self._expected[key]
