"""Honest times of calls that are to be compared: interleaved, with cold caches, as medians with their spread.

One after the other, the calls would meet different clock speeds and temperatures; so every round times each call once, in
an order that turns from round to round. On a GPU a call's time is the device's own, between two events: before it the
L2 cache is filled with other data, and the device is kept busy for as long as the host needs to queue the call (up to
20 ms), so that no gap between launches is counted. What the host needs is the other number, `dispatch`: a training step
costs the larger of the two.
"""

import abc
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MIN_ROUNDS = 3
"""Rounds that are run even where the budget is spent."""

_FLUSH_BYTES = 256 * 2**20
_PROBE_CYCLES = 1_000_000
# The host is slower now and then; a delay that is too long costs only waiting.
_DELAY_MARGIN = 2.0
# A call that takes the host longer, such as a whole model's step, has to cover its own launches, as it does in training.
_MAX_DELAY_MS = 20.0

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `rounds` rounds: the median, and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """The summary of `samples`, in milliseconds; at least one."""
        fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples))


def interleaved(
    calls: Calls,
    *,
    rounds: int = 30,
    warmup: int = 3,
    device: str | torch.device = "cpu",
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """Time each of `calls`, which take no argument, on `device`.

    Args:
        calls: name: call. What a call returns is dropped at once. Compile and check it before.
        rounds: how often each call is timed.
        warmup: how often each is called before, at least once.
        device: where the calls run: a CUDA (ROCm) device is timed by events with a cold L2 cache, any other by the
            host's clock, with its caches as they are.
        budget_s: stop after the round in which this many seconds have passed since the start (never before
            `MIN_ROUNDS` rounds).

    Returns:
        name: Timing, in the order of `calls`.
    """
    device = torch.device(device)
    stopwatch = _DeviceStopwatch(device) if device.type == "cuda" else _HostStopwatch(device)
    return _run(calls, stopwatch, rounds, warmup, budget_s)


def dispatch(
    calls: Calls,
    *,
    rounds: int = 100,
    warmup: int = 10,
    device: str | torch.device = "cpu",
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """The host's time until each call returns, with the device idle when it begins. Arguments as for `interleaved`.

    On a CPU that is the whole call, so choose inputs so small that their arithmetic does not count.
    """
    return _run(calls, _HostStopwatch(torch.device(device)), rounds, warmup, budget_s)


def _run(calls: Calls, stopwatch: "_Stopwatch", rounds: int, warmup: int, budget_s: float | None) -> dict[str, Timing]:
    if not calls:
        return {}
    started = time.perf_counter()

    def spent() -> bool:
        return budget_s is not None and time.perf_counter() - started > budget_s

    for name, call in calls.items():
        for turn in range(max(1, warmup)):
            if turn == 0 or not spent():
                stopwatch.warm_up(name, call)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and spent():
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                stopwatch.time(name, calls[name])
            for name, milliseconds in stopwatch.read():
                samples[name].append(milliseconds)
    return {name: Timing.of(samples[name]) for name in names}


class _Stopwatch(abc.ABC):
    """`warm_up` and `time` run a call; `read` gives what was timed since the last `read`, in milliseconds."""

    @abc.abstractmethod
    def warm_up(self, name: str, call: Callable[[], object]) -> None: ...

    @abc.abstractmethod
    def time(self, name: str, call: Callable[[], object]) -> None: ...

    @abc.abstractmethod
    def read(self) -> Iterator[tuple[str, float]]: ...


class _HostStopwatch(_Stopwatch):
    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._times: list[tuple[str, float]] = []

    def warm_up(self, name: str, call: Callable[[], object]) -> None:
        call()

    def time(self, name: str, call: Callable[[], object]) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        # Freeing the result is not the call's.
        del result
        self._times.append((name, 1e3 * (stop - start)))

    def read(self) -> Iterator[tuple[str, float]]:
        times, self._times = self._times, []
        yield from times


class _DeviceStopwatch(_Stopwatch):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = max(_FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        # Read, not written: a cache full of written lines would have the timed call pay for storing them.
        self._flush = torch.zeros(size // 4, device=device, dtype=torch.float32)
        self._sum = torch.zeros((), device=device)
        self._host_ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._cycles_per_ms = self._measure_cycles_per_ms()

    def warm_up(self, name: str, call: Callable[[], object]) -> None:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        # The last of the warm-up calls: the first ones load code and fill the allocator.
        self._host_ms[name] = 1e3 * (time.perf_counter() - start)

    def time(self, name: str, call: Callable[[], object]) -> None:
        with torch.cuda.device(self._device):
            start, stop = self._pair_of_events()
            torch.sum(self._flush, dim=0, out=self._sum)
            delay_ms = min(_DELAY_MARGIN * self._host_ms[name], _MAX_DELAY_MS)
            torch.cuda._sleep(int(delay_ms * self._cycles_per_ms))
            start.record()
            call()
            stop.record()
        self._events.append((name, start, stop))

    def read(self) -> Iterator[tuple[str, float]]:
        torch.cuda.synchronize(self._device)
        events, self._events = self._events, []
        for name, start, stop in events:
            yield name, start.elapsed_time(stop)

    def _measure_cycles_per_ms(self) -> float:
        with torch.cuda.device(self._device):
            for _ in range(2):  # the first loads the kernel
                start, stop = self._pair_of_events()
                start.record()
                torch.cuda._sleep(_PROBE_CYCLES)
                stop.record()
                torch.cuda.synchronize(self._device)
        return _PROBE_CYCLES / start.elapsed_time(stop)

    @staticmethod
    def _pair_of_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now, and not in the middle of a timed call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
