"""``python -m bench.report``: the tables of README.md and docs/performance.md, and the plots under docs/, from the files of
results.

A table stands between ``<!-- bench:NAME:begin -->`` and ``<!-- bench:NAME:end -->``; nothing else of a page is touched.
Without results of a GPU the tables say "not yet measured"; of a CPU's only the section "per-sample" is quoted. `--check` writes
nothing and exits with 1 if a page is out of date.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from . import budget, plots, quantized, results, step_budget, step_report, targets
from .__main__ import SECTIONS
from .cases import TARGETS, Case
from .markdown import earlier, provenance, table
from .measured import NOT_MEASURED, absence, median, plain_models, quoted, ratio, records
from .model import VARIANTS
from .passes import passes, total
from .providers import PROVIDERS

PAGES = ("README.md", "docs/performance.md")
NOT_YET = "**Not yet measured**: `make bench` on a GPU, then `python -m bench.report`, fill this in."


def fill(page: str, blocks: dict[str, str]) -> str:
    """`page` with the text between each block's markers replaced; blocks that it has no markers for are left out."""

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in blocks:
            raise ValueError(f"no block of the report is called {name!r}; there are {', '.join(blocks)}")
        return f"<!-- bench:{name}:begin -->\n{blocks[name]}\n<!-- bench:{name}:end -->"

    return re.sub(r"<!-- bench:([\w-]+):begin -->\n.*?<!-- bench:\1:end -->", replace, page, flags=re.DOTALL)


def blocks(gpus: dict[str, dict], drawn: dict[str, dict[str, str]], cpu: dict | None = None) -> dict[str, str]:
    """The text of each block by its name, from the results of each GPU by file stem, and of a CPU."""
    first = next((gpus[stem] for stem in sorted(gpus, key=lambda stem: ("h100" not in stem, stem))), None)
    return {
        "summary": NOT_YET
        if first is None
        else f"{_summary(first)}\n\n{provenance(first, 'layer', 'model', 'quantized')}",
        "readme": NOT_YET if first is None else f"{_target_shapes(first)}\n\n{provenance(first, 'layer')}",
        "targets": targets.table(first, cpu),
        "budget": _budget(list(gpus.values())),
        "results": "\n\n".join(_device(data, drawn.get(stem, {})) for stem, data in gpus.items()) or NOT_YET,
        "per-sample": step_report.block(step_report.SAMPLES, [*gpus.values(), *([] if cpu is None else [cpu])]),
        "experts": step_report.block(step_report.EXPERTS, list(gpus.values())),
        "experts-budget": _step_budget(step_budget.EXPERTS, list(gpus.values())),
        "adapters": step_report.block(step_report.ADAPTERS, list(gpus.values())),
        "adapters-budget": _step_budget(step_budget.ADAPTERS, list(gpus.values())),
        "quantized": step_report.block(step_report.QUANTIZED, list(gpus.values())),
        "quantized-budget": _step_budget(step_budget.QUANTIZED, list(gpus.values())),
    }


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(data: dict) -> str:
    """Ours and PEFT's over what is frozen, at one layer, one model and one layer in 4 bits."""
    case, four_bit = TARGETS["M=8192, 4096x4096"], quantized.GPU_CASES[0]

    def over_frozen(found: Iterable[dict], kind: str, ours: str = "ours", peft: str = "peft") -> list[str]:
        record = quoted(found, "frozen", ours, peft)
        if record is None:
            return [NOT_MEASURED] * 3
        floor, own, other = (record["providers"][name][kind]["median_ms"] for name in ("frozen", ours, peft))
        return [_times(own / floor), _times(other / floor), _times(other / own)]

    def of_layer(adapters: str) -> list[str]:
        return over_frozen(records(data, "layer", replace(case, adapter_dtype=adapters)), "forward_backward")

    def of_model(*variants: str) -> list[str]:
        return over_frozen(plain_models(data, "frozen", *variants), "step", *variants)

    model = "a training step of Llama-3.1-8B's shape"
    rows = [
        [f"a layer, bf16 adapters ({case})", *of_layer("bfloat16")],
        ["a layer, fp32 adapters", *of_layer("float32")],
        [f"{model}, bf16 adapters", *of_model("ours", "peft")],
        [f"{model}, fp32 adapters", *of_model("ours-fp32", "peft-fp32")],
        [
            f"a layer in 4 bits, fp32 adapters ({four_bit})",
            *over_frozen(records(data, "quantized", four_bit), "step"),
        ],
    ]
    return table(
        ["time over the frozen one's, lower is better", "this library", "PEFT, no autocast", "times as fast as PEFT"],
        rows,
    )


