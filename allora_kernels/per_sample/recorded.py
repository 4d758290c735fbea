"""Recording the per-sample gradients of a model's adapters in ordinary backward passes."""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layer.adapter import ALLoRALayer
from ..layer.batches import batch_norms
from ..layer.block_hook import BlockHook
from ..layer.sharding import reshard
from .fsdp import check_reduced, gradients
from .kept import Block, Kept, records
from .recording import Recording


def adapted_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Every adapted layer of `model` and its name. Of FSDP2's parameters the layers then have this process's parts.

    Raises:
        ValueError: there is none, or two share an adapter, or one is PEFT's, whose gradients nothing here would see.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) keeps its adapters as PEFT does, and only FusedALLoRALinear's are "
                "recorded: save the adapter, and load it into the base model with allora_kernels.load_adapter"
            )
    reshard(model)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, ALLoRALayer)}
    if not layers:
        raise ValueError("the model has no adapters: adapt it with apply_allora first")
    owners: dict[nn.Parameter, str] = {}
    for layer, name in layers.items():
        for parameter in (layer.lora_A, layer.lora_B):
            if owners.setdefault(parameter, name) != name:
                raise ValueError(
                    f"layers {owners[parameter]!r} and {name!r} share an adapter: the gradient of a sample would be spread "
                    "over both; give each its own"
                )
    return layers


@contextlib.contextmanager
def record(
    model: nn.Module,
    cu_seqlens: Tensor | None = None,
    *,
    norms_only: bool = False,
    batch_dim: int | None = None,
    samples: int | None = None,
) -> Iterator[Recording]:
    """Record the per-sample gradients of every adapter of `model` in the backward passes inside.

    A sample is an entry of the leading dimension of a layer's input (of a 2-D input: a row), or with `cu_seqlens` the range
    ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of its flattened rows. Afterwards each adapter parameter that got a gradient has
    ``grad_sample [b, *shape]`` in fp32 or better, C included: its sum over b is what the passes inside added to ``grad``. (A
    pass that adds nothing to it, as ``autograd.grad(loss, x)``, is not recorded.)
    Several forward passes inside, each with a backward pass, are micro-batches: their samples follow each other in order. Calls
    of a layer within one forward pass of `model` are of the same samples and add up. In a batch of `adapter_rows` b counts the
    samples that went through the adapter, in their order.

    Args:
        model: holds at least one adapted layer; in DistributedDataParallel, sharded by FSDP2, or neither.
        cu_seqlens: int32 ``[b + 1]``, read back once, here. ``recording.set_cu_seqlens`` gives the next micro-batch's.
        norms_only: keep the norms alone, no tensor with b but them. G and x of every layer stay until `clip_`, `clear` or
            the next record, so that `clip_` can sum again with weights.
        batch_dim: the dimension of a layer's input that runs over samples: 1 for a model that works on [T, b, K]. Other than 0
            it costs a copy of G and x. None for 0, checked against the leading dimensions of the model's inputs, and refused
            for 2-D inputs of layers in a list called ``experts``, whose rows a router may have chosen.
        samples: how many one backward pass is of, where it reaches several forward passes: as many as each has, they are of
            the same samples; as many as all have together, they are of different ones.

    Yields:
        The recording.

    Raises:
        TypeError: `cu_seqlens` is no int32 tensor; `batch_dim` or `samples` no int.
        ValueError: the model has no adapter or one shared by two layers; `cu_seqlens` does not start at 0 or decreases;
            `batch_dim` or `samples` is negative. From the forward pass: `cu_seqlens` does not end at M, the number of samples
            is unknown, or a BatchNorm normalizes by the batch. From the backward pass: it reaches several forward passes and
            `samples` is not given. From leaving: they had not `samples` samples.
        RuntimeError: the model is being recorded already, or Opacus's hooks are on it; or (from the forward pass) it is
            compiled; or (from leaving) FSDP2 keeps its gradients back for a later pass.
    """
    for name, value in (("batch_dim", batch_dim), ("samples", samples)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if cu_seqlens is not None and batch_dim:
        raise ValueError("cu_seqlens cuts the rows as they lie: give it or batch_dim, not both")
    layers = adapted_layers(model)
    busy = [name for layer, name in layers.items() if layer._recording is not None]
    if busy:
        raise RuntimeError(f"layer {busy[0]!r} is being recorded already: a record cannot be inside another")
    _check_unhooked(layers)
    recording = Recording(layers, cu_seqlens, norms_only, batch_dim, samples, batch_norms(model))
    clear(model)
    before = gradients(layer.adapter(name) for layer in layers for name in layer.adapter_names)
    hooks = [
        model.register_forward_pre_hook(BlockHook(recording.enter_model), with_kwargs=True),
        model.register_forward_hook(BlockHook(recording.leave_model), always_call=True),
    ]
    for part in _parts_above(model, layers):
        hooks.append(part.register_forward_pre_hook(BlockHook(recording.enter_part), with_kwargs=True))
        hooks.append(part.register_forward_hook(BlockHook(recording.leave_part), always_call=True))
    for layer in layers:
        layer._recording = recording
    try:
        yield recording
    finally:
        recording.block.end()
        for hook in hooks:
            hook.remove()
        for layer in layers:
            del layer._recording
    reshard(model)
    found = recording.kept()
    check_reduced(before, (layer.adapter(name) for layer, kept in found.items() for name in kept))
    for layer, kept in found.items():
        _finish(layer, kept, norms_only, recording.block)
    recording.forget()


def _parts_above(model: nn.Module, layers: dict[nn.Module, str]) -> list[nn.Module]:
    """The modules of `model` that hold some of the layers, without `model` itself."""
    names = {name[:end] for name in layers.values() for end in range(len(name)) if name[end] == "."}
    return [module for name, module in model.named_modules() if name in names and module not in layers]


def _check_unhooked(layers: dict[nn.Module, str]) -> None:
    for layer, name in layers.items():
        if any(hasattr(p, "_forward_counter") for p in (layer.lora_A, layer.lora_B)):
            raise RuntimeError(
                f"layer {name!r} is in a model that Opacus has made private, and has per-sample gradients from its hooks: use "
                "those, or record the model before make_private"
            )


def _finish(layer: ALLoRALayer, kept: dict[str, Kept], norms_only: bool, block: Block) -> None:
    if not kept:
        return
    records[layer] = kept
    for name, of_adapter in kept.items():
        adapter = layer.adapter(name)
        of_adapter.adapter, of_adapter.block = weakref.ref(adapter.lora_A), block
        if norms_only:
            continue
        calls = of_adapter.calls
        for parameter, parts in (
            (adapter.lora_A, [call.a for call in calls]),
            (adapter.lora_B, [call.b for call in calls]),
        ):
            if parts[0] is not None:
                parameter.grad_sample = parts[0] if len(parts) == 1 else torch.cat(parts)
                if of_adapter.places is not None:
                    # For a copy of the model that is read from a file.
                    parameter.grad_sample_of = of_adapter.places, of_adapter.count
        of_adapter.calls = []


def clear(model: nn.Module) -> None:
    """Forget what was recorded: `grad_sample` of every adapter parameter, and what a norms-only record keeps."""
    for layer in adapted_layers(model):
        records.pop(layer, None)
        for adapter in map(layer.adapter, layer.adapter_names):
            for parameter in (adapter.lora_A, adapter.lora_B):
                for attribute in ("grad_sample", "grad_sample_of"):
                    parameter.__dict__.pop(attribute, None)
