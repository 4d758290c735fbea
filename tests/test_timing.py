"""Timing of calls side by side: order, summary, budget; on a GPU, what is queued around a call."""

import gc
import time

import pytest
import torch

from allora_kernels.tools import timing
from allora_kernels.tools.timing import MIN_ROUNDS, Timing, dispatch, interleaved


def recorder(log, name):
    return lambda: log.append(name)


def test_each_round_times_every_call_once_in_a_turning_order():
    log = []
    timings = interleaved({name: recorder(log, name) for name in "abc"}, rounds=4, warmup=2)
    assert log[:6] == list("aabbcc")
    assert "".join(log[6:]) == "abcbcacababc"
    assert list(timings) == list("abc") and all(t.rounds == 4 for t in timings.values())


def test_the_slower_call_has_the_longer_time():
    timings = interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=5)
    assert 20 <= timings["slow"].median_ms < 60
    assert timings["fast"].median_ms < 5


def test_summary():
    summary = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 100.0])
    assert (summary.median_ms, summary.p20_ms, summary.p80_ms, summary.rounds) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)
    assert interleaved({}) == {}


@pytest.mark.parametrize("measure", [interleaved, dispatch])
def test_a_budget_ends_the_rounds_but_not_before_the_fewest(measure):
    assert measure({"a": lambda: time.sleep(0.01)}, rounds=1000, warmup=1, budget_s=0.1)["a"].rounds < 20
    assert measure({"a": lambda: None}, rounds=1000, warmup=1, budget_s=0.0)["a"].rounds == MIN_ROUNDS


def test_a_spent_budget_still_warms_every_call_up_once():
    log = []
    calls = {"a": lambda: log.append("a") or time.sleep(0.01), "b": recorder(log, "b")}
    interleaved(calls, rounds=1, warmup=50, budget_s=0.005)
    assert log == ["a", "b", "a", "b"]


def test_the_collector_rests_and_comes_back_after_an_error():
    seen = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=1, warmup=1)
    assert seen == [True, False] and gc.isenabled()

    calls = iter([None])
    with pytest.raises(StopIteration):
        interleaved({"a": lambda: next(calls)}, rounds=1, warmup=1)
    assert gc.isenabled()


@pytest.fixture
def queue(monkeypatch):
    """torch.cuda as a list of what the host asked of it, in order."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 0.5

    class Properties:
        L2_cache_size = 2**20

    class Guard:
        def __init__(self, device): ...
        def __enter__(self): ...
        def __exit__(self, *error): ...

    cuda = torch.cuda
    zeros = torch.zeros
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "device", Guard)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)))
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1024)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(torch, "sum", lambda t, dim, out: log.append(("read", t.numel() * t.element_size())))
    return log


def test_on_a_gpu_a_call_stands_between_events_behind_a_flush_and_a_delay(queue):
    def call():
        queue.append("call")
        time.sleep(0.003)

    timings = interleaved({"a": call, "b": call}, rounds=2, warmup=1, device="cuda")
    assert timings["a"] == Timing(0.5, 0.5, 0.5, 2)
    rounds = queue[queue.index(("read", 4 * 2**20)) :]
    kinds = [entry[0] if isinstance(entry, tuple) else entry for entry in rounds]
    once = ["read", "sleep", "event", "call", "event"]
    assert kinds == [*once, *once, "synchronize"] * 2
    # The probe's clock: a million cycles in half a millisecond. The delay outlasts the host's 3 ms.
    assert all(3 < entry[1] / 2_000_000 <= 20 for entry in rounds if entry[0] == "sleep")


def test_dispatch_begins_with_the_gpu_idle(queue):
    dispatch({"a": recorder(queue, "call")}, rounds=3, warmup=1, device="cuda")
    assert queue == ["call", *["synchronize", "call"] * 3]