def _target_shapes(data: dict) -> str:
    def cell(name: str, case: Case) -> str:
        values = [ratio(data, case, name, kind) for kind in ("forward", "forward_backward")]
        return " / ".join(map(_times, values)) if None not in values else absence(records(data, "layer", case), name)

    rows = [[f"`{name}`", *(cell(name, case) for case in TARGETS.values())] for name in PROVIDERS]
    default = [cell("ours", replace(case, adapter_dtype="float32")) for case in TARGETS.values()]
    rows.insert(1 + list(PROVIDERS).index("ours"), ["`ours-fp32`", *default])
    heading = "cost over the frozen layer: forward / forward + backward (bf16, R=16)"
    return table([heading, *TARGETS], rows)


def _budget(gpus: list[dict]) -> str:
    parts = []
    for case in TARGETS.values():
        rows = budget.rows(case, budget.TFLOPS, budget.TERABYTES_PER_S, gpus)
        parts += [f"{case}:", table(["computed", *budget.HEADINGS[1:]], rows)]
    return "\n\n".join(parts)


def _step_budget(counted: step_budget.Counted, gpus: list[dict]) -> str:
    parts = []
    for case, rows in step_budget.rows(counted, budget.TFLOPS, budget.TERABYTES_PER_S, gpus):
        parts += [f"{case}:", table(["computed", *step_budget.HEADINGS[1:]], rows)]
    return "\n\n".join(parts)


def _device(data: dict, drawn: dict[str, str]) -> str:
    parts = [f"### {data['runs'][-1]['device']}", provenance(data), _ceilings(data)]
    parts += [f"![{title}]({file})" for file, title in drawn.items()]
    parts += [_target_shapes(data), _detail(data), _every_case(data), _dispatch(data)]
    parts += [_ways(data), _models(data), _not_run(data)]
    return "\n\n".join(part for part in parts if part)


def _ceilings(data: dict) -> str:
    found = data["runs"][-1].get("ceilings") or {}
    gemms = ", ".join(f"{name} {values['tflops']:.0f} TFLOP/s" for name, values in found.items() if "tflops" in values)
    copy = f"; a copy moves {found['copy']['bytes_per_s'] * 1e-12:.2f} TB/s" if "copy" in found else ""
    return f"Ceilings in that run: a large GEMM runs at {gemms}{copy}." if gemms else ""


def _detail(data: dict) -> str:
    """The first target shape in full: times with their spread, rates, launches, memory."""
    case = TARGETS["M=8192, 4096x4096"]
    launches = next((record["providers"] for record in records(data, "launches", case)), {})
    newest, rows = next(records(data, "layer", case), None), []
    for name in PROVIDERS:
        record = quoted(records(data, "layer", case), name, "frozen")
        if record is None:
            continue
        row = record["providers"][name]
        timing = row["forward_backward"]
        time = timing["median_ms"]
        useful, _ = total(
            passes("frozen" if name == "frozen" else "the low-rank FLOPs alone", case, "forward_backward")
        )
        _, moved = total(passes(name, case, "forward_backward"))
        peak = row.get("forward_backward_peak_bytes")
        rows.append(
            [
                f"`{name}`{earlier(record, newest)}",
                f"{time:.3f} ({timing['p20_ms']:.3f} to {timing['p80_ms']:.3f})",
                f"{useful / time * 1e-9:.0f}",
                f"{moved / time * 1e-9:.2f}",
                launches.get(name, {}).get("forward_backward_launches", ""),
                "" if peak is None else f"{peak / 2**20:,.0f}",
            ]
        )
    headings = ["forward + backward", "ms (p20 to p80)", "TFLOP/s, useful", "TB/s, counted", "kernels", "peak MiB"]
    return f"{case}:\n\n{table(headings, rows)}" if rows else ""


def _every_case(data: dict) -> str:
    seen = {Case(**record["case"]) for record in records(data, "layer")}
    if not seen:
        return ""
    names = [name for name in PROVIDERS if name != "frozen"]
    rows = []
    for case in sorted(seen, key=str):
        floor = median(next(records(data, "layer", case)), "frozen", "forward_backward")
        cells = []
        for name in names:
            value = ratio(data, case, name, "forward_backward")
            why = absence(records(data, "layer", case), name)
            cells.append(_times(value) if value else "" if why in (NOT_MEASURED, "ok") else why)
        rows.append([case, f"{floor:.3f}" if floor else "", *cells])
    return f"Forward + backward over the frozen layer, every case:\n\n{table(['case', 'frozen, ms', *names], rows)}"


