"""What `per_sample.record` keeps of a forward and backward pass, and when it refuses one."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import backend as _backend
from .samples import Samples


@dataclass
class Call:
    """What one backward pass of one layer left of its samples: their gradients `a` [b, R, K] and `b` [b, N, R]; or, where only
    norms were asked for, their `squares` [b], the gradients' sums `totals`, and `weigh`, which turns weights [b] into the
    weighted sums (dA, dB) and keeps what that takes."""

    task: int
    samples: Samples
    a: Tensor | None = None
    b: Tensor | None = None
    squares: Tensor | None = None
    totals: tuple[Tensor, ...] = ()
    weigh: Callable[[Tensor], tuple[Tensor | None, Tensor | None]] | None = None


class Recording:
    """The state of one ``with record(...)``, held by every layer of the model while it lasts."""

    def __init__(self, names: dict[nn.Module, str], cu_seqlens: Tensor | None, norms_only: bool) -> None:
        self.names, self.norms_only = names, norms_only
        self.calls: dict[nn.Module, list[Call]] = {layer: [] for layer in names}
        self._ragged = None
        self._seen: tuple[int, str] | None = None
        self._task = -1
        if cu_seqlens is not None:
            self.set_cu_seqlens(cu_seqlens)

    def set_cu_seqlens(self, cu_seqlens: Tensor | None) -> None:
        """Ranges of the next micro-batch: the samples of the forward passes from here on; None for x's leading dimension.

        Raises:
            TypeError, ValueError: as `Samples.ragged`.
        """
        self._ragged = None if cu_seqlens is None else Samples.ragged(cu_seqlens)
        self._seen = None

    def start_forward(self) -> None:
        """A new forward pass of the whole model: it may have another number of samples."""
        self._seen = None

    def sink(self, layer: nn.Module, x: Tensor):
        """What runs the step `adapter_grads` of this call of `layer` on x, and records it.

        Raises:
            RuntimeError: the layer runs inside a compiled graph, which would keep what is traced.
            ValueError: as `samples_of`.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("a compiled model cannot be recorded: record the module that was given to torch.compile")
        return functools.partial(self.adapter_grads, layer, self.samples_of(layer, x))

    def samples_of(self, layer: nn.Module, x: Tensor) -> Samples:
        """The samples of this layer's input x [..., K].

        Raises:
            ValueError: their number is unknown: x has no leading dimension, or another one than an earlier layer's in the
                same forward pass, or not as many rows as `cu_seqlens` ends at.
        """
        name = self.names[layer]
        if self._ragged is not None:
            rows = x.shape[:-1].numel()
            if rows != self._ragged.rows:
                raise ValueError(
                    f"cu_seqlens must end at the number of rows, but it ends at {self._ragged.rows} and the input of layer "
                    f"{name!r} is {list(x.shape)}, which has {rows}"
                )
            return self._ragged
        if x.dim() < 2:
            raise ValueError(
                f"the number of samples is unknown: the input of layer {name!r} is {list(x.shape)} and has no leading "
                "dimension; record needs [b, ..., K], or cu_seqlens"
            )
        count = x.shape[0]
        # Recomputation in a backward pass is of a forward pass that was looked at, maybe not of the latest one.
        if torch._C._current_graph_task_id() == -1:
            if self._seen is not None and self._seen[0] != count:
                raise ValueError(
                    f"the number of samples is unknown: layer {self._seen[1]!r} has inputs for {self._seen[0]} of them, layer "
                    f"{name!r} for {count} ({list(x.shape)}). Something between them mixes or drops samples (a loss or a "
                    "pooling over the leading dimension, a flattened batch); keep the leading dimension or pass cu_seqlens"
                )
            self._seen = self._seen or (count, name)
        return Samples.equal(count, x.shape[1:-1].numel())

    def adapter_grads(self, layer, samples, backend, g, x, s, lora_B, c, eta, norm, need_ds, dtype_a, dtype_b):
        """`reference.adapter_grads`, and the samples' gradients or norms kept."""
        steps = _backend.sample_steps(backend)
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # The next forward pass may follow with other sizes, also where the model was not called as a whole.
            self._task, self._seen = task, None
        common = (g, x, s, lora_B, c, eta, norm)
        if self.norms_only:
            ds, da, db, squares = steps.sample_squared_norms(*common, need_ds, dtype_a, dtype_b, samples)

            def weigh(weights):
                return steps.weighted_grads(*common, samples.spread(weights), dtype_a, dtype_b)

            totals = tuple(t for t in (da, db) if t is not None)
            call = Call(task, samples, squares=squares, totals=totals, weigh=weigh)
        else:
            ds, a, b = steps.sample_grads(*common, need_ds, dtype_a is not None, dtype_b is not None, samples)
            da = None if a is None else steps.weighted_sum(a, None, dtype_a)
            db = None if b is None else steps.weighted_sum(b, None, dtype_b)
            call = Call(task, samples, a, b)
        self._keep(layer, call)
        return ds, da, db

    def _keep(self, layer, call: Call) -> None:
        calls = self.calls[layer]
        if not calls or calls[-1].task != call.task:
            calls.append(call)
            return
        # A layer that ran several times in one forward pass: the gradients of its samples add up.
        last = calls[-1]
        if last.samples.count != call.samples.count:
            raise ValueError(
                f"layer {self.names[layer]!r} ran on {last.samples.count} and on {call.samples.count} samples"
            )
        if self.norms_only:
            raise ValueError(
                f"layer {self.names[layer]!r} ran twice in one forward pass: norms of its gradients do not add up; record "
                "without norms_only"
            )
        last.a = None if last.a is None else last.a + call.a
        last.b = None if last.b is None else last.b + call.b


records: WeakKeyDictionary[nn.Module, list[Call]] = WeakKeyDictionary()
"""By layer, what a finished recording left that is not in `grad_sample`: norms, and how to weigh."""
