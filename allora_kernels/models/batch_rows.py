"""`BatchRows`: which adapter each row of a layer's input goes through, in a batch whose samples name their adapters."""

import functools
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..groups.adapters import Adapter, apply
from ..groups.packing import Layout
from ..layer.adapter import ALLoRALayer
from ..layer.dequantizing import PackedWeight
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
        self._tokens: set[int] = set()
        self._places: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __reduce__(self):
        # A copy of the model, here or in another process, is not in the block that this belongs to.
        return type(None), ()

    def note_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the model's forward pass: how many tokens a sample of this batch has, from its inputs.

        Raises:
            ValueError: no input has as many samples as there are names.
        """
        tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        count = len(self.names)
        if tensors and all(t.shape[0] != count for t in tensors):
            sizes = sorted({t.shape[0] for t in tensors})
            raise ValueError(
                f"adapter_rows names the adapters of {count} samples, but the model's inputs have {sizes} as their leading "
                "dimensions: give a name for each sample of the batch"
            )
        self._tokens.update(t.shape[1] for t in tensors if t.dim() > 1 and t.shape[0] == count)

    def tokens_of(self, module: nn.Module, x: Tensor, trailing: int) -> int:
        """How many rows in succession each sample has in x, whose rows lie in all dimensions but the `trailing` last.

        Raises:
            ValueError: that cannot be told.
        """
        lead, count = x.shape[: x.dim() - trailing], len(self.names)
        name = self._layer_names.get(module, type(module).__name__)
        routed = among_experts(name) and len(lead) == 1
        if lead and not routed:
            if lead[0] == count:
                return lead[1:].numel()
            if len(lead) == 1 and lead[0] % count == 0 and lead[0] // count in self._tokens:
                return lead[0] // count
        lengths = f", of {sorted(self._tokens)} tokens each" if self._tokens else ""
        why = "they were routed to an expert of a mixture" if routed else f"it is neither {count} nor samples * tokens"
        raise ValueError(
            f"which sample each row is of cannot be told: adapter_rows names {count} samples{lengths}, but the input of {name} "
            f"is {list(x.shape)} ({why}). Keep the samples in the leading dimension, or run each adapter's samples on their "
            "own after set_adapter"
        )

    def _rows(self, length: int, device: torch.device, layout: Layout) -> tuple[Tensor, Tensor]:
        """`layout.rows` of this batch, once for all layers that lie alike."""
        key = (length, device, layout.slots, layout.groups)
        if key not in self._places:
            self._places[key] = layout.rows_of_samples(self._numbers, length, device)
        return self._places[key]

    def linear(self, layer: ALLoRALayer, x: Tensor) -> Tensor:
        """What `layer` computes for x [..., K], each row by its sample's adapter.

        Raises:
            ValueError: as `tokens_of`; or what records `layer` has other samples.
        """
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


def _spread(samples: list[int], repeat: int) -> list[int]:
    """The rows of these samples, where each has `repeat` of them in succession."""
    return [sample * repeat + row for sample in samples for row in range(repeat)]
