"""Tables and plots from files of results. The results here are made up, and only ever written to a temporary folder."""

import json
import re
from dataclasses import asdict

import pytest

from bench import report, results, targets
from bench.cases import ONE_RANK_MORE, TARGETS, Case
from bench.model import GPU_CASES, VARIANTS
from bench.providers import PROVIDERS

ONE_TARGET = TARGETS["M=8192, 4096x4096"]
SLOWER = {"frozen": 1.0, "ours": 1.06, "eager": 2.5, "compile": 1.5, "peft": 1.45, "addmm-in-place": 1.2}


def timing(milliseconds):
    return {"median_ms": milliseconds, "p20_ms": 0.99 * milliseconds, "p80_ms": 1.02 * milliseconds, "rounds": 30}


def layer_rows(factor=1.0):
    rows = {}
    for name in PROVIDERS:
        time = factor * SLOWER.get(name, 1.3)
        rows[name] = {"status": "ok", "forward": timing(time), "forward_backward": timing(2 * time)}
        rows[name]["forward_backward_peak_bytes"] = 200 * 2**20
    return rows


def model_rows():
    rows = {}
    for name in VARIANTS:
        speed = {"frozen": 9000, "ours": 8000, "ours-fp32": 7900, "peft": 6000, "peft-fp32": 5500}.get(name, 4000)
        peak = (70 if name.startswith("peft") else 60) * 2**30
        rows[name] = {"status": "ok", "step": timing(8192e3 / speed), "tokens_per_s": speed, "peak_bytes": peak}
    return rows


@pytest.fixture
def folder(tmp_path):
    """A copy of the pages, and made-up results of an H100."""
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text((results.ROOT / page).read_text())
    run = {"device": "Made Up H100", "commit": "c" * 40, "date": "2026-01-01", "torch": "2.13", "changed_files": False}
    run["ceilings"] = {"bfloat16": {"tflops": 700.0}, "copy": {"bytes_per_s": 2.8e12}}
    gathered = results.Results(tmp_path / "made-up-h100.json", run)
    for case in [*TARGETS.values(), ONE_RANK_MORE, Case(512, 4096, 4096, 16)]:
        gathered.add("layer", asdict(case), layer_rows())
    gathered.add("dispatch", asdict(Case(512, 4096, 4096, 16)), layer_rows(0.01))
    gathered.add("launches", asdict(ONE_TARGET), {"ours": {"status": "ok", "forward_backward_launches": 6}})
    ways = {"tiles (M=128)": 1.2, "the vendor's": 1.1, "frozen": 1.0}
    rows = {name: {"status": "ok", "time": timing(ms), "picked": "tiles" in name} for name, ms in ways.items()}
    rows["inside"] = {"status": "wrong", "reason": "an error of 3"}
    gathered.add("ways", asdict(ONE_TARGET) | {"product": "dx"}, rows)
    gathered.add("model", asdict(GPU_CASES[0]), model_rows())
    gathered.leave("layer", [(asdict(Case(1, 2, 3, 4)), ["ours"]), (asdict(ONE_TARGET), ["ours"])])
    return tmp_path


def make(folder, *arguments):
    return report.main(["--results", str(folder), "--root", str(folder), *arguments])


def edit(folder, change):
    file = folder / "made-up-h100.json"
    data = json.loads(file.read_text())
    for record in data["records"]:
        change(record)
    file.write_text(json.dumps(data))


def block(folder, name, page="docs/performance.md"):
    text = (folder / page).read_text()
    return re.search(rf"<!-- bench:{name}:begin -->\n(.*)\n<!-- bench:{name}:end -->", text, re.DOTALL)[1]


def test_the_committed_pages_are_what_the_report_makes_of_the_committed_results():
    assert report.main(["--check"]) == 0


