"""The section "quantized": every provider trains an adapter on the 4 bits, and a wrong one is found."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from allora_kernels.layer import quantized as calls
from bench import __main__ as bench
from bench import measured, quantized, report, step_budget
from bench.quantized import GPU_CASES, QuantizedCase
from bench.quantized_providers import PROVIDERS, judge_of

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")

CPU = torch.device("cpu")
TINY = QuantizedCase(24, 64, 128, 8, "float32")


@pytest.mark.parametrize(
    "case", [TINY, replace(TINY, dtype="bfloat16"), QuantizedCase(24, 64, 128, 8, *["bfloat16"] * 2)]
)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_computes_the_formula(name, kernels, case, monkeypatch):
    spec = PROVIDERS[name]
    if spec.obstacle():
        pytest.skip(spec.obstacle())
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 1)
    batch = case.batch(CPU)
    judge, step = judge_of(batch), spec.build(batch)
    # The second call finds nothing of the first.
    assert [judge.verdict(spec, step) for _ in range(2)] == [None, None]
    assert batch.inputs.x.grad is None


@pytest.mark.parametrize("position, named", enumerate(["y", "dx", "dA", "dB"]))
def test_a_wrong_result_is_found(position, named):
    batch = TINY.batch(CPU)
    right = PROVIDERS["ours"].build(batch)

    def wrong():
        return tuple(t * 1.001 if i == position else t for i, t in enumerate(right()))

    assert judge_of(batch).verdict(PROVIDERS["ours"], wrong).startswith(f"{named} is off by")


def test_plain_lora_is_not_taken_for_the_rule_nor_the_weight_before_for_the_4_bits():
    batch = TINY.batch(CPU)
    plain = PROVIDERS["peft"].build(batch)
    assert judge_of(batch).verdict(PROVIDERS["ours"], plain).startswith("dA is off by")
    whole = torch.nn.functional.linear(batch.inputs.x, batch.inputs.weight, batch.inputs.bias)
    assert judge_of(batch).verdict(PROVIDERS["frozen"], lambda: (whole,)).startswith("y is off by")


def test_a_run_times_every_provider(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "CPU_CASES", [TINY])
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file = tmp_path / "cpu.json"
    bench.main(["--only", "quantized", "--rounds", "3", "--output", str(file)], Console(quiet=True))
    (record,) = measured.records(json.loads(file.read_text()), "quantized")
    assert record["case"] == asdict(TINY) and list(record["providers"]) == list(PROVIDERS)
    for name, row in record["providers"].items():
        assert row["status"] == "ok" and row["step"]["p20_ms"] <= row["step"]["p80_ms"], (name, row)


def test_without_the_library_there_is_a_reason_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "CPU_CASES", [TINY])
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.nn", None)
    file = tmp_path / "cpu.json"
    bench.main(["--only", "quantized", "--rounds", "3", "--output", str(file)], Console(quiet=True))
    (record,) = measured.records(json.loads(file.read_text()), "quantized")
    assert all("bitsandbytes" in row["reason"] and "step" not in row for row in record["providers"].values())


def test_the_budget_has_the_kernels_between_the_floor_and_what_adds_in_place():
    counted = step_budget.QUANTIZED
    for case in GPU_CASES:
        floor, ours, added, peft = (
            step_budget.predicted_ms(counted, name, case, 800, 3) for name in ("frozen", "ours", "ours-added", "peft")
        )
        assert floor < ours < added < peft
        # Two passes over y and two over dX.
        assert (added - ours) * 3e9 == pytest.approx(4 * case.M * (case.N + case.K), rel=0.05)
    unmeasured = report.blocks({}, {})
    assert "| `ours-added` | not yet measured |" in unmeasured["quantized"]
    assert unmeasured["quantized-budget"].count("not yet measured") == len(GPU_CASES) * len(counted.providers)
