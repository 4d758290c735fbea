"""The section "per-sample": every provider clips the same gradients, a wrong one is found, and the report quotes what was
measured."""

import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from bench import __main__ as bench
from bench import measured, report, results, samples, step_report, targets
from bench.sample_providers import PROVIDERS, Batch, Judge, typical_norm
from bench.samples import CPU_CASES, GPU_CASES, SampleCase

CPU = torch.device("cpu")
TINY = SampleCase(6, 5, 24, 32, 4, "float32", "float32")


def batch_of(case):
    inputs = case.inputs(CPU)
    return Batch(inputs, typical_norm(inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_clips_the_gradients_of_the_loop(name, dtype):
    spec = PROVIDERS[name]
    if spec.obstacle():
        pytest.skip(spec.obstacle())
    batch = batch_of(SampleCase(6, 5, 24, 32, 4, dtype, dtype))
    judge, step = Judge(batch), spec.build(batch)
    # The second call finds nothing of the first.
    assert [judge.verdict(spec, step) for _ in range(2)] == [None, None]
    assert batch.inputs.x.grad is None


@pytest.mark.parametrize("position, named", [(0, "dx"), (1, "dA"), (2, "dB")])
def test_a_wrong_result_is_found(position, named):
    batch = batch_of(TINY)
    right = PROVIDERS["ours"].build(batch)

    def wrong():
        return tuple(t * 1.001 if i == position else t for i, t in enumerate(right()))

    assert Judge(batch).verdict(PROVIDERS["ours"], wrong).startswith(f"{named} is off by")


def test_what_is_not_clipped_is_wrong_under_each_rule():
    batch = batch_of(TINY)
    for name in ("ours", "vmap-grad"):
        unclipped = PROVIDERS[name].build(batch._replace(max_norm=1e9))
        assert Judge(batch).verdict(PROVIDERS[name], unclipped).startswith("dA is off by")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(samples, "CPU_CASES", [TINY])
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def run(*arguments):
    return bench.main(["--only", "per-sample", "--rounds", "3", *arguments], Console(quiet=True))


def test_a_run_times_every_provider(small, tmp_path, monkeypatch):
    file = tmp_path / "cpu.json"
    spec = PROVIDERS["opacus-ghost"]
    monkeypatch.setitem(PROVIDERS, "absent", spec.__class__("", spec.build, needs_opacus=True))
    monkeypatch.setattr(spec.__class__, "obstacle", lambda self: "no" if self is PROVIDERS["absent"] else None)
    run("--output", str(file))
    (record,) = measured.records(json.loads(file.read_text()), "per-sample")
    rows = record["providers"]
    assert rows.pop("absent") == {"status": "unavailable", "reason": "no"}
    for name, row in rows.items():
        assert row["status"] == "ok" and row["step"]["p20_ms"] <= row["step"]["p80_ms"], (name, row)


def test_providers_shapes_and_missing_choose_what_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_source", lambda commit: ("a" * 40, False))
    file = tmp_path / "cpu.json"
    run("--providers", "ours", "--shapes", "M=30,K=32", "--output", str(file))
    (record,) = measured.records(json.loads(file.read_text()), "per-sample")
    assert list(record["providers"]) == ["plain", "ours"]
    run("--providers", "ours", "--shapes", "M=31", "--output", str(file))
    run("--providers", "ours", "--missing", "--output", str(file))
    assert list(measured.records(json.loads(file.read_text()), "per-sample")) == [record]
    other = tmp_path / "other.json"
    run("--minutes", "0", "--output", str(other))
    assert json.loads(other.read_text())["not_run"] == {"per-sample": [asdict(TINY)]}


def made_up(device, cases, milliseconds, mebibytes):
    gathered = results.Results(None, {"device": device, "commit": "c" * 40, "date": "2026-01-01", "threads": 1})
    for case in cases:
        rows = {
            name: {"status": "ok", "step": {"median_ms": time, "p20_ms": time, "p80_ms": time}}
            for name, time in milliseconds.items()
        }
        for name, peak in mebibytes.items():
            rows[name]["step_peak_bytes"] = peak * 2**20
        gathered.add("per-sample", asdict(case), rows)
    return gathered.data


def test_a_cpus_file_reaches_the_page_beside_a_gpus(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text((results.ROOT / page).read_text())
    for stem, device, cases, time in (("gpu", "Made Up H100", GPU_CASES, 2.5), ("cpu", "cpu", CPU_CASES, 25.0)):
        data = made_up(device, cases, {name: time for name in PROVIDERS}, {})
        (tmp_path / f"{stem}.json").write_text(json.dumps(data))
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 0
    page = (tmp_path / "docs/performance.md").read_text()
    assert page.count("| `vmap-grad` | 2.50 (") == page.count("| `vmap-grad` | 25.0 (") == 1
    assert "| on a CPU: clipped step faster than `opacus-ghost`, worst b x T | ≥ 1x | 1x | yes |" in page


def test_targets_and_table_of_made_up_results():
    times = {"plain": 2.0, "ours": 2.2, "opacus-hooks": 12.1, "opacus-ghost": 4.0}
    gpu = made_up("Made Up H100", GPU_CASES, times, {"plain": 10, "ours": 13, "opacus-hooks": 20, "opacus-ghost": 12})
    cpu = made_up("cpu", CPU_CASES, {"plain": 20.0, "ours": 22.0, "opacus-hooks": 33.0, "opacus-ghost": 11.0}, {})
    cpu["records"][0]["providers"]["opacus-hooks"] = {"status": "wrong", "reason": "dA is off by 1"}
    table = targets.table(gpu, cpu)
    assert "| clipped step over our plain step, worst b x T | ≤ 1.15x | 1.1x | yes |" in table
    assert "| clipped step faster than `opacus-hooks`, worst b x T | ≥ 5x | 5.5x | yes |" in table
    assert "| clipped step faster than `opacus-ghost`, worst b x T | ≥ 2x | 1.82x | **no** |" in table
    assert "that of `opacus-hooks`, worst b x T | ≤ 0.5x | 0.3x | yes |" in table
    assert "that of `opacus-ghost`, worst b x T | ≤ 0.5x | 1.5x | **no** |" in table
    assert (
        "| on a CPU: clipped step faster than `opacus-hooks`, worst b x T | ≥ 1x | 1.5x in 2 of 3 cases | so far |"
        in table
    )
    assert "| on a CPU: clipped step faster than `opacus-ghost`, worst b x T | ≥ 1x | 0.5x | **no** |" in table

    text = step_report.block(step_report.SAMPLES, [gpu, cpu])
    assert "| `ours` | 2.20 (2.20 to 2.20) = 1.10x, 13 MiB |" in text and "On a GPU, ms" not in text
    assert "On one core of a CPU, ms" in text and "wrong: dA is off by 1" in text and "commit cccccccccc" in text
    alone = step_report.block(step_report.SAMPLES, [cpu])
    assert f"| `ours` |{' not yet measured |' * len(GPU_CASES)}" in alone and "| `ours` | 22.0" in alone
    assert "| `ours` | not yet measured |" in report.blocks({}, {})["per-sample"]
