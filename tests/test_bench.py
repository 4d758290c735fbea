"""The benchmark: what it measures is right before it is timed, nothing stops it, and its file keeps what it has."""

import argparse
import io
import json
import subprocess
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from allora_kernels import reference
from bench import __main__ as bench
from bench import cases, layer, markdown, measured, model, providers, results
from bench.cases import Case
from bench.providers import PROVIDERS, Judge, Provider
from bench.runner import Run

TINY = Case(40, 24, 32, 4, "float32", "float32")
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """A grid of one tiny layer, no ceilings, a source without changes."""
    monkeypatch.setattr(cases, "cpu_grid", lambda: [TINY])
    monkeypatch.setattr(cases, "compiles", lambda case: False)
    monkeypatch.setattr(bench.ceilings, "measure", lambda device, dtypes: {})
    monkeypatch.setattr(results, "_source", lambda commit: ("a" * 40, False))
    # The process's own, for the tests after this one.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def run(*arguments):
    return bench.main(["--rounds", "3", *arguments], Console(quiet=True))


def record_of(file, section="layer"):
    (record,) = measured.records(json.loads(file.read_text()), section)
    return record


# --- providers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name not in ("compile", "epilogue-atomics")])
def test_every_provider_computes_its_formula(name, dtypes):
    spec, inputs = PROVIDERS[name], Case(96, 80, 64, 8, *dtypes).inputs("cpu")
    if spec.obstacle(inputs):
        pytest.skip(spec.obstacle(inputs))
    inputs = spec.inputs(inputs)
    assert Judge().verdict(spec, spec.build(inputs), inputs) is None


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda y: y * 1.001, "y"),
        (lambda y: y * float("nan"), "y"),
        (lambda y: y.detach() + 0.999 * (y - y.detach()), "dx"),
    ],
)
def test_a_wrong_result_is_found(spoil, named):
    inputs = TINY.inputs("cpu")
    for name in ("frozen", "ours", "peft", "peft-dora"):
        right = PROVIDERS[name].build(inputs)
        wrong = Provider(lambda x, right=right: spoil(right.forward(x)), right.parameters)
        assert Judge().verdict(PROVIDERS[name], wrong, inputs).startswith(f"{named} is off by")


def test_gradients_of_fp32_factors_that_were_computed_in_16_bits_are_wrong():
    inputs = Case(96, 80, 64, 8, "bfloat16", "float32").inputs("cpu")
    lora_A, lora_B = (t.clone().requires_grad_() for t in (inputs.lora_A, inputs.lora_B))

    def forward(x):
        narrow = (t.to(torch.bfloat16) for t in (lora_A, lora_B))
        return reference.allora_linear(x, inputs.weight, inputs.bias, *narrow, eta=providers.ETA)

    for name in ("ours", "eager"):
        verdict = Judge().verdict(PROVIDERS[name], Provider(forward, (lora_A, lora_B)), inputs)
        assert verdict.startswith("dA is off by")


def test_plain_lora_is_no_allora():
    inputs = TINY.inputs("cpu")
    verdict = Judge().verdict(PROVIDERS["ours"], PROVIDERS["addmm-in-place"].build(inputs), inputs)
    assert verdict.startswith("dA is off by")


def test_the_kernels_are_not_there_on_a_cpu():
    assert "cpu tensors" in PROVIDERS["epilogue-atomics"].obstacle(TINY.inputs("cpu"))


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_grid_has_the_targets_first_and_nothing_twice():
    grid = cases.gpu_grid()
    assert grid[:3] == list(cases.TARGETS.values())
    assert {(case.adapter_dtype, case.R) for case in grid[:11]} >= {("float32", 16), ("float32", 8), ("bfloat16", 8)}
    assert len(grid) == len(set(grid)) == 6 * 4 * 4 + 8 + 2