def test_pages_quote_the_numbers_that_the_report_writes():
    shown = block(results.ROOT, "summary")
    bf16, fp32, four_bit = (
        re.search(rf"\| a layer{kind}[^|]*\| ([\d.]+) \| ([\d.]+) ", shown).groups()
        for kind in (", bf16", ", fp32", " in 4 bits")
    )
    readme, quantized = ((results.ROOT / page).read_text() for page in ("README.md", "docs/quantized.md"))
    said = rf"costs {bf16[0]} times .* {fp32[0]} times .* costs {bf16[1]} and {fp32[1]} times"
    assert re.search(said, readme.partition("## ")[0].replace("\n", " "))
    assert f"that costs {four_bit[0]} times the frozen layer, PEFT {four_bit[1]} times" in quantized


def test_results_become_tables_and_plots(folder):
    assert make(folder, "--check") == 1
    assert make(folder) == 0
    assert make(folder, "--check") == 0
    readme = block(folder, "readme", "README.md")
    assert "| `ours` | 1.06 / 1.06 | 1.06 / 1.06 | 1.06 / 1.06 |" in readme
    assert "Made Up H100" in readme and "commit cccccccccc, 2026-01-01" in readme
    shown = block(folder, "results")
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", shown)
    assert images == [f"bench-made-up-h100-{name}.png" for name in ("layer", "roofline", "model")]
    for image in images:
        assert (folder / "docs" / image).read_bytes().startswith(b"\x89PNG")
    # 0.827 PFLOP of GEMMs and adapter in 2 x 1.06 ms, and their count.
    assert re.search(r"\| `ours` \| 2\.120 \(2\.099 to 2\.162\) \| 262 \| \d\.\d\d \| 6 \| 200 \|", shown), shown
    assert (
        "layer: 1 cases. Not run at all: per-sample, experts, adapters, quantized." in shown
        and "| 8,000 | 60.0 |" in shown
    )
    assert "| ours | 1.069 | 1.201 | 1.135 | 1.060 | 1.060 |" in block(folder, "budget")


def test_a_table_names_the_runs_of_its_own_section_alone(folder):
    again(folder, "dispatch", asdict(Case(512, 4096, 4096, 16)), {"frozen": layer_row(1.0)})
    make(folder)
    assert "dddddddddd" not in block(folder, "readme", "README.md") and "dddddddddd" not in block(folder, "summary")


def test_targets_are_met_or_not(folder):
    make(folder)
    table = block(folder, "targets")
    assert "| forward over `frozen`, M=8192, 4096x14336 | ≤ 1.05x | 1.06x | **no** |" in table
    assert "| ≤ 1.1x, then ≤ 1.05x | 1.06x | yes, then **no** |" in table
    assert "| faster than `peft` at the worst of these three shapes | ≥ 1.35x | 1.37x | yes |" in table
    assert "| time over `peft` at the worst shape of the grid | ≤ 1x | 0.731x in 5 of 106 cases | so far |" in table
    assert "| R=64 over R=16, M=8192, 4096x4096, both over `frozen` | ≤ 1.1x | 1x | yes |" in table
    assert "| dispatch of a forward call over `nn.Linear`'s | ≤ 30 µs | 0.6 µs | yes |" in table
    assert "| model: tokens/s over PEFT LoRA, 16-bit adapters | ≥ 1.25x | 1.33x | yes |" in table
    assert "| model: peak memory over PEFT LoRA, fp32 adapters | ≤ 0.85x | 0.857x | **no** |" in table
    # Sections of steps have made-up results of their own, in test_bench_samples.py and test_bench_experts.py.
    still_open = [line for line in table.splitlines() if "not yet measured" in line]
    assert len(still_open) == 9 and all("b x T" in line or "experts" in line for line in still_open)


def test_the_page_begins_with_what_a_layer_and_a_model_cost(folder):
    make(folder)
    text = (folder / "docs" / "performance.md").read_text()
    assert text.index("bench:summary:begin") < text.index("\n## ")
    shown = block(folder, "summary")
    assert f"| a layer, bf16 adapters ({ONE_TARGET}) | 1.06 | 1.45 | 1.37 |" in shown
    assert "| a layer, fp32 adapters | not yet measured | not yet measured | not yet measured |" in shown
    assert "Llama-3.1-8B's shape, bf16 adapters | 1.12 | 1.50 | 1.33 |" in shown
    assert "Llama-3.1-8B's shape, fp32 adapters | 1.14 | 1.64 | 1.44 |" in shown
    assert (
        "(nf4, M=8192 4096x4096 R=16 bfloat16/float32) | not yet measured | not yet measured | not yet measured |"
        in shown
    )


