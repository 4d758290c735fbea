"""`BatchRows`: which adapter each row of a layer's input goes through, in a batch whose samples name their adapters."""

import functools
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..groups.adapters import Adapter, apply
from ..groups.packing import Layout
from ..layer.adapter import ALLoRALayer, removed_since
from ..layer.batches import Batch, batch_of, may_turn
from ..layer.dequantizing import PackedWeight
from ..layer.graph_tasks import in_backward
from ..layer.host_values import on_device
from ..layer.routing import among_experts


class BatchRows:
    """The state of one ``with adapter_rows(...)``, held by every layer of the model while it lasts, and by what checkpointing
    may run again afterwards."""

    def __init__(self, names: Sequence[str | None], layers: Mapping[str, nn.Module]) -> None:
        self.names = tuple(names)
        self.used = tuple(dict.fromkeys(name for name in names if name is not None))
        number = {name: i for i, name in enumerate(self.used)} | {None: -1}
        self._numbers = [number[name] for name in self.names]
        self._layer_names = WeakKeyDictionary({layer: name for name, layer in layers.items()})
        self._all_alike = len(set(names)) == 1 and None not in names
        self._batch = Batch()
        self.inner = 0
        """How many blocks are within this one: the innermost counts."""
        self._removed: str | None = None
        # What was decided of a layer and the shape of its rows, for what checkpointing runs again.
        self._lengths: dict[tuple[str, tuple[int, ...]], int] = {}
        self._turns = lambda: None
        self._places: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __reduce__(self):
        # A copy of the model, here or in another process, is not in the block that this belongs to.
        return type(None), ()

    def note_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the model's forward pass, for what its inputs say of the batch. What checkpointing runs again keeps it.

        Raises:
            ValueError: no input has as many samples as there are names.
        """
        if _runs_again() or self.inner:
            return
        batch, count = batch_of(module, args, kwargs), len(self.names)
        # Of a model of texts and images either may be the samples.
        sizes = batch.sizes | batch.beside
        if sizes and count not in sizes and not self._all_alike:
            raise ValueError(
                f"adapter_rows names the adapters of {count} samples, but the model's inputs have {sorted(sizes)} as their "
                "leading dimensions: give a name for each sample of the batch"
            )
        self._batch, self._turns = batch, functools.partial(may_turn, module)

    def forget(self, name: str) -> None:
        """The adapter `name` is removed: another may have its name from here on, which no call from before may run with."""
        if name in self.used:
            self._removed = name

    def tokens_of(self, module: nn.Module, x: Tensor, trailing: int) -> int:
        """How many rows in succession each sample has in x, whose rows lie in all dimensions but the `trailing` last.

        Raises:
            ValueError: that cannot be told.
        """
        lead, name = x.shape[: x.dim() - trailing], self._layer_names.get(module, type(module).__name__)
        if _runs_again() and (name, lead) in self._lengths:
            return self._lengths[name, lead]
        length = self._length_of(lead, name)
        if isinstance(length, str):
            lengths = sorted(self._batch.lengths(len(self.names)))
            each = f", of {lengths} tokens each" if lengths else ""
            raise ValueError(
                f"which sample each row is of cannot be told: adapter_rows names {len(self.names)} samples{each}, but the "
                f"input of {name} is {list(x.shape)} ({length}). Keep the samples in the leading dimension, or run each "
                "adapter's samples on their own after set_adapter"
            )
        self._lengths[name, lead] = length
        return length

    def _length_of(self, lead: torch.Size, name: str) -> int | str:
        """How many rows in succession each sample has, of rows that lie in the dimensions `lead`; or why it cannot be told."""
        count, rows = len(self.names), lead.numel()
        if count == 1 or (self._all_alike and rows % count == 0):
            # Every row goes through one adapter, wherever it lies.
            return rows // count
        if not lead:
            return "it has no rows"
        if among_experts(name) and len(lead) == 1:
            return "they were routed to an expert of a mixture"
        if lead[0] == count:
            if len(lead) > 1 and lead[1] == count and (turning := self._turns()):
                return f"{turning} may exchange samples and tokens, of which there are as many"
            if self._batch.misplaces_images(count, lead):
                return "as many images as samples, but not one of each"
            return lead[1:].numel()
        of_tokens = len(lead) == 1 and rows % count == 0 and rows // count in self._batch.lengths(count)
        if of_tokens and rows not in self._batch.beside:
            return rows // count
        return f"it is neither {count} nor samples * tokens"

    def _check_adapters(self) -> None:
        if self._removed is not None:
            raise removed_since(self._removed)

    def _rows(self, length: int, device: torch.device, layout: Layout) -> tuple[Tensor, Tensor]:
        """`layout.rows` of this batch, once for all layers that lie alike."""
        key = (length, device, layout.slots, layout.groups, _in_inference_mode())
        if key not in self._places:
            self._places[key] = layout.rows_of_samples(self._numbers, length, device)
        return self._places[key]

    def linear(self, layer: ALLoRALayer, x: Tensor) -> Tensor:
        """What `layer` computes for x [..., K], each row by its sample's adapter.

        Raises:
            ValueError: as `tokens_of`; or what records `layer` has other samples.
        """
        self._check_adapters()
        length = self.tokens_of(layer, x, trailing=1)
        shares = None
        if layer._recording is not None:
            shares = layer._recording.sinks(layer, self.used, self._numbers, length)
        if not self.used:
            return layer.frozen_linear(x)
        adapters = [Adapter(a.lora_A, a.lora_B, a.eta, a.norm) for a in map(layer.adapter, self.used)]
        rows_of = functools.partial(self._rows, length, x.device)
        weight, bias = layer.frozen_product(x)
        y = apply(x, weight, bias, adapters, rows_of, shares=shares)
        return y.to(x.dtype) if isinstance(weight, PackedWeight) and weight.returns_dtype_of_x else y

    def each(self, module: nn.Module, copies: Mapping[str, nn.Module], args: tuple, kwargs: dict) -> Tensor:
        """``copies[name](...)`` of each name's samples, put together again in the order of the batch.

        Raises:
            ValueError: which samples an input has cannot be told, or the outputs do not fit together.
        """
        self._check_adapters()
        repeats = {1}

        def part(t, samples: list[int]):
            if not isinstance(t, Tensor) or not t.dim():
                return t
            repeat = 1 if t.shape[0] == len(self.names) else self.tokens_of(module, t, trailing=t.dim() - 1)
            repeats.add(repeat)
            return t.index_select(0, on_device(_spread(samples, repeat), t.device, torch.int64))

        name_of_module = self._layer_names.get(module, type(module).__name__)
        outputs, order = [], []
        for number, name in enumerate(self.used):
            samples = [i for i, n in enumerate(self._numbers) if n == number]
            taken = _pytree.tree_map(functools.partial(part, samples=samples), (args, kwargs))
            y = copies[name](*taken[0], **taken[1])
            repeat = y.shape[0] // len(samples) if isinstance(y, Tensor) and y.dim() else 0
            if repeat not in repeats or repeat * len(samples) != y.shape[0]:
                raise ValueError(
                    f"{name_of_module} is trained whole for each adapter, and what it returns for a mixed batch is no Tensor "
                    "with the samples of its inputs in its leading dimension: run each adapter's samples on their own after "
                    "set_adapter"
                )
            outputs.append(y)
            order += _spread(samples, repeat)
        if len(shapes := {tuple(y.shape[1:]) for y in outputs}) > 1:
            raise ValueError(
                f"{name_of_module} gives rows of {sorted(shapes)} for adapters {list(self.used)}: no one tensor"
            )
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(outputs).index_select(0, on_device(places, outputs[0].device, torch.int64))


def _in_inference_mode() -> bool:
    """What is made in it no backward pass may keep. (A compiled call cannot ask, and keeps what is made for it alone.)"""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _runs_again() -> bool:
    return not torch.compiler.is_compiling() and in_backward()


def _spread(samples: list[int], repeat: int) -> list[int]:
    """The rows of these samples, where each has `repeat` of them in succession."""
    return [sample * repeat + row for sample in samples for row in range(repeat)]