def test_shapes_choose_from_the_grid_or_stand_for_themselves():
    grid = cases.gpu_grid()
    chosen = cases.matching(grid, [cases.parse_shape("M=512,R=16")])
    assert {(c.M, c.R, c.dtype) for c in chosen} == {(512, 16, "bfloat16")} and len(chosen) == 6
    assert cases.matching(grid, [cases.parse_shape("M=3,N=5,K=7,R=2")]) == [Case(3, 5, 7, 2)]
    with pytest.raises(argparse.ArgumentTypeError, match="M=8192"):
        cases.parse_shape("8192x4096")


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_times_every_provider_and_writes_where_asked(small, tmp_path):
    file = tmp_path / "cpu.json"
    assert run("--only", "layer", "dispatch", "--output", str(file)) == 0
    data = json.loads(file.read_text())
    assert data["runs"][0]["torch"] == torch.__version__ and data["runs"][0]["date"]
    for section in ("layer", "dispatch"):
        rows = record_of(file, section)["providers"]
        for name in ("frozen", "ours", "eager", "peft", "peft-dora", "addmm-in-place"):
            assert rows[name]["status"] == "ok"
            for kind in layer.PASSES:
                assert rows[name][kind]["p20_ms"] <= rows[name][kind]["median_ms"] <= rows[name][kind]["p80_ms"]
        assert rows["epilogue-atomics"]["status"] == "unavailable" and "forward" not in rows["epilogue-atomics"]
    assert data["not_run"] == {"layer": [], "dispatch": []}


def test_a_wrong_provider_has_no_time_and_a_failing_one_stops_nothing(small, tmp_path, monkeypatch):
    def wrong(inputs):
        provider = PROVIDERS["frozen"].build(inputs)
        return Provider(lambda x: provider.forward(x) + 1)

    def broken(inputs):
        raise RuntimeError("no such library\nmore")

    frozen = PROVIDERS["frozen"]
    monkeypatch.setitem(PROVIDERS, "wrong", providers.Spec("", wrong, "frozen"))
    monkeypatch.setitem(PROVIDERS, "broken", providers.Spec("", broken, "frozen"))
    monkeypatch.setitem(PROVIDERS, "last", frozen)
    file = tmp_path / "cpu.json"
    run("--only", "layer", "--output", str(file))
    rows = record_of(file)["providers"]
    assert rows["wrong"]["status"] == "wrong" and "y is off by" in rows["wrong"]["reason"]
    assert "forward" not in rows["wrong"]
    assert rows["broken"] == {"status": "failed", "reason": "RuntimeError: no such library"}
    assert rows["last"]["forward"]["median_ms"] > 0


def test_a_measurement_that_fails_is_recorded_and_the_next_case_runs(small, tmp_path, monkeypatch):
    other = Case(16, 24, 32, 4, "float32", "float32")
    monkeypatch.setattr(cases, "cpu_grid", lambda: [TINY, other])
    measure = layer._measure_layer

    def fails_once(run, ready, x, g):
        if x.shape[0] == TINY.M:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(run, ready, x, g)

    monkeypatch.setattr(layer, "_measure_layer", fails_once)
    file = tmp_path / "cpu.json"
    run("--only", "layer", "--providers", "ours", "--output", str(file))
    last, first = measured.records(json.loads(file.read_text()), "layer")
    assert first["providers"]["ours"] == {"status": "failed", "reason": "out of memory"}
    assert last["providers"]["ours"]["forward"]["median_ms"] > 0


def test_without_an_output_a_cpu_run_writes_nothing(small, monkeypatch):
    monkeypatch.setattr(results.Path, "write_text", lambda *a: pytest.fail("written"))
    run("--only", "dispatch")


def test_what_no_time_is_left_for_is_listed_and_goes_on_later(small, tmp_path):
    file = tmp_path / "cpu.json"
    run("--only", "layer", "--minutes", "0", "--output", str(file))
    assert json.loads(file.read_text())["not_run"] == {"layer": [asdict(TINY)]}
    run("--only", "layer", "--missing", "--output", str(file))
    assert json.loads(file.read_text())["not_run"] == {"layer": []}
    when = record_of(file)
    run("--only", "layer", "--missing", "--output", str(file))
    assert record_of(file)["providers"] == when["providers"]