def test_one_slow_shape_is_the_worst(folder):
    def slow(record):
        if record["section"] == "layer" and record["case"]["M"] == 512:
            record["providers"]["ours"]["forward"] = timing(2.0)

    edit(folder, slow)
    make(folder)
    assert (
        "| time over `peft` at the worst shape of the grid | ≤ 1x | at least 1.38x in 5 of 106 cases | **no** |"
        in block(folder, "targets")
    )


def test_a_wrong_result_is_quoted_nowhere(folder):
    def wrong(record):
        for name in record["providers"].keys() & {"ours", "ours-fp32"}:
            record["providers"][name] |= {"status": "wrong", "reason": "y is off"}

    edit(folder, wrong)
    make(folder)
    assert "| `ours` | wrong | wrong | wrong |" in block(folder, "readme", "README.md")
    rows = [line for line in block(folder, "targets").splitlines()[2:] if "not yet measured" not in line]
    assert rows and all("| wrong or failed | **no**" in line for line in rows)


def test_a_target_over_three_shapes_is_met_by_all_three_and_missed_by_any(folder):
    def without(record):
        if record["case"] == asdict(TARGETS["M=2048, 4096x4096"]):
            for name in ("compile", "epilogue-atomics"):
                del record["providers"][name]
        elif record["section"] == "layer":
            record["providers"]["epilogue-atomics"]["forward_backward"] = timing(2.2)

    edit(folder, without)
    make(folder)
    table = block(folder, "targets")
    assert "| faster than `compile` there | ≥ 1.2x | 1.42x in 2 of 3 cases | so far |" in table
    assert "| faster than `epilogue-atomics` there | ≥ 1.1x | at most 1.04x in 2 of 3 cases | **no** |" in table


def test_fp32_adapters_have_a_row_of_their_own(folder):
    file = folder / "made-up-h100.json"
    assert not make(folder)
    assert "| `ours-fp32` | not yet measured | not yet measured | not yet measured |" in block(
        folder, "readme", "README.md"
    )
    data = json.loads(file.read_text())
    rows = layer_rows() | {"ours": {"status": "ok", "forward": timing(1.2), "forward_backward": timing(2.6)}}
    case = asdict(ONE_TARGET) | {"adapter_dtype": "float32"}
    data["records"].append({"section": "layer", "case": case, "run": 0, "providers": rows})
    file.write_text(json.dumps(data))
    make(folder)
    assert "| `ours-fp32` | 1.20 / 1.30 | not yet measured | not yet measured |" in block(folder, "readme", "README.md")


def test_a_cpus_results_are_not_quoted(folder):
    file = folder / "made-up-h100.json"
    data = json.loads(file.read_text())
    data["runs"][0]["device"] = "cpu"
    file.write_text(json.dumps(data))
    make(folder)
    assert report.NOT_YET in (folder / "README.md").read_text()
    assert block(folder, "results") == report.NOT_YET and not list((folder / "docs").glob("*.png"))


@pytest.mark.parametrize("option, said", [("--root", "there is no "), ("--results", "must be a folder of results")])
def test_a_folder_that_is_none_is_named(folder, capsys, option, said):
    with pytest.raises(SystemExit) as stop:
        make(folder, option, str(folder / "nowhere"))
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_only_what_stands_between_markers_is_touched():
    page = "a\n<!-- bench:x:begin -->\nold\n<!-- bench:x:end -->\nb\n"
    assert report.fill(page, {"x": "new"}) == page.replace("old", "new")
    assert report.fill("no markers", {"x": "new"}) == "no markers"
    with pytest.raises(ValueError, match="'x'"):
        report.fill(page, {"y": "new"})


