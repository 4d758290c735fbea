"""A `torch.library` op for each launcher of csrc_triton, so that torch.compile sees them as single nodes.

Each op's fake says only what comes out: shapes and dtypes, always contiguous. The formulas are in `reference`, under
the same names. They are defined on the dispatcher itself: `torch.library.custom_op` costs a call some microseconds more.
What is called here is a step, which calls its launcher where nothing on the dispatcher's way would do anything, as in an eager
training step: that way costs the host some 10 us a call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_key_parse,
    _dispatch_tls_is_dispatch_key_included,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo.eval_frame import get_eval_frame_callback

import csrc_triton

from . import vmap_rules

_library = torch.library.Library("allora", "DEF")
_PLAIN = (Tensor, nn.Parameter)
_VMAP_MODE = _dispatch_key_parse("VmapMode")
"""Set in the vmap that torch.func's does not know of: `torch.autograd.grad(..., is_grads_batched=True)`."""


def define(schema: str, launcher: Callable, fake: Callable, vmap: Callable | None = None) -> Callable:
    """The step of the op of `schema`; `launcher` runs it on GPU tensors and, by Triton's interpreter, on CPU tensors. Without a
    rule of its own torch.func.vmap calls the op for one sample after another."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    replayed = csrc_triton.replayed(launcher)
    # Called from a frame that torch.compile has given up, Dynamo would trace the launcher.
    _library.impl(name, torch.compiler.disable(replayed), "CUDA")
    _library.impl(name, torch.compiler.disable(launcher), "CPU")
    torch.library.register_fake(f"allora::{name}", fake, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(f"allora::{name}", vmap, lib=_library)
    op = getattr(torch.ops.allora, name).default

    def step(*args):
        if torch.compiler.is_compiling() or _is_seen(args):
            return op(*args)
        return (replayed if _takes_replays(args[0]) else launcher)(*args)

    step.op = op
    return step


def _is_seen(args: tuple) -> bool:
    """Whether the dispatcher has more to do for a call than to find its launcher: there is autograd, a transform, a mode, a
    profiler, a subclass, a tensor whose memory is not its values, or which has none, or Dynamo, which would look into the
    launcher."""
    if (
        torch.is_grad_enabled()
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or _are_functorch_transforms_active()
        or _dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or _profiler_enabled()
        or get_eval_frame_callback()
    ):
        return True
    for argument in args:
        if type(argument) in _PLAIN:
            if argument.is_neg() or argument._is_zerotensor():
                return True
        elif isinstance(argument, Tensor):
            return True
    return args[0].is_meta


def _takes_replays(t: Tensor) -> bool:
    return t.is_cuda


def _adapted_linear_fake(x, weight, bias, a, b, dtype):
    rows = x.shape[0]
    return x.new_empty(rows, weight.shape[0]), x.new_empty(rows, a.shape[0], dtype=dtype)


adapted_linear: Callable[..., tuple[Tensor, Tensor]] = define(
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, ScalarType dtype) -> (Tensor, Tensor)",
    csrc_triton.adapted_linear,
    _adapted_linear_fake,
    vmap_rules.adapted_linear,
)

adapted_linear_and_coefficient: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "adapted_linear_and_coefficient(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, ScalarType dtype, float eta)"
    " -> (Tensor, Tensor, Tensor)",
    csrc_triton.adapted_linear_and_coefficient,
    lambda x, weight, bias, a, b, dtype, eta: (
        *_adapted_linear_fake(x, weight, bias, a, b, dtype),
        x.new_empty(b.shape[0], dtype=torch.float32),
    ),
)

hides_c = csrc_triton.hides_c

dequantize_4bit: Callable[..., Tensor] = define(
    "dequantize_4bit(Tensor packed, Tensor code, Tensor scales, Tensor? scale_code, Tensor? scale_scales, Tensor? offset,"
    " int block, int scale_block, int n, int k, ScalarType dtype) -> Tensor",
    csrc_triton.dequantize_4bit,
    lambda packed, code, scales, scale_code, scale_scales, offset, block, scale_block, n, k, dtype: packed.new_empty(
        n, k, dtype=dtype
    ),
)

down_project: Callable[..., Tensor] = define(
    "down_project(Tensor x, Tensor a, ScalarType dtype) -> Tensor",
    csrc_triton.down_project,
    lambda x, a, dtype: x.new_empty(x.shape[0], a.shape[0], dtype=dtype),
    vmap_rules.down_project,
)

fused_linear: Callable[..., Tensor] = define(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor b) -> Tensor",
    csrc_triton.fused_linear,
    lambda x, weight, bias, s, b: x.new_empty(x.shape[0], weight.shape[0]),
    vmap_rules.fused_linear,
)

low_rank_add: Callable[..., None] = define(
    "low_rank_add(Tensor(a!) y, Tensor s, Tensor b) -> ()", csrc_triton.low_rank_add, lambda y, s, b: None
)


def _weight_coefficient_fake(a, b, eta, norm, inv_etas_squared=None):
    *groups, n, r = b.shape
    size = {"row": n, "matrix": 1, "factor": n + r}[norm]
    return a.new_empty(*groups, size, dtype=torch.float32)


weight_coefficient: Callable[..., Tensor] = define(
    "weight_coefficient(Tensor a, Tensor b, float eta, str norm, Tensor? inv_etas_squared=None) -> Tensor",
    csrc_triton.weight_coefficient,
    _weight_coefficient_fake,
)


def _adapter_grads_fake(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b):
    ds = s.new_empty((g.shape[0], s.shape[1]) if need_ds else (0,))
    da = s.new_empty(0) if dtype_a is None else s.new_empty(s.shape[1], x.shape[1], dtype=dtype_a)
    db = s.new_empty(0) if dtype_b is None else s.new_empty(b.shape[0], s.shape[1], dtype=dtype_b)
    return ds, da, db


adapter_grads: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "adapter_grads(Tensor g, Tensor? x, Tensor s, Tensor b, Tensor? c, float eta, str? norm, bool need_ds,"
    " ScalarType? dtype_a, ScalarType? dtype_b) -> (Tensor, Tensor, Tensor)",
    csrc_triton.adapter_grads,
    _adapter_grads_fake,
    vmap_rules.adapter_grads,
)


def _layer_grads_fake(g, x, s, weight, a, b, eta, norm, dtype_a, dtype_b, c=None):
    return g.new_empty(x.shape), s.new_empty(a.shape, dtype=dtype_a), s.new_empty(b.shape, dtype=dtype_b)


layer_grads: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "layer_grads(Tensor g, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, float eta, str? norm,"
    " ScalarType dtype_a, ScalarType dtype_b, Tensor? c=None) -> (Tensor, Tensor, Tensor)",
    csrc_triton.layer_grads,
    _layer_grads_fake,
    vmap_rules.layer_grads,
)
