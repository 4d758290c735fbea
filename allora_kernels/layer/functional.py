"""`allora_linear`: validation, choice of the backend, autograd."""

import contextlib
import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..reference import NORMS, WEIGHT_NORMS
from . import backend as _backend
from . import batch_invariance
from .derivatives import break_graph_in_transform, once_differentiable
from .sharding import Sharding, is_sharded

MAX_RANK = 256
ETA_RANGE = (1e-18, 1e18)
"""Where 1/η² is a normal fp32 number."""


def check_rule(r: int, eta: float, norm: str | None) -> None:
    """Raise ValueError or TypeError unless `r`, `eta` and `norm` name an adapter this library can train."""
    if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
        if torch.jit.is_tracing():
            raise RuntimeError(
                "an adapted layer cannot be traced by torch.jit.trace: use torch.export.export, or merge_adapter(model) first"
            )
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be between 1 and {MAX_RANK}, got {r}")
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta must be a float, got {type(eta).__name__}")
    if not ETA_RANGE[0] <= eta <= ETA_RANGE[1]:
        raise ValueError(f"eta must be finite and > 0 (from {ETA_RANGE[0]} to {ETA_RANGE[1]}), got {eta}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")


def check_scaling(scaling: float, norm: str | None) -> None:
    """Raise ValueError or TypeError unless `scaling` is a finite number, and 1 where `norm` is a rule of ALLoRA's."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a float, got {type(scaling).__name__}")
    if not abs(scaling) < math.inf:
        raise ValueError(f"scaling must be finite, got {scaling}")
    if scaling != 1 and norm is not None:
        raise ValueError(
            f"scaling={scaling} with norm={norm!r}: scaling is plain LoRA's alpha/r, which ALLoRA does not have; use "
            "scaling=1, or norm=None"
        )


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ValueError or TypeError unless the tensors fit together, on one device, and what is frozen needs no gradient."""
    device = getattr(x, "device", None)
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating-point dtype, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} but x is on {device}; move them to one device")
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            "weight must be [N, K], lora_A [R, K] and lora_B [N, R]; got "
            f"weight {list(weight.shape)}, lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
        )
    n, k = weight.shape
    r = lora_A.shape[0]
    if n < 1 or k < 1:
        raise ValueError(f"weight must have at least one row and one column, got {[n, k]}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., K] with K = {k} as in weight {[n, k]}, got {list(x.shape)}")
    if lora_A.shape[1] != k:
        raise ValueError(f"lora_A must be [R, K] with K = {k} as in weight {[n, k]}, got {list(lora_A.shape)}")
    if lora_B.shape != (n, r):
        raise ValueError(f"lora_B must be [N, R] = {[n, r]} (N from weight, R from lora_A), got {list(lora_B.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [N] = [{n}] as in weight {[n, k]}, got {list(bias.shape)}")
    if torch.is_grad_enabled():
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.requires_grad:
                transformed = torch._C._are_functorch_transforms_active()
                if transformed:
                    due = "differentiate by lora_A and lora_B alone"
                elif t.is_leaf:
                    due = f"call {name}.requires_grad_(False)"
                else:
                    due = (
                        "freeze what it is computed from; under FSDP1, which joins frozen and trained parameters, shard by "
                        "fully_shard (FSDP2)"
                    )
                raise ValueError(f"{name} is frozen in ALLoRA and gets no gradient: {due}")


