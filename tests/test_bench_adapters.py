"""The section "adapters": every provider trains each adapter on its own samples, and a wrong one is found."""

import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from bench import __main__ as bench
from bench import adapters, measured, report, step_budget
from bench.adapter_providers import PROVIDERS, judge_of
from bench.adapters import GPU_CASES, AdaptersCase

CPU = torch.device("cpu")
TINY = AdaptersCase(3, 7, 5, 24, 32, 8, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_computes_the_loops_gradients(name, dtype):
    spec = PROVIDERS[name]
    if spec.obstacle():
        pytest.skip(spec.obstacle())
    batch = AdaptersCase(3, 7, 5, 24, 32, 8, dtype).batch(CPU)
    judge, step = judge_of(batch), spec.build(batch)
    # The second call finds nothing of the first.
    assert [judge.verdict(spec, step) for _ in range(2)] == [None, None]
    assert batch.x.grad is None


@pytest.mark.parametrize("name", ["ours", "one-by-one", "peft"])
def test_another_adapters_samples_are_wrong(name):
    batch = TINY.batch(CPU)
    other = batch._replace(of_sample=(1, *batch.of_sample[1:]))
    assert judge_of(batch).verdict(PROVIDERS[name], PROVIDERS[name].build(other)).startswith("y is off by")


def test_what_is_timed_of_one_by_one_is_the_layers_alone():
    batch = TINY.batch(CPU)
    results = PROVIDERS["one-by-one"].build(batch)()
    # y of each adapter's own samples, as its layer gave it.
    assert [len(y) for y, *_ in results] == [batch.of_sample.count(e) for e in range(3)]


@pytest.mark.parametrize("position, named", [(2, "dA of adapter 0"), (4, "dA of adapter 2"), (6, "dB of adapter 1")])
def test_a_wrong_gradient_is_found(position, named):
    batch = TINY.batch(CPU)
    right = PROVIDERS["ours"].build(batch)

    def wrong():
        return tuple(t * 1.001 if i == position else t for i, t in enumerate(right()))

    assert judge_of(batch).verdict(PROVIDERS["ours"], wrong).startswith(f"{named} is off by")


def test_plain_lora_is_not_taken_for_the_rule():
    batch = TINY.batch(CPU)
    assert (
        judge_of(batch).verdict(PROVIDERS["ours"], PROVIDERS["peft"].build(batch)).startswith("dA of adapter 0 is off")
    )


def test_a_run_times_every_provider(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "CPU_CASES", [TINY])
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "cpu.json"
    bench.main(["--only", "adapters", "--rounds", "3", "--output", str(file)], Console(quiet=True))
    (record,) = measured.records(json.loads(file.read_text()), "adapters")
    assert record["case"] == asdict(TINY) and list(record["providers"]) == list(PROVIDERS)
    for name, row in record["providers"].items():
        assert row["status"] == "ok" and row["step"]["p20_ms"] <= row["step"]["p80_ms"], (name, row)


def test_the_budget_grows_with_the_adapters_alone():
    counted = step_budget.ADAPTERS
    ratios = [
        step_budget.predicted_ms(counted, "ours", case, 800, 3)
        / step_budget.predicted_ms(counted, "frozen", case, 800, 3)
        for case in GPU_CASES
    ]
    # One adapter costs 1.10 there, and passes over y and dX come on top; each adapter more is 128 KiB for A and for B.
    assert 1.15 < ratios[0] < ratios[1] < ratios[2] < 1.3
    unmeasured = report.blocks({}, {})
    assert "| `one-by-one` | not yet measured |" in unmeasured["adapters"]
    assert unmeasured["adapters-budget"].count("not yet measured") == len(GPU_CASES) * len(counted.providers)
