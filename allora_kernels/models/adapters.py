"""Several adapters on one model: added, switched and removed, and each sample of a batch with its own."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.parallel import DataParallel

from ..layer import switching
from ..layer.adapter import ALLoRALayer, computed_factor
from ..layer.block_hook import BlockHook
from ..layer.functional import check_rule
from ..layer.graph_tasks import in_backward
from ..layer.sharding import reshard
from .adapt import check_adapter_name, put, ranks_of
from .adapted import AdaptReport, adapter_names, known_adapter, layers_or_raise, report, saved_modules
from .batch_rows import BatchRows
from .names import clean_name, module_slots, unwrap
from .saved_whole import ModuleOfEachAdapter, copies_of
from .selection import check_no_wrapper
from .sharded import in_pieces


def add_adapter(
    model: nn.Module,
    name: str,
    r: int = 16,
    eta: float = 2.0,
    norm: str | None = "row",
    *,
    rank_pattern: Mapping[str, int] | None = None,
) -> AdaptReport:
    """Put one more adapter, called `name`, on every adapted layer of `model`, in place.

    It is new as `apply_allora`'s (A Kaiming-uniform, B zero), in the dtype of the one that is active, and not active itself.
    Modules that are trained whole get a copy for it, with the values that the active adapter's has now.

    Args:
        model: a model with adapters.
        name: of the new adapter; not empty and without dots, as it becomes a part of its parameters' names.
        r: rank, as in `apply_allora`; adapters of one model may differ in it.
        eta: η, as there.
        norm: the rule, as there.
        rank_pattern: as there.

    Returns:
        AdaptReport: what the model has now.

    Raises:
        ValueError: the model has no adapters, or has one of this name; `name` cannot be one; r, eta, norm or rank_pattern as in
            `apply_allora`; adapters are sharded; DistributedDataParallel, which would not see it, wraps the model or a part of
            it. The model is untouched then.
        TypeError: an argument of the wrong type.
        RuntimeError: inside `adapter_rows`, `per_sample.record` or a backward pass.
    """
    check_adapter_name(name)
    check_rule(r, eta, norm)
    root, layers = _changeable(model, "add_adapter")
    for module in model.modules():
        check_no_wrapper(module)
    if name in (names := adapter_names(root)):
        raise ValueError(
            f"the model has an adapter {name!r} already, beside {len(names) - 1} others: choose another name"
        )
    ranks = ranks_of(layers, r, eta, norm, rank_pattern)
    whole = {clean_name(n): m for n, m in root.named_modules() if isinstance(m, ModuleOfEachAdapter)}
    active = saved_modules(root)
    copies = copies_of(active)
    done = []
    try:
        for key, layer in layers.items():
            layer.add_named_adapter(name, ranks[key], eta, norm)
            done.append(layer)
    except BaseException:
        # Out of memory, most likely.
        for layer in done:
            layer.remove_named_adapter(name)
        raise
    slots = module_slots(root)
    for key, module in active.items():
        if key not in whole:
            whole[key] = ModuleOfEachAdapter(next(iter(layers.values())).adapter_name, module)
            put(slots[module], whole[key])
        whole[key].copies[name] = copies[key]
    return report(root)


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapter `name` the one that `model` computes with, and `layer.lora_A` and the like show.

    Parameters stay the same objects, so that optimizers keep theirs. A forward pass keeps its adapter where checkpointing runs
    it again later.

    Raises:
        ValueError: there is no adapter of that name; adapters are sharded.
        RuntimeError: as `add_adapter`.
    """
    root, layers = _changeable(model, "set_adapter")
    known_adapter(root, name)
    for layer in layers.values():
        layer.activate_adapter(name)
    for module in root.modules():
        if isinstance(module, ModuleOfEachAdapter):
            switching.change(module, adapter=name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from `model`, in place; with the last but one, what several adapters need goes too.

    Raises:
        ValueError: there is no adapter of that name; it is active; adapters are sharded.
        RuntimeError: as `add_adapter`.
    """
    root, layers = _changeable(model, "remove_adapter")
    known_adapter(root, name)
    if len(adapter_names(root)) == 1:
        raise ValueError(f"{name!r} is the model's only adapter: merge_adapter(model) makes it a plain model again")
    if active := [key for key, layer in layers.items() if layer.adapter_name == name]:
        raise ValueError(f"adapter {name!r} is active (in {active[0]}): set_adapter(model, another) before removing it")
    for layer in layers.values():
        layer.remove_named_adapter(name)
    slots = module_slots(root)
    for module in list(root.modules()):
        if isinstance(module, ModuleOfEachAdapter):
            module.remove(name)
            if len(module.copies) == 1:
                put(slots[module], module.active)


@contextlib.contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, each sample of a batch goes through the adapter that it names: several adapters trained in one batch.

    Adapted layers call `multi_adapter_linear`, so that each adapter gets the gradients that its samples alone would give it; an
    adapter that no sample names gets none. A sample of None goes through the frozen model, for the reference rows of DPO and
    GRPO. A sample is an entry of the leading dimension of the model's inputs and of each layer's, ``[B, ..., K]``; also right
    are layers whose rows lie flattened, ``[B * T, K]`` for model inputs ``[B, T]``.

    Can be nested, the innermost counts; afterwards each layer is as it was before, also after an exception. A disabled layer
    stays disabled. A forward pass keeps its rows where checkpointing runs it again later. Which adapter is active does not
    matter.

    Args:
        model: a model with adapters.
        names: an adapter's name or None for each of the B samples.

    Raises:
        ValueError: the model has no adapters, or none of a name; `names` is empty; the model is in nn.DataParallel or its
            adapters are sharded; an adapted layer has a quantized weight that is not known to be dequantized
            (Linear8bitLt), or hooks on it; a sample is None where modules are trained whole. From a forward pass: inputs have
            other samples than `names`, or which rows of a layer's input are which sample's cannot be told; x has another dtype
            than a quantized layer computes in.
        TypeError: `names` is no list.
    """
    root, layers = _changeable(model, "adapter_rows", inside=True)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list with a name or None for each sample, got {type(names).__name__}")
    if not names:
        raise ValueError("names is empty: give an adapter's name, or None, for each sample of the batch")
    for name in dict.fromkeys(names):
        if name is not None:
            known_adapter(root, name)
    for key, layer in layers.items():
        if not layer.takes_mixed_batches:
            raise ValueError(
                f"{key} is on {layer.base_kind}, which takes one adapter a batch: run each adapter's samples on their own "
                "after set_adapter"
            )
    if None in names and (whole := saved_modules(root)):
        raise ValueError(
            f"{next(iter(whole))} is trained whole, so there is no frozen one for the samples without an adapter: run those in "
            "a model without modules_to_save"
        )
    modules = layers | {clean_name(n): m for n, m in root.named_modules() if isinstance(m, ModuleOfEachAdapter)}
    rows = BatchRows(names, modules)
    note_inputs = BlockHook(rows.note_inputs)
    hook = root.register_forward_pre_hook(note_inputs, with_kwargs=True)
    outer = next(iter(modules.values()))._state.rows
    before = [(module, switching.switch(module, rows=rows)) for module in modules.values()]
    if outer is not None:
        outer.inner += 1
    try:
        yield
    finally:
        hook.remove()
        if outer is not None:
            outer.inner -= 1
        for module, state in before:
            switching.switch_back(module, state)


def _changeable(model: nn.Module, call: str, inside: bool = False) -> tuple[nn.Module, dict[str, ALLoRALayer]]:
    """``(model unwrapped, its adapted layers)``, where `call` can do its work on them, `inside` a record or a mixed batch
    too."""
    if isinstance(model, DataParallel):
        raise ValueError(f"{call} does not see the copies that nn.DataParallel makes: use DistributedDataParallel")
    root = unwrap(model)
    reshard(root)
    layers = {clean_name(name): layer for name, layer in layers_or_raise(root).items()}
    adapter_names(root)
    for name, layer in layers.items():
        if layer.grouped and call != "set_adapter":
            raise ValueError(
                f"{name} adapts the experts of a mixture, which take one adapter: {call} is for models without"
            )
        if reason := computed_factor(layer):
            raise ValueError(f"{call}: of {name} {reason}")
        if in_pieces(layer.lora_A) or in_pieces(layer.lora_B):
            raise ValueError(
                f"{name}.lora_A is sharded, and {call} knows of whole adapters only: use DistributedDataParallel, or one "
                "adapter"
            )
        if not inside and layer._recording is not None:
            raise RuntimeError(f"{call} inside per_sample.record, whose gradients are by adapter: call it outside")
        if not inside and layer._state.rows is not None:
            raise RuntimeError(f"{call} inside adapter_rows, whose samples name the adapters: call it outside")
    if not inside and in_backward():
        raise RuntimeError(
            f"{call} inside a backward pass, as of a checkpointed function that calls it: call it outside, or use adapter_rows"
        )
    return root, layers