def test_the_frozen_floor_is_in_every_record(small, tmp_path):
    file = tmp_path / "cpu.json"
    run("--only", "layer", "--providers", "eager", "--output", str(file))
    assert list(record_of(file)["providers"]) == ["frozen", "eager"]


def test_records_of_fewer_providers_do_not_displace_others(tmp_path):
    def row(milliseconds):
        return {"status": "ok", "forward": {"median_ms": milliseconds}}

    file = tmp_path / "file.json"
    case = asdict(TINY)
    first = results.Results(file, {"commit": "a"})
    first.add("layer", case, {"frozen": row(1.0), "ours": row(1.1), "peft": row(1.5)})
    second = results.Results(file, {"commit": "b"})
    second.add("layer", case, {"frozen": row(2.0), "ours": row(2.1)})
    data = results.load(file)
    assert measured.ratio(data, TINY, "ours", "forward") == 1.05
    # Two providers are compared within one run, however new another is.
    assert measured.ratio(data, TINY, "peft", "forward", over="ours") == 1.5 / 1.1
    assert measured.ratio(data, TINY, "peft", "backward") is None

    third = results.Results(file, {"commit": "c"})
    third.add("layer", case, {"frozen": row(1.0), "ours": row(1.0), "peft": row(2.0)})
    data = results.load(file)
    assert [r["commit"] for r in data["runs"]] == ["c"] and [r["run"] for r in data["records"]] == [0]


def test_a_run_of_fewer_cases_leaves_the_others_to_be_run(small, tmp_path):
    file = tmp_path / "cpu.json"
    run("--only", "layer", "--minutes", "0", "--output", str(file))
    run("--only", "layer", "--shapes", "M=999", "--output", str(file))
    assert json.loads(file.read_text())["not_run"] == {"layer": [asdict(TINY)]}


HERE = {"device": "a GPU", "commit": "a" * 40, "torch": "2.13", "triton": "3.6", "changed_files": False}


@pytest.mark.parametrize(
    "change, there",
    [
        ({}, True),
        ({"torch": "2.14"}, False),
        ({"triton": "3.7"}, False),
        ({"commit": "b" * 40}, False),
        ({"changed_files": True}, False),
        ({"commit": None}, False),
    ],
)
def test_what_is_missing_is_of_this_source_and_these_versions(tmp_path, change, there):
    file = tmp_path / "file.json"
    results.Results(file, HERE).add("layer", asdict(TINY), {"ours": {"status": "ok"}})
    assert results.Results(file, HERE | change).has("layer", asdict(TINY), ["ours"]) is there
    assert not results.Results(file, HERE).has("layer", asdict(TINY), ["ours", "peft"])


def test_what_failed_is_run_again_and_displaces_nothing_right(tmp_path):
    file = tmp_path / "file.json"
    for status, has, kept in (("ok", True, 1), ("failed", False, 2), ("ok", True, 1)):
        gathered = results.Results(file, HERE)
        gathered.add("layer", asdict(TINY), {"frozen": {"status": "ok"}, "ours": {"status": status}})
        assert gathered.has("layer", asdict(TINY), ["frozen", "ours"]) is has
        assert len(gathered.data["records"]) == kept


def test_a_file_has_the_results_of_one_device(small, tmp_path, monkeypatch):
    file = tmp_path / "h100.json"
    results.Results(file, HERE).add("layer", asdict(TINY), {"ours": {"status": "ok"}})
    before = file.read_text()
    monkeypatch.setattr(bench, "_measure", lambda *a: pytest.fail("measured"))
    console = Console(record=True, width=300, file=io.StringIO())
    assert bench.main(["--output", str(file)], console) == 2
    assert "has the results of a GPU, this run is on cpu" in console.export_text() and file.read_text() == before