def test_every_target_of_the_table_is_open_without_results():
    assert targets.table(None).count("not yet measured") == len(targets.ALL) == 27


def test_the_plan_that_is_picked_stands_beside_the_fastest(folder):
    make(folder)
    page = (folder / "docs" / "performance.md").read_text()
    assert f"| dx of {ONE_TARGET} | tiles (M=128) | 1.200 | the vendor's | +9.1% |" in page


def again(folder, section, case, rows):
    """A later run of another commit, with a record of its own."""
    run = {"device": "Made Up H100", "commit": "d" * 40, "date": "2026-01-02", "torch": "2.14", "changed_files": False}
    results.Results(folder / "made-up-h100.json", run).add(section, case, rows)


def layer_row(milliseconds):
    return {"status": "ok", "forward": timing(milliseconds), "forward_backward": timing(milliseconds)}


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_fault_in_the_newest_record_is_no_older_number(folder, status):
    for case in TARGETS.values():
        again(folder, "layer", asdict(case), {"frozen": layer_row(1.0), "ours": {"status": status, "reason": "dA"}})
    make(folder)
    assert f"| `ours` | {status} | {status} | {status} |" in block(folder, "readme", "README.md")
    table = block(folder, "targets")
    for title in ("forward over `frozen`, M=8192, 4096x4096", "faster than `peft` at the worst of these three shapes"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
        assert row.endswith("| wrong or failed | **no** |")
    assert "| ≤ 1.1x, then ≤ 1.05x | wrong or failed | **no**, then **no** |" in table
    assert "| `peft` | 1.45 / 1.45 |" in block(folder, "readme", "README.md")


def test_a_fault_at_one_of_three_shapes_is_none_unseen(folder):
    def wrong(record):
        if record["section"] == "layer" and record["case"] == asdict(TARGETS["M=2048, 4096x4096"]):
            record["providers"]["ours"] = {"status": "wrong", "reason": "dA is off"}

    edit(folder, wrong)
    make(folder)
    table = block(folder, "targets")
    assert "| faster than `peft` at the worst of these three shapes | ≥ 1.35x | wrong or failed | **no** |" in table
    assert "| time over `peft` at the worst shape of the grid | ≤ 1x | wrong or failed | **no** |" in table


def test_a_quotient_is_of_one_run_and_the_newest_that_has_both_sides(folder):
    again(folder, "layer", asdict(ONE_TARGET), {"frozen": layer_row(1.0), "ours": layer_row(1.04)})
    make(folder)
    # Neither 1.45 / 1.04 nor 1.04 beside a 1.45 of another run.
    assert f"| a layer, bf16 adapters ({ONE_TARGET}) | 1.06 | 1.45 | 1.37 |" in block(folder, "summary")
    shown = block(folder, "results")
    assert "| `ours` | 1.04 / 1.04 |" in shown and "| `peft` | 1.45 / 1.45 |" in shown
    assert re.search(r"\| M=8192 4096x4096 R=16 bfloat16 \| 1\.000 \| 1\.04 \|.* 1\.45 \|", shown)
    assert "| `ours` | 1.040 (" in shown and "| `peft` (an earlier run) | 2.900 (" in shown


def test_what_a_later_run_has_again_is_listed_once(folder):
    again(folder, "ways", asdict(ONE_TARGET) | {"product": "dx"}, {
        "frozen": {"status": "ok", "time": timing(1.0), "picked": False},
        "rings": {"status": "ok", "time": timing(1.05), "picked": True},
    })  # fmt: skip
    again(folder, "model", asdict(GPU_CASES[0]), {name: model_rows()[name] for name in ("frozen", "ours")})
    make(folder)
    shown = block(folder, "results")
    assert [line for line in shown.splitlines() if line.startswith("| dx of ")] == [
        f"| dx of {ONE_TARGET} | rings | 1.050 | rings | +0.0% |"
    ]
    assert shown.count("| `ours` | 8,000 |") == 1 and shown.count("| `peft` (an earlier run) | 6,000 |") == 1
