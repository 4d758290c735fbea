"""``python -m bench``: every provider side by side, each checked against fp64 first; `--help` lists what can be chosen.

On a GPU every record is at once merged into bench/results/<device>.json, so a run that is cut short keeps what it has
and the next one may go on (`--missing`). On a CPU a small subset runs, nothing is written unless `--output` says where, and
the computed budget of an H100 is printed beside it.

The sections are run from here and not by pytest-benchmark, which times one function to its end before the next:
interleaved rounds, a cold L2 cache and a time budget over the whole grid are not its to give. What it does well, to track
one call over commits by `--benchmark-compare`, is in bench/test_layer.py.
"""

import argparse
import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from allora_kernels.layer.backend import TRITON_INSTALLED

from . import (
    adapter_providers,
    adapters,
    budget,
    cases,
    ceilings,
    expert_providers,
    experts,
    layer,
    model,
    quantized,
    quantized_providers,
    sample_providers,
    samples,
    show,
    ways,
)
from .locking import locked
from .providers import PROVIDERS
from .results import Results, default_file, environment
from .runner import Run

SECTIONS = {
    # name: (what runs it, its share of the time where several run)
    "dispatch": (layer.run_dispatch, 1),
    "layer": (layer.run_layer, 10),
    "ways": (ways.run_ways, 2),
    "model": (model.run_model, 7),
    "per-sample": (samples.run_samples, 2),
    "experts": (experts.run_experts, 2),
    "adapters": (adapters.run_adapters, 2),
    "quantized": (quantized.run_quantized, 2),
    "launches": (layer.run_launches, 1),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument(
        "--shapes", nargs="+", type=cases.parse_shape, default=[], metavar="M=..,N=..,K=..,R=..", help="layers to run"
    )
    of_steps = (
        module.PROVIDERS for module in (sample_providers, expert_providers, adapter_providers, quantized_providers)
    )
    known = list(dict.fromkeys([*PROVIDERS, *model.VARIANTS, *itertools.chain(*of_steps)]))
    parser.add_argument("--providers", nargs="+", choices=known, help="only these (the floor always)")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="skip what the file has from this commit, not known to be changed, and these versions",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing after this long (default 9)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of a layer's timing (default 30)")
    parser.add_argument("--output", type=Path, help="file to merge the results into (a GPU's default: bench/results)")
    parser.add_argument(
        "--commit",
        type=_commit,
        help="the commit to record, for a copy without a repository: whether files were changed is then not known",
    )
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output must name a file, such as results.json; {options.output} is a folder")
    return options


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{7,40}", text):
        raise argparse.ArgumentTypeError(f"a commit has 7 to 40 hexadecimal digits, got {text!r}")
    return text


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    console = console or Console()
    # Models of many sizes come and go in one process.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Two threads wait for each other whenever anything else runs on the machine.
        torch.set_num_threads(1)
    where = environment(device, options.commit)
    file = options.output or (default_file(where["device"]) if device.type == "cuda" else None)
    with contextlib.ExitStack() as stack:
        try:
            if file is not None:
                busy = f"another run is writing to {file}: let it end, or name another --output"
                stack.enter_context(locked(file.with_name(f".{file.name}.lock"), busy))
            results = Results(file, where)
        except ValueError as error:
            console.print(str(error), markup=False)
            return 2
        # `ours` is the library as it comes, not as it was tuned on this machine.
        stack.enter_context(_untuned())
        _measure(options, device, results, start, console)
    if file:
        console.print(f"results: {file}", highlight=False)
    console.print(f"{time.monotonic() - start:.0f} s", highlight=False)
    return 0


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """Within it, plans that `allora bench --tune` has kept on this machine are not taken."""
    if not TRITON_INSTALLED:
        yield
        return
    from csrc_triton import plans, tuning

    with tuning.set_aside():
        plans.forget()
        yield
    plans.forget()


def _measure(
    options: argparse.Namespace, device: torch.device, results: Results, start: float, console: Console
) -> None:
    """Run the sections that were asked for."""
    where = results.run
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), highlight=False)

    dtypes = ["bfloat16", "float16", "float32"] if device.type == "cuda" else ["float32"]
    where["ceilings"] = ceilings.measure(device, dtypes)
    for name, values in where["ceilings"].items():
        shown = ", ".join(f"{value:.4g} {unit}" for unit, value in values.items())
        console.print(f"ceiling, {name}: {shown}", highlight=False)

    run = Run(
        device,
        results,
        lambda *row: show.record(console, *row),
        providers=options.providers,
        shapes=options.shapes,
        only_missing=options.missing,
        rounds=options.rounds,
    )
    end = start + 60 * options.minutes
    sections = [name for name in SECTIONS if name in options.only]
    for position, name in enumerate(sections):
        shares = [SECTIONS[rest][1] for rest in sections[position:]]
        now = time.monotonic()
        run.deadline = now + (end - now) * shares[0] / sum(shares)
        SECTIONS[name][0](run)
        left = results.data["not_run"].get(name, [])
        if left:
            console.print(f"{name}: no time for {len(left)} cases (--only {name} --missing goes on with them)")
    if device.type != "cuda":
        console.print("\n[bold]Not measured, computed:[/bold] ratios to the frozen layer on an H100 by bytes and FLOPs")
        budget.show(console)
        budget.show_steps(console)


if __name__ == "__main__":
    raise SystemExit(main())
