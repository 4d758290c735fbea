"""Tuning measures what can run, keeps the fastest, and never a wrong one."""

import json
import sys

import pytest
import torch

import csrc_triton
from allora_kernels.tools import tune as tune_module
from allora_kernels.tools.timing import Timing
from allora_kernels.tools.tune import tune
from csrc_triton import plans, tuning

SHAPE = (8, 24, 16, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    plans.forget()
    tuning._entries.cache_clear()


def fake_times(monkeypatch, fastest):
    def interleaved(calls, **_):
        for run in calls.values():
            run()
        return {name: Timing(1.0 if fastest in name else 2.0, 0.0, 0.0, 3) for name in calls}

    monkeypatch.setattr(tune_module.timing, "interleaved", interleaved)


@pytest.mark.parametrize("fastest, way", [("persistent", "persistent"), ("program a tile", "tiles")])
def test_the_fastest_is_kept_and_looked_up(device, monkeypatch, fastest, way):
    fake_times(monkeypatch, fastest)
    results = list(tune(SHAPE, torch.float16, torch.float16, torch.device(device)))
    assert [result.step for result in results] == ["y", "dx"]
    assert all(fastest in result.winner and not result.rejected for result in results)
    key = tuning.device_key(torch.device(device))
    m, n, k, r = SHAPE
    for call in (("adapted_linear", m, n, k, r), ("fused_linear", m, k, n, r)):
        assert tuning.lookup(key, plans.Call(*call, torch.float16, torch.float16))[0] == way
    assert len(json.loads(tuning.path(key).read_text())["entries"]) == 2


def test_a_wrong_plan_is_not_timed(device, monkeypatch):
    fake_times(monkeypatch, "vendor")
    right = csrc_triton.fused_linear

    def wrong(*args):
        y = right(*args)
        return y + 1 if args[-1].way == "vendor" else y

    monkeypatch.setattr(csrc_triton, "fused_linear", wrong)
    _, dx = tune(SHAPE, torch.float16, torch.float32, torch.device(device))
    assert [plan for plan in dx.rejected if "vendor" in plan] and "vendor" not in dx.winner
    assert "error" in next(iter(dx.rejected.values()))


def test_a_plan_that_raises_is_not_timed(device, monkeypatch):
    fake_times(monkeypatch, "persistent")

    def fail(*_):
        raise RuntimeError("out of resources")

    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["csrc_triton.fused_linear"], "launch_persistent", fail)
    for result in tune(SHAPE, torch.float16, torch.float16, torch.device(device)):
        assert list(result.rejected.values()) == ["RuntimeError: out of resources"]
        assert "persistent" not in result.winner


def test_where_the_kernels_cannot_run_there_is_nothing_to_tune(device):
    with pytest.raises(ValueError, match="float64"):
        next(tune(SHAPE, torch.float64, torch.float64, torch.device(device)))
