"""`ALLoRALayer`: what every layer with an ALLoRA adapter has, whoever computes its frozen product."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import switching
from .sharding import is_sharded
from .zero import whole_shape

DEFAULT_ADAPTER = "default"
"""The name of an adapter that was given none, as in PEFT."""

FACTORS = ("lora_A", "lora_B")


class MixedBatch(Protocol):
    """What runs the calls of a batch in which each sample names its adapter."""

    def linear(self, layer: "ALLoRALayer", x: Tensor) -> Tensor:
        """What `layer` computes for x [..., K]."""

    def each(self, module: nn.Module, copies: Mapping[str, nn.Module], args: tuple, kwargs: dict) -> Tensor:
        """What `module` returns, of which each adapter has one of the `copies`."""

    def forget(self, name: str) -> None:
        """The adapter of this name is removed: no call may be run again with it."""


class Recorder(Protocol):
    """What records the gradients of samples. A sink, or one of several, takes the step `adapter_grads` of a call over."""

    def sink(self, layer: "ALLoRALayer", adapter: str, x: Tensor) -> Callable:
        """The sink of a call of `layer` on x [..., K] with this adapter."""

    def sinks(
        self, layer: "ALLoRALayer", adapters: Sequence[str], numbers: Sequence[int], length: int
    ) -> Sequence[Callable]:
        """The sink of each of these adapters, where sample i has `length` rows and the adapter of number ``numbers[i]``."""

    def routed(
        self, layers: "Mapping[str, ALLoRALayer]", expert_of: Tensor, experts: int
    ) -> tuple[Tensor, Tensor, dict[str, Callable]]:
        """How rows are sorted by expert, where each expert's end, and the sink of each of `layers`."""


class CallState(NamedTuple):
    """What a call of a layer computes with."""

    enabled: bool = True
    adapter: str = DEFAULT_ADAPTER
    """The active adapter's name."""
    rows: MixedBatch | None = None
    """Of a batch in which each sample names its adapter."""


class _RemovedName(str):
    """The name that an adapter had, which is no other's."""

    def __eq__(self, other) -> bool:
        return self is other

    __hash__ = str.__hash__


def forget_adapter(module: nn.Module, name: str) -> None:
    """No call from before may be run again with what has this name from here on."""

    def without(state: CallState) -> CallState:
        if state.rows is not None:
            state.rows.forget(name)
        return state._replace(adapter=_RemovedName(name)) if state.adapter == name else state

    switching.rewrite_past(module, without)


def removed_since(name: str) -> RuntimeError:
    """The error of a call that is run again without its adapter."""
    return RuntimeError(
        f"a checkpointed forward pass with adapter {str(name)!r} is run again, but that adapter was removed since: call "
        "backward before remove_adapter"
    )


def check_adapter_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError unless lora_A and lora_B can have this dtype; None for the weight's."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"adapter_dtype must be a torch.dtype or None, got {dtype!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"adapter_dtype must be torch.float32, float16, bfloat16 or float64, got {dtype}")


def computed_factor(adapter: nn.Module) -> str | None:
    """Why lora_A and lora_B of `adapter` cannot be written to or handed over; None where they are parameters of their own."""
    for factor in FACTORS:
        if not isinstance(getattr(adapter, factor), nn.Parameter):
            return (
                f"{factor} is computed from other parameters (pruned or parametrized): call torch.nn.utils.prune.remove or "
                "parametrize.remove_parametrizations first"
            )
    return None


class NamedAdapter(nn.Module):
    """One of several adapters of a layer: lora_A ``[r, K]``, lora_B ``[N, r]`` and their rule."""

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter, eta: float, norm: str | None) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.eta, self.norm = lora_A, lora_B, float(eta), norm

    @property
    def r(self) -> int:
        """The rank."""
        return whole_shape(self.lora_A)[0]

    def extra_repr(self) -> str:
        return f"r={self.r}, eta={self.eta}, norm={self.norm!r}"