def test_two_runs_do_not_write_one_file(small, tmp_path, monkeypatch):
    file, console = tmp_path / "cpu.json", Console(record=True, width=300, file=io.StringIO())
    monkeypatch.setattr(bench, "_measure", lambda *a: inner.append(bench.main(["--output", str(file)], console)))
    inner = []
    assert bench.main(["--output", str(file)], console) == 0 and inner == [2]
    assert f"another run is writing to {file}" in console.export_text()


@pytest.mark.parametrize(
    "arguments", [["--commit", "nonsense"], ["--commit", "abc"], ["--output", "."], ["--shapes", "foo"]]
)
def test_a_mistake_in_an_option_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(arguments)
    said = {"nonsense": "hexadecimal", "abc": "7 to 40", ".": "is a folder", "foo": "such as M=8192"}[arguments[1]]
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_git_is_asked_whether_files_were_changed(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def source(commit=None):
        found = results.environment(CPU, commit)
        return found["commit"], found["changed_files"]

    assert source() == (None, None) and source("a" * 7) == ("a" * 7, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m")
    head = git("rev-parse", "HEAD")
    assert source() == source(head[:9]) == (head, False)
    (tmp_path / "file").write_text("2")
    assert source() == source(head) == (head, True)
    # A commit that the repository does not know: nothing is claimed of it.
    assert source("f" * 40) == ("f" * 40, None)
    runs = [HERE | {"changed_files": changed, "date": "d"} for changed in (None, True, False)]
    shown = markdown.provenance({"runs": runs, "records": [{"section": "layer", "run": i} for i in range(3)]})
    assert (
        "aaaaaaaaaa, uncommitted changes not known, d." in shown and "aaaaaaaaaa, with uncommitted changes, d." in shown
    )
    assert "aaaaaaaaaa, d." in shown


def test_a_file_of_something_else_is_left_alone(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        results.Results(file, {})
    assert results.all_files(tmp_path) == []


# --- a whole model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return model.llama(2, CPU, "float32", tiny=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_variant_of_the_model_is_right_and_timed(base, checkpointing):
    said = []
    run = Run(CPU, results.Results(None, {}), lambda *row: said.append(row))
    case = model.ModelCase(2, checkpointing, False, 1, 16, 4, "float32")
    before = {name: p.clone() for name, p in base.named_parameters()}
    rows = model._measure(run, base, case, list(model.VARIANTS))
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert all(row["step"]["median_ms"] > 0 and row["tokens_per_s"] > 0 for row in rows.values())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_variants_share_the_weights_and_train_their_adapters_alone(base):
    case = model.ModelCase(1, False, False, 1, 16, 4, "float32")
    names = {"ours": "lora_A", "peft": "lora_A", "peft-dora": "lora_magnitude_vector"}
    shared = {p.data_ptr() for p in base.parameters()}
    for variant, name in names.items():
        adapted = model.adapted(base, case, variant)
        trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert any(name in n for n in trainable) and all("lora" in n for n in trainable)
        assert all(p.data_ptr() in shared for p in adapted.parameters() if not p.requires_grad)
        # 7 linear layers in the one that is left.
        assert len([n for n in trainable if "lora_A" in n]) == 7


def test_an_adapter_that_changes_the_fresh_model_is_wrong(base):
    case = model.ModelCase(1, False, False, 1, 16, 4, "float32")
    step = model.Step(model.adapted(base, case, "ours"), torch.arange(16)[None])
    loss = step().item()
    assert model._fault(step, loss, loss) is None
    assert "fresh adapter" in model._fault(step, loss, 1.1 * loss)
    step.parameters[0].grad = None
    assert "no gradient" in model._fault(step, loss, loss)


@pytest.mark.parametrize("variant, factor", [("ours", "lora_A"), ("ours-fp32", "lora_B"), ("peft", "lora_B")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_with_wrong_gradients_is_wrong(base, monkeypatch, variant, factor, layer):
    def spoiled(model_, case, name):
        found = real(model_, case, name)
        for parameter_name, p in found.named_parameters():
            if p.requires_grad and factor in parameter_name and f"layers.{layer}." in parameter_name:
                p.register_hook(lambda g: 1.01 * g)
        return found

    real = model._with_adapters
    monkeypatch.setattr(model, "_with_adapters", spoiled)
    run = Run(CPU, results.Results(None, {}), print)
    case = model.ModelCase(2, False, False, 1, 16, 4, "float32")
    row = model._measure(run, base, case, ["frozen", variant])[variant]
    which = ("first", "last")[layer]
    assert row["status"] == "wrong" and row["reason"].startswith(
        f"of the {which} adapted layer d{factor[-1]} is off by"
    )


def test_a_model_too_large_for_memory_is_halved_at_once(monkeypatch):
    seen = []

    def measure(run, base, case, names):
        seen.append((case.layers, case.checkpointing))
        reason = "out of memory" if case.layers > 8 else ""
        return {name: {"status": "failed", "reason": reason} for name in names}

    monkeypatch.setattr(model, "CPU_CASES", [model.ModelCase(32, False, False), model.ModelCase(8, True, False)])
    monkeypatch.setattr(model, "llama", lambda *args, **kwargs: object())
    monkeypatch.setattr(model, "_measure", measure)
    model.run_model(Run(CPU, results.Results(None, {}), lambda *row: None))
    assert seen == [(32, False), (16, False), (8, False), (8, True)]


def test_a_model_that_time_ran_out_on_is_still_to_be_run(base, tmp_path, monkeypatch):
    case = model.ModelCase(1, False, False, 1, 16, 4, "float32")
    monkeypatch.setattr(model, "CPU_CASES", [case])
    monkeypatch.setattr(model, "llama", lambda *args, **kwargs: base)
    gathered = results.Results(tmp_path / "file.json", {"commit": "a"})
    run = Run(CPU, gathered, lambda *row: None)
    ticks = iter([False, False, False])  # for the case, and two of its variants
    monkeypatch.setattr(run, "time_is_up", lambda: next(ticks, True))
    model.run_model(run)
    (record,) = gathered.data["records"]
    assert [name for name, row in record["providers"].items() if row["tokens_per_s"] > 0] == ["frozen", "ours"]
    assert gathered.data["not_run"] == {"model": [asdict(case)]}
    assert not gathered.has("model", asdict(case), list(model.VARIANTS))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A run that takes the CPU for a GPU whose every byte a test sets: {"allocated": ..., "peak": ...}."""
    memory = {"allocated": 1000, "peak": 0}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: memory["allocated"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: memory["peak"])
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["allocated"]))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(cuda, name, lambda *device: None)
    return memory


def test_a_variants_memory_is_its_own(base, pretended_gpu, monkeypatch):
    class Pretended(Run):
        on_gpu = True

    step = model.Step.__call__

    def measured_step(self):
        pretended_gpu["peak"] = pretended_gpu["allocated"] + 500
        return step(self)

    def adapted(*arguments):
        pretended_gpu["allocated"] += 10
        return real(*arguments)

    real = model.adapted
    monkeypatch.setattr(model, "adapted", adapted)
    monkeypatch.setattr(model.Step, "__call__", measured_step)
    case = model.ModelCase(1, False, False, 1, 16, 4, "float32")
    rows = model._measure(Pretended(CPU, results.Results(None, {}), print), base, case, ["frozen", "ours", "peft"])
    # The weights, what was built for the variant, and its step; not what stands beside it.
    assert [row["peak_bytes"] for row in rows.values()] == [1510, 1510, 1510]


def test_a_layers_memory_is_counted_over_its_inputs(pretended_gpu):
    def call():
        pretended_gpu["peak"] = 1700

    assert layer.peak_bytes(call, torch.device("cuda")) == 700
    assert layer.peak_bytes(call, CPU) is None