class _ALLoRALinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + S Bᵀ``. Saves x, S, the parameters themselves and, where it was found on the way, C; what is not y
    is an output only so that it can be saved. Each step is called by name on the chosen backend's module, so this is the one
    place that orders them. `weight` is a Tensor, or a `PackedWeight` that is made dense once for each pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, dtype, eta, norm, backend, sink, c_too):
        dense, steps = weight if isinstance(weight, Tensor) else weight.dense(), _steps(backend)
        if c_too:
            return steps.adapted_linear_and_coefficient(x, dense, bias, lora_A, lora_B, dtype, eta)
        return steps.adapted_linear(x, dense, bias, lora_A, lora_B, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, lora_A, lora_B, dtype, eta, norm, backend, sink, c_too = inputs
        s, c = output[1], output[2] if c_too else None
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        weight, packed = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        ctx.save_for_backward(
            weight if needs_x else None, lora_A, lora_B, x if needs_a else None, s if needs_a or needs_b else None, c
        )
        ctx.settings = (dtype, eta, norm, backend, sink, packed if needs_x else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, g):
        # The steps choose their dtypes themselves; a backward pass inside autocast must not change them.
        with no_autocast(g.device.type):
            dx, da, db = _ALLoRALinear._gradients(ctx, saved, g)
        return dx, None, None, da, db, *(None,) * 6

    @staticmethod
    def _gradients(ctx, saved, g):
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        weight, lora_A, lora_B, x, s, c = saved
        dtype, eta, norm, backend, sink, packed = ctx.settings
        steps = _steps(backend)
        if needs_x and needs_a and needs_b and sink is None and isinstance(backend, str):
            # In one, so that by the kernels what the adapter needs can run beside what dX needs.
            weight = weight if packed is None else packed.dense()
            return steps.layer_grads(g, x, s, weight, lora_A, lora_B, eta, norm, lora_A.dtype, lora_B.dtype, c)
        step = steps.adapter_grads if sink is None else functools.partial(sink, backend)
        needs = (needs_x, needs_a, needs_b)
        ds, da, db = adapter_gradients(steps, step, g, x, s, lora_A, lora_B, dtype, eta, norm, needs, c)
        if not needs_x:
            return None, da, db
        weight = weight if packed is None else packed.dense()
        return steps.fused_linear(g, weight.mT, None, ds, lora_A.mT), da, db


def adapter_gradients(
    steps, adapter_grads, g, x, s, lora_A, lora_B, dtype, eta, norm, needs, c=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dS, dA, dB) as far as `needs` says, else None, by a backend's `steps` and its `adapter_grads` or what stands for it; c
    where there is one already."""
    need_ds, needs_a, needs_b = needs
    if needs_a or needs_b:
        # Anew in each step, also where the forward pass gave it: torch has writes to a parameter that leave no trace for a
        # cache to see.
        if c is None and norm in WEIGHT_NORMS:
            c = steps.weight_coefficient(lora_A, lora_B, eta, norm)
        dtypes = lora_A.dtype if needs_a else None, lora_B.dtype if needs_b else None
        found = adapter_grads(g, x, s, lora_B, c, eta, norm, need_ds, *dtypes)
        return tuple(t if needed else None for t, needed in zip(found, needs))
    return steps.down_project(g, lora_B.mT, dtype) if need_ds else None, None, None


def _steps(backend: Any) -> Any:
    """The steps of a layer: those of a backend by its name, or an object that has them (`ShardedSteps`, `GroupedSteps`)."""
    return _backend.steps(backend) if isinstance(backend, str) else backend


def apply_function(x, weight, bias, lora_A, lora_B, dtype, eta, norm, backend, sink) -> Tensor:
    """y: `_ALLoRALinear` of these arguments."""
    break_graph_in_transform()
    lora_A, lora_B = as_exported(lora_A, lora_B)
    args = (x, weight, bias, lora_A, lora_B, dtype, eta, norm, backend, sink)
    transformed = torch._C._are_functorch_transforms_active()
    trained = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
    # A transform is better served by steps that it can batch.
    c_too = trained and norm == "row" and backend == "triton" and not transformed
    c_too = c_too and _steps(backend).hides_c(x, lora_A, lora_B)
    if torch.compiler.is_compiling() or transformed:
        return _ALLoRALinear.apply(*args, c_too)[0]
    # Outside of transforms `Function.apply` does nothing more than this, after 30 us of binding default arguments.
    return super(torch.autograd.Function, _ALLoRALinear).apply(*args, c_too)[0]


def as_exported(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, under torch.export without a gradient: an exported program has lost the rule, and would train as plain
    LoRA. Warns where they would be trained: no node of such a program that other programs can read would raise."""
    if not torch.compiler.is_exporting():
        return lora_A, lora_B
    trained = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
    if trained and not torch.compiler.is_dynamo_compiling():
        warnings.warn(
            "torch.export gives the adapters no gradient, as it would leave out ALLoRA's rule: train the model itself, in a "
            "pipeline by PipelineStage and not by pipeline(); for inference, export under torch.no_grad()",
            stacklevel=2,
        )
    return lora_A.detach(), lora_B.detach()


def no_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Autocast off for this type of device, where it is on."""
    return torch.autocast(kind, enabled=False) if _autocast_is_on(kind) else contextlib.nullcontext()


def _autocast_is_on(kind: str) -> bool:
    # torch 2.11 cannot trace whether a type of device has autocast; what is compiled for has it.
    return (torch.compiler.is_compiling() or _has_autocast(kind)) and torch.is_autocast_enabled(kind)


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def compute_dtype(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """The dtype of the low-rank products, but for autocast."""
    if x.dtype == lora_A.dtype == lora_B.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype))


def autocast_dtype(kind: str, dtype: torch.dtype) -> torch.dtype | None:
    """What torch.autocast would cast an x of `dtype` to for a linear layer on this type of device; None where it would not:
    never a double, and not every device type has it."""
    return torch.get_autocast_dtype(kind) if dtype != torch.float64 and _autocast_is_on(kind) else None


def in_one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """x, weight and bias in the dtype of the frozen product, and the dtype of the low-rank ones; ValueError if they differ."""
    dtype = autocast_dtype(x.device.type, x.dtype)
    if dtype is not None:
        # The frozen product runs in autocast's dtype, as in nn.Linear. lora_A and lora_B stay as they are: kernels cast
        # the tiles they load, so no copy is made and their gradients leave the fp32 accumulators unrounded.
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), dtype
    if x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} but weight is {weight.dtype}: cast x to the weight's dtype, or use torch.autocast"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype} but weight is {weight.dtype}: cast it, or use torch.autocast")
    return x, weight, bias, compute_dtype(x, lora_A, lora_B)


def choose_backend(x: Tensor, widest: torch.dtype, asked: str | None) -> str:
    """The backend of a call on x, warning of a fallback; RuntimeError where batch invariance is on and it is eager torch."""
    choice = _backend.choose(x.device, widest, asked)
    if choice.name == "eager" and batch_invariance.enabled():
        raise RuntimeError(
            f"use_batch_invariant is on, but this call takes eager torch ({choice.reason}), which is not batch-invariant: "
            "call use_batch_invariant(False), or give the kernels a tensor they can take"
        )
    if choice.fallback and not torch.compiler.is_compiling():
        _backend.warn_fallback(choice.reason)
    return choice.name


def apply(x, weight, bias, lora_A, lora_B, eta, norm, backend=None, sink=None, scaling=1.0) -> Tensor:
    """`allora_linear`, and what takes the step `adapter_grads` over to see more of it."""
    check_tensors(x, weight, bias, lora_A, lora_B)
    check_rule(lora_A.shape[0], eta, norm)
    check_scaling(scaling, norm)
    if scaling != 1:
        if sink is not None:
            raise ValueError(f"scaling={scaling} cannot be recorded: the gradients that a record sees lack it")
        # Outside of the Function, so that autograd gives lora_A's gradient its factor; S, and with it dB, comes out scaled.
        lora_A = lora_A * scaling
    widest = compute_dtype(x, lora_A, lora_B)
    x, weight, bias, dtype = in_one_dtype(x, weight, bias, lora_A, lora_B)
    name = choose_backend(x, widest, backend)
    sharding, steps = None, name
    if is_sharded(weight) or is_sharded(x):
        if sink is not None:
            raise ValueError("per_sample.record takes no gradients of DTensors: record before parallelize_module")
        sharding = Sharding(x, weight, bias, lora_A, lora_B)
        x, weight, bias, lora_A, lora_B = sharding.local(x, weight, bias, lora_A, lora_B)
        steps = sharding.steps(name)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = apply_function(rows, weight, bias, lora_A, lora_B, dtype, eta, norm, steps, sink)
    y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])
    return y if sharding is None else sharding.whole(y)


def allora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    eta: float = 2.0,
    norm: str | None = "row",
    backend: str | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """``y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ`` with ALLoRA's gradients for A and B (arXiv 2410.09692).

    The adapter's gradients are those of plain LoRA with ``G = dL/dy`` replaced by ``C ⊙ G``, where
    ``C = (n + 1/η²)^(-1/2)`` and `norm` names n: ``"row"`` (the paper's) ‖(BA)[i,:]‖, ``"matrix"`` ‖BA‖_F, ``"factor"``
    ‖B[i,:]‖ for dB and ‖A[j,:]‖ for dA, ``"entry"`` |(S Bᵀ)[m,i]|, ``"token"`` ‖(S Bᵀ)[m,:]‖, None for C = 1 (plain
    LoRA). The gradient of x is never rescaled. C is a constant: no gradient flows through it.

    Args:
        x: ``[..., K]``, the weight's dtype (under autocast: any).
        weight: ``[N, K]``, frozen.
        bias: ``[N]`` or None, frozen.
        lora_A: ``[R, K]``, 1 <= R <= 256, any floating dtype.
        lora_B: ``[N, R]``, any floating dtype.
        eta: η > 0; C is exactly η where the adapter is zero.
        norm: the rule, see above.
        backend: ``"triton"``, ``"eager"``, or None to choose (Triton for CUDA and ROCm tensors, and for any under
            TRITON_INTERPRET=1).
        scaling: plain LoRA's alpha/r, any finite number where `norm` is None; ALLoRA has none. It multiplies lora_A, so
            nothing of y's size.

    Returns:
        ``[..., N]`` in x's dtype. Low-rank products are computed in the widest dtype of x, lora_A and lora_B (under
        autocast: in autocast's dtype) with fp32 accumulation; dA and dB have their parameters' dtypes.

    Raises:
        ValueError: shapes that do not fit, mixed devices, x and weight of different dtypes, a weight or bias that
            requires grad, an unknown `norm` or `backend`, eta not in [1e-18, 1e18], a scaling that is not finite, or not
            1 where `norm` is not None, ``backend="triton"`` where it cannot run.
        RuntimeError: `use_batch_invariant` is on and the backend is eager.
        TypeError: something that is no floating-point tensor where one is due.
    """
    return apply(x, weight, bias, lora_A, lora_B, eta, norm, backend, scaling=scaling)
