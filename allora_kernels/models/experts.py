"""Adapters on the experts of a mixture, which transformers keeps as 3-D parameters, by way of its own registry of experts
functions (`ALL_EXPERTS_FUNCTIONS`): the gate, the routing weights and the layout of the parameters stay transformers'.

An experts module stays what it is and where it is. It gets a child, `allora`, with an `ExpertsAdapter` for each adapted
parameter, and in the place of its config one that asks the registry for `_experts_forward` and is the former one in all else.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.linear import apply
from ..layer import batch_invariance, switching
from ..layer.adapter import ALLoRALayer
from ..layer.by_group import by_group
from ..layer.explanation import Explanation, explain, explain_disabled

IMPLEMENTATION = "allora"
"""Name of our entry in transformers' registry."""
ADAPTERS = "allora"
"""Name of the child of an experts module that holds its adapters, by the name of the parameter."""
_BEFORE_MERGING = "_allora_experts_before_merging"
"""Attribute of a merged experts module: its adapters and its frozen parameters, in a tuple, so that neither is of the model."""


class ExpertsAdapter(ALLoRALayer):
    """The adapters of one stack of weights: ``lora_A [E, r, in_features]``, ``lora_B [E, out_features, r]``, for the E experts.

    The frozen stack stays a parameter of the experts module, whose forward pass uses both.
    """

    grouped = True

    def __init__(
        self,
        sizes: tuple[int, int, int],
        transposed: bool,
        r: int,
        eta: float,
        norm: str | None,
        **like,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.experts, self.out_features, self.in_features = sizes
        self.r, self.eta, self.norm = r, float(eta), norm
        self.lora_A = nn.Parameter(torch.empty(self.experts, r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.experts, self.out_features, r, **like))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter as PEFT does: A Kaiming-uniform(a=√5) over each row's in_features, B zero."""
        nn.init.kaiming_uniform_(self.lora_A.view(-1, self.in_features), a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def in_layout(self, stack: Tensor) -> Tensor:
        """``[E, out_features, in_features]`` as the parameter stores it, or that from a stored one."""
        return stack.mT if self.transposed else stack

    @torch.no_grad()
    def merged(self, stack: Tensor) -> Tensor:
        """``W + BA`` of every expert, in the layout and dtype of `stack`; summed in float32 or wider, an expert at a time."""
        total = torch.empty_like(stack)
        wide = torch.promote_types(stack.dtype, torch.float32)
        for into, weight, a, b in zip(self.in_layout(total), self.in_layout(stack), self.lora_A, self.lora_B):
            into.copy_(weight.to(wide) + b.to(wide) @ a.to(wide))
        return total

    def explain(self, rows: int = 2048, device: torch.device | None = None) -> Explanation:
        """Which backend a call takes and why, for `rows` rows: a token counts once for every expert it is sent to."""
        if not self.enabled and not batch_invariance.enabled():
            return explain_disabled("the experts implementation of the model's config")
        device, dtype = device or self.lora_A.device, self.lora_A.dtype
        found = explain(rows, self.out_features, self.in_features, self.r, self.norm, device, dtype, dtype)
        runs = "torch, an expert at a time" if found.backend == "eager" else "Triton, all experts in one launch"
        steps = (
            "grouped_down_project",
            "grouped_fused_linear (y)",
            "grouped_fused_linear (dx)",
            "grouped_adapter_grads",
        )
        return Explanation(found.backend, found.reason, found.fallback, dict.fromkeys(steps, runs))

    def extra_repr(self) -> str:
        sizes = f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._in_words()}"


def goes_through_registry(module: nn.Module) -> bool:
    """Whether the forward pass of `module` asks transformers' registry of experts functions what to run."""
    forward = type(module).forward
    if not hasattr(forward, "__wrapped__") or not hasattr(module, "is_transposed"):
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") is ALL_EXPERTS_FUNCTIONS


# --- the forward pass -----------------------------------------------------------------------------------------------


def _experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Our entry in the registry: ``hidden_states [T, H]``, each token's experts ``top_k_index [T, k]`` and their weights
    ``[T, k]`` -> ``[T, H]``. Rows are sorted by expert, and a token's experts summed in order: nothing depends on chance."""
    adapters = experts._modules.get(ADAPTERS)
    if adapters is None:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} is for experts with adapters: apply_allora(model, experts=True) sets it"
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise RuntimeError(
            "experts with adapters were spread over processes (expert parallelism), and their adapters were not: not supported"
        )
    active = {name: a for name, a in adapters.items() if switching.state_of_call(a, a._state).enabled}
    if not active and not batch_invariance.enabled():
        return _former_forward(experts)(experts, hidden_states, top_k_index, top_k_weights)
    if any(p.is_meta for adapter in active.values() for p in adapter.parameters()) and not hidden_states.is_meta:
        raise RuntimeError(
            "the adapters of these experts are on the meta device, as where accelerate offloaded the model after apply_allora: "
            "offloading experts with adapters is not supported; load the model on one device"
        )

    tokens, k = top_k_index.shape
    order, offsets, sinks = _rows_by_expert(active, top_k_index, experts.num_experts)

    def product(x: Tensor, name: str) -> Tensor:
        stack = getattr(experts, name)
        weight = stack.mT if experts.is_transposed else stack
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        if (adapter := active.get(name)) is not None:
            factors, rule = (adapter.lora_A, adapter.lora_B), {"eta": adapter.eta, "norm": adapter.norm}
        else:
            # The same kernels without an adapter.
            shapes = ((weight.shape[0], 1, weight.shape[2]), (weight.shape[0], weight.shape[1], 1))
            factors, rule = tuple(weight.new_zeros(shape) for shape in shapes), {"eta": 1.0, "norm": None}
        return apply(x, weight, bias, *factors, offsets, **rule, sink=sinks.get(name))

    h = product(hidden_states[order // k], "gate_up_proj" if experts.has_gate else "up_proj")
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    y = product(h, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(tokens, k, y.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _rows_by_expert(
    adapters: dict[str, ExpertsAdapter], top_k_index: Tensor, experts: int
) -> tuple[Tensor, Tensor, dict[str, Callable]]:
    """``(order [T * k], offsets [experts], sinks)``: the order that sorts the rows by expert, where each expert's end, and what
    records the gradients of the `adapters` that are recorded."""
    if recorded := {name: adapter for name, adapter in adapters.items() if adapter._recording is not None}:
        return next(iter(recorded.values()))._recording.routed(recorded, top_k_index, experts)
    return *by_group(top_k_index.reshape(-1), experts), {}


def _former_forward(experts: nn.Module):
    """What the config names without our adapters: another entry of the registry, or the class's own loop."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    implementation = experts.config.former._experts_implementation
    if implementation == IMPLEMENTATION:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} in the model's config leaves nothing to run while the adapters are "
            "switched off: set_experts_implementation('grouped_mm'); adapted experts need no setting"
        )
    return ALL_EXPERTS_FUNCTIONS.get_interface(implementation, type(experts).forward.__wrapped__)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


class _ExpertsConfig:
    """The config of experts with adapters: `former`, the model's own, in all but the implementation. A change of the model's
    config, as generation makes one, holds for the experts without adapters and while these are switched off."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, former: Any) -> None:
        self.former = former
        _register()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "former":  # What copy and pickle ask of an object that is not filled yet.
            raise AttributeError(name)
        return getattr(self.former, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # The process that reads a pickle may not have.


# --- putting them on and taking them off ----------------------------------------------------------------------------


def put_adapters(experts: nn.Module, adapters: nn.ModuleDict) -> None:
    """Make `experts` use `adapters`, which are by the names of its parameters."""
    experts.add_module(ADAPTERS, adapters.train(experts.training))
    experts.config = _ExpertsConfig(experts.config)


def _take_adapters(experts: nn.Module) -> nn.ModuleDict:
    adapters = experts._modules.pop(ADAPTERS)
    experts.config = experts.config.former
    return adapters


def experts_with_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of `model` that have adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m.__dict__.get("config"), _ExpertsConfig)}


def merge_experts(experts: nn.Module, keep: bool) -> None:
    """Put ``W + BA`` in the place of the adapted parameters, and the former implementation in that of ours."""
    adapters = _take_adapters(experts)
    frozen = {}
    for name, adapter in adapters.items():
        frozen[name] = experts._parameters[name]
        experts._parameters[name] = nn.Parameter(adapter.merged(frozen[name]), requires_grad=False)
        if not keep:
            frozen.pop(name)
    if keep:
        setattr(experts, _BEFORE_MERGING, (adapters, frozen))


def merged_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of `model` that were merged with ``keep=True``, by name."""
    return {name: m for name, m in model.named_modules() if _BEFORE_MERGING in m.__dict__}


def forget_merged(experts: nn.Module) -> None:
    """Let go of what `merge_experts` kept, if it did."""
    experts.__dict__.pop(_BEFORE_MERGING, None)


def dtypes_before_merging(experts: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    """Of a merged experts module: the dtype its frozen parameters had, and the one that the merged ones have."""
    _, frozen = experts.__dict__[_BEFORE_MERGING]
    name, parameter = next(iter(frozen.items()))
    return parameter.dtype, experts._parameters[name].dtype


def unmerge_experts(experts: nn.Module) -> None:
    """Undo `merge_experts` with ``keep=True``."""
    adapters, frozen = experts.__dict__.pop(_BEFORE_MERGING)
    for name, parameter in frozen.items():
        device = experts._parameters[name].device
        if parameter.device != device:
            parameter = nn.Parameter(parameter.to(device), requires_grad=False)
        experts._parameters[name] = parameter
        adapters[name].to(device)
    put_adapters(experts, adapters)