class ALLoRALayer(nn.Module):
    """A frozen linear layer ``x [..., in_features] -> y [..., out_features]`` with an adapter ``lora_A [r, in_features]``,
    ``lora_B [out_features, r]`` that is trained under the rule `norm` with `eta`.

    `FusedALLoRALinear` holds the frozen weight itself; `WrappedALLoRALinear` leaves it to the layer that it wraps. Both have a
    `weight` and a `bias` (or None) to look at, `merge()` and `explain(rows)`.

    A layer may have several adapters. `lora_A`, `lora_B`, `r`, `eta` and `norm` are always those of the active one. All of them
    are in `adapters`, a `ModuleDict` that exists only where there is more than one and then holds all their parameters: so the
    names and the order of a model's parameters do not change with the active one.
    """

    in_features: int
    out_features: int
    r: int
    eta: float
    norm: str | None

    fan_in_fan_out = False
    """True where `weight` is stored [in_features, out_features], as in transformers' Conv1D."""

    grouped = False
    """True where it adapts a mixture's E experts: lora_A [E, r, in_features], lora_B [E, out_features, r]."""

    takes_mixed_batches = False
    """Whether each row of a call may have an adapter of its own."""

    _state = CallState()
    _recording: Recorder | None = None
    """The `per_sample.record` this layer is in, if it is in one."""

    def _add_adapter(self, r: int, eta: float, norm: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.r, self.eta, self.norm = r, float(eta), norm
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter as PEFT does: A Kaiming-uniform(a=√5), B zero. The layer then equals its frozen one."""
        _initialise(self.lora_A, self.lora_B)

    def __prepare_scriptable__(self):
        raise RuntimeError(
            "an adapted layer cannot be compiled by torch.jit.script: use torch.export.export, or merge_adapter(model) first"
        )

    # --- the state of a call ---

    @property
    def enabled(self) -> bool:
        """False where the layer computes as its frozen one alone, to the same bits, and its adapter gets no gradient. What
        checkpointing runs again has the state of its first run. TypeError unless set to a bool."""
        return self._state.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"enabled must be a bool, got {type(on).__name__}")
        switching.change(self, enabled=on)

    # --- several adapters ---

    def __getattr__(self, name: str) -> Any:
        if name in FACTORS and "adapters" in self.__dict__.get("_modules", ()):
            return getattr(self.adapters[self.adapter_name], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "adapters" not in self.__dict__.get("_modules", ()):
            super().__setattr__(name, value)
        elif name in FACTORS:
            setattr(self.adapters[self.adapter_name], name, value)
        elif isinstance(value, nn.Parameter) and name in self._parameters:
            # As FSDP2 puts its parts in place: not by `register_parameter`, as torch's ways of tensor parallelism do.
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if is_sharded(param):
            self.check_one_adapter()
        super().register_parameter(name, param)

    def check_one_adapter(self) -> None:
        """ValueError where there are several, which tensor parallelism does not cut."""
        if len(self.adapter_names) > 1:
            raise ValueError(
                f"a layer with adapters {', '.join(map(repr, self.adapter_names))} cannot be cut by tensor parallelism: use "
                "DistributedDataParallel, or one adapter"
            )

    @property
    def adapter_name(self) -> str:
        """The name of the active adapter."""
        return self._state.adapter

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        return tuple(self.adapters) if "adapters" in self._modules else (self.adapter_name,)

    def adapter(self, name: str) -> "ALLoRALayer | NamedAdapter":
        """What has lora_A, lora_B, r, eta and norm of the adapter `name`.

        Raises:
            RuntimeError: it is gone, so that a call from before cannot be run again.
        """
        if name == self.adapter_name:
            return self
        if name not in self.adapter_names:
            raise removed_since(name)
        return self.adapters[name]

    def add_named_adapter(self, name: str, r: int, eta: float, norm: str | None) -> None:
        """Add an adapter beside the others, initialised as the first one was and in the active one's dtype; not active."""
        a, b = (
            torch.empty(*size, device=self.lora_A.device, dtype=self.lora_A.dtype)
            for size in ((r, self.in_features), (self.out_features, r))
        )
        _initialise(a, b)
        if "adapters" not in self._modules:
            first = NamedAdapter(self.lora_A, self.lora_B, self.eta, self.norm)
            del self.lora_A, self.lora_B
            self.adapters = nn.ModuleDict({self.adapter_name: first})
        self.adapters[name] = NamedAdapter(nn.Parameter(a), nn.Parameter(b), eta, norm)

    def activate_adapter(self, name: str) -> None:
        """Make the adapter `name` the one that the layer computes with."""
        if name == self.adapter_name:
            return
        # Its rule may have been set anew while it was active.
        before, chosen = self.adapters[self.adapter_name], self.adapters[name]
        before.eta, before.norm = self.eta, self.norm
        switching.change(self, adapter=name)
        self.r, self.eta, self.norm = chosen.r, chosen.eta, chosen.norm

    def remove_named_adapter(self, name: str) -> None:
        """Remove an adapter that is not active."""
        forget_adapter(self, name)
        del self.adapters[name]
        if len(self.adapters) == 1:
            last = self.adapters[self.adapter_name]
            del self.adapters
            self.lora_A, self.lora_B = last.lora_A, last.lora_B

    def _in_words(self, *more: str) -> str:
        """For `repr`: the rule, `more`, and whether the layer is disabled."""
        off = () if self.enabled else ("enabled=False",)
        return ", ".join((f"r={self.r}, eta={self.eta}, norm={self.norm!r}", *more, *off))


class AdaptedLinear(ALLoRALayer):
    """An `ALLoRALayer` that is called on x itself.

    Its subclasses have `frozen_linear(x)`, which computes without an adapter, and `_adapted(x, lora_A, lora_B, eta, norm,
    sink=None)`, which computes with these factors and this rule; `sink` takes the step `adapter_grads` over.
    """

    def _with_zeros(self, input: Tensor) -> Tensor:
        """The frozen layer's product by the adapted one's kernel, with factors of zero."""
        zeros = (torch.zeros_like(t, requires_grad=False) for t in (self.lora_A, self.lora_B))
        return self._adapted(input, *zeros, self.eta, None)

    def forward(self, input: Tensor) -> Tensor:
        enabled, name, rows = switching.state_of_call(self, self._state)
        if not enabled:
            return self.frozen_linear(input)
        if rows is not None:
            return rows.linear(self, input)
        sink = None if self._recording is None else self._recording.sink(self, name, input)
        own = self if name == self._state.adapter else self.adapter(name)
        return self._adapted(input, own.lora_A, own.lora_B, own.eta, own.norm, sink)


def _initialise(lora_A: Tensor, lora_B: Tensor) -> None:
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)
