"""The section "experts": every provider computes the same layers, a wrong one is found, the budget counts what is there."""

import io
import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from bench import __main__ as bench
from bench import experts, measured, report, results, step_budget, step_report, targets
from bench.expert_providers import PROVIDERS, judge_of
from bench.experts import GPU_CASES, ExpertCase

CPU = torch.device("cpu")
TINY = ExpertCase(5, 40, 24, 32, 8, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_computes_the_loops_gradients(name, dtype):
    spec = PROVIDERS[name]
    if spec.obstacle():
        pytest.skip(spec.obstacle())
    batch = ExpertCase(5, 40, 24, 32, 8, dtype).batch(CPU)
    judge, step = judge_of(batch), spec.build(batch)
    # The second call finds nothing of the first.
    assert [judge.verdict(spec, step) for _ in range(2)] == [None, None]
    assert batch.inputs.x.grad is None


@pytest.mark.parametrize("name", ["ours", "peft"])
@pytest.mark.parametrize("position, named", [(0, "y"), (1, "dx"), (2, "dA"), (3, "dB")])
def test_a_wrong_result_is_found(name, position, named):
    batch = TINY.batch(CPU)
    right = PROVIDERS[name].build(batch)

    def wrong():
        # The experts in another order.
        return tuple(t.flip(0) if i == position else t for i, t in enumerate(right()))

    assert judge_of(batch).verdict(PROVIDERS[name], wrong).startswith(f"{named} is off by")


def test_plain_lora_is_not_taken_for_the_rule():
    batch = TINY.batch(CPU)
    assert judge_of(batch).verdict(PROVIDERS["ours"], PROVIDERS["grouped-mm"].build(batch)).startswith("dA is off by")


def test_a_run_times_every_provider(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "CPU_CASES", [TINY])
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    file, printed = tmp_path / "cpu.json", Console(record=True, file=io.StringIO(), width=200)
    bench.main(["--only", "experts", "--rounds", "3", "--output", str(file)], printed)
    (record,) = measured.records(json.loads(file.read_text()), "experts")
    assert record["case"] == asdict(TINY) and list(record["providers"]) == list(PROVIDERS)
    for name, row in record["providers"].items():
        assert row["status"] == "ok" and row["step"]["p20_ms"] <= row["step"]["p80_ms"], (name, row)
    text = printed.export_text()
    assert "experts: 5 experts 32x24, 40 rows, R=8 float32" in text and "over the floor" in text


def test_the_budget_of_the_published_case():
    case = GPU_CASES[0]
    counted = step_budget.EXPERTS
    times = {name: step_budget.predicted_ms(counted, name, case, 800, 3) for name in counted.providers}
    assert list(times) == list(PROVIDERS)
    # The weights are read once a pass, 403 MB of them, by all but PEFT, which moves as much seven times more.
    weights = 128 * 768 * 2048 * 2 / 3e12 * 1e3
    assert 2 * weights < times["frozen"] < times["ours"] < times["grouped-mm"] < 2.6 * weights
    assert 9 * weights < times["peft"] < 9.5 * weights


def made_up(milliseconds, mebibytes):
    gathered = results.Results(None, {"device": "Made Up H100", "commit": "c" * 40, "date": "2026-01-01", "threads": 1})
    for case in GPU_CASES:
        rows = {
            name: {
                "status": "ok",
                "step": {"median_ms": time, "p20_ms": time, "p80_ms": time},
                "step_peak_bytes": mebibytes[name] * 2**20,
            }
            for name, time in milliseconds.items()
        }
        gathered.add("experts", asdict(case), rows)
    return gathered.data


def test_targets_and_table_of_made_up_results():
    peaks = {"frozen": 100, "ours": 150, "grouped-mm": 300, "peft": 900}
    data = made_up({"frozen": 1.0, "ours": 1.25, "grouped-mm": 2.0, "peft": 2.0}, peaks)
    table = targets.table(data)
    assert f"| {GPU_CASES[0]}: faster than `peft` | ≥ 2x | 1.6x | **no** |" in table
    # 384 MiB of weights in the smallest case.
    over = (384 + 150) / (384 + 100)
    assert f"| experts: memory with the weights over `frozen`, worst case | ≤ 1.05x | {over:.3g}x | **no** |" in table

    assert "| `peft` | 2.00 (2.00 to 2.00) = 2.00x, 900 MiB |" in step_report.block(step_report.EXPERTS, [data])
    case, rows = next(step_budget.rows(step_budget.EXPERTS, 800, 3, [data]))
    assert case == GPU_CASES[0] and rows[1][0] == "ours" and rows[1][-1] == "1.250"
    unmeasured = report.blocks({}, {})
    assert "| `ours` | not yet measured |" in unmeasured["experts"]
    assert unmeasured["experts-budget"].count("not yet measured") == len(GPU_CASES) * len(PROVIDERS)