def _dispatch(data: dict) -> str:
    for record in records(data, "dispatch"):
        rows = [
            [f"`{name}`", *(f"{1e3 * time:.1f}" if time else "" for time in times)]
            for name in record["providers"]
            if any(times := [median(record, name, kind) for kind in ("forward", "forward_backward")])
        ]
        return "Host's time of a call, the GPU idle:\n\n" + table(["", "forward, µs", "forward + backward, µs"], rows)
    return ""


def _ways(data: dict) -> str:
    """For each product of the section "ways": the plan that is picked, and how much longer it takes than the best."""
    rows, seen = [], []
    for record in records(data, "ways"):
        if record["case"] in seen:
            continue
        seen.append(record["case"])
        times = {name: time for name in record["providers"] if (time := median(record, name, "time"))}
        floor = times.pop("frozen", None)
        picked = next((name for name in times if record["providers"][name]["picked"]), None)
        if not times or floor is None or picked is None:
            continue
        best = min(times, key=times.__getitem__)
        case = {name: value for name, value in record["case"].items() if name != "product"}
        over = f"{times[picked] / times[best] - 1:+.1%}"
        rows.append(
            [f"{record['case']['product']} of {Case(**case)}", picked, f"{times[picked] / floor:.3f}", best, over]
        )
    headings = ["product", "picked", "over the frozen GEMM", "the fastest", "picked over it"]
    return f"The ways of a product:\n\n{table(headings, rows)}" if rows else ""


def _models(data: dict) -> str:
    """Every variant of each case, from the newest record that names it."""
    cases = []
    for record in records(data, "model"):
        if record["case"] not in cases:
            cases.insert(0, record["case"])
    rows = []
    for case in cases:
        found = [record for record in records(data, "model") if record["case"] == case]
        how = f"{case['layers']} layers, {'with' if case['checkpointing'] else 'without'} checkpointing"
        how += ", compiled" if case["compiled"] else ", eager"
        for name in VARIANTS:
            record = next((record for record in found if name in record["providers"]), None)
            if record is None:
                continue
            row = record["providers"][name]
            ok = row["status"] == "ok"
            speed, peak = (row.get(key) if ok else None for key in ("tokens_per_s", "peak_bytes"))
            shown = f"{speed:,.0f}" if speed else f"{row['status']}: {row.get('reason', '')}"
            rows.append([how, f"`{name}`{earlier(record, found[0])}", shown, f"{peak / 2**30:.1f}" if peak else ""])
    return table(["Llama-3.1-8B's shape", "", "tokens/s", "peak GiB"], rows) if rows else ""


def _not_run(data: dict) -> str:
    left = [f"{section}: {len(cases)} cases" for section, cases in data["not_run"].items() if cases]
    seen = {record["section"] for record in data["records"]} | {
        name for name, cases in data["not_run"].items() if cases
    }
    never = [name for name in SECTIONS if name not in seen]
    parts = [f"Not run for want of time: {', '.join(left)}."] if left else []
    parts += [f"Not run at all: {', '.join(never)}."] if never else []
    return " ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the results")
    parser.add_argument("--root", type=Path, default=results.ROOT, help="where README.md and docs/ are")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    options = parser.parse_args(arguments)
    missing = [str(options.root / page) for page in PAGES if not (options.root / page).is_file()]
    if missing:
        parser.error(f"--root must have {' and '.join(PAGES)}; there is no {' and no '.join(missing)}")
    if not options.results.is_dir():
        parser.error(f"--results must be a folder of results; {options.results} is none")

    everything = {file.stem: results.load(file) for file in results.all_files(options.results)}
    # What a CPU takes says nothing of what is promised of a GPU.
    gpus = {stem: data for stem, data in everything.items() if data["records"] and data["runs"][-1]["device"] != "cpu"}
    if options.check:
        drawn = {stem: _drawn(options.root / "docs", stem) for stem in gpus}
    else:
        drawn = {stem: plots.draw(data, options.root / "docs", stem) for stem, data in gpus.items()}
    cpu = next((data for stem, data in everything.items() if stem not in gpus and data["records"]), None)
    texts = blocks(gpus, drawn, cpu)
    stale = []
    for name in PAGES:
        page = options.root / name
        before = page.read_text()
        after = fill(before, texts)
        if after != before:
            stale.append(name)
            if not options.check:
                page.write_text(after)
    print(f"{'out of date' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if options.check and stale else 0


def _drawn(folder: Path, stem: str) -> dict[str, str]:
    files = {f"bench-{stem}-{name}.png": title for name, title in plots.TITLES.items()}
    return {file: title for file, title in files.items() if (folder / file).exists()}


if __name__ == "__main__":
    raise SystemExit(main())
