"""The `allora` command: arguments in, one call, what came out printed.

A command is a function here whose parameters are annotated ``Annotated[type, "help"]``, and an entry in `_COMMANDS`;
`finetune` takes its parameters from `FinetuneConfig`, so a setting is stated once. typer is imported only when the
command line runs.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from ..layer.functional import check_rule
from ..training.config import FinetuneConfig, without_none
from ..training.machine import rank
from .doctor import default_device, diagnose
from .runs_file import read_runs
from .settings_file import read_settings

if TYPE_CHECKING:
    import torch
    import typer

_INSTALL = "the command line needs more packages: pip install '.[train]' in a checkout of allora-kernels"


def finetune(*, dry_run: bool = False, runs: "dict[str, FinetuneConfig] | None" = None, **settings: Any) -> int:
    """Fine-tune a transformers model with ALLoRA adapters on text.

    Writes the adapter (PEFT's format), metrics.json, loss.png and checkpoints into --output. Ctrl-C saves and stops.
    --model, --data and --output are needed, on the command line or in the file that --config names. With --adapters, several
    runs share one base model, each in a folder of its own in --output.
    """
    if runs is not None:
        return _finetune_together(runs, dry_run)
    for field in fields(FinetuneConfig):
        if field.default is MISSING and settings[field.name] is None:
            raise ValueError(
                f"--{field.name} is missing: give it, or '{field.name}: ...' in the file that --config names"
            )
    config = FinetuneConfig(**without_none(settings))
    console = _console()
    _quiet_transformers()
    if dry_run:
        from ..training.dry_run import dry_run as look

        console.print(str(look(config)), highlight=False, soft_wrap=True)
        return 0
    from ..training.run import finetune as run
    from ..training.run_folder import ADAPTER_FOLDER

    metrics = run(config, console=console)
    _leave_processes()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    if metrics["status"] == "interrupted":
        say(
            f"Interrupted after step {metrics['steps']}; saved in {config.output}. The same command with --resume goes on."
        )
        return 130
    for measure, before in metrics["before"].items():
        say(f"{measure}: {before:.4f} before, {metrics['after'][measure]:.4f} after {metrics['steps']} steps")
    memory = metrics["peak_memory_bytes"] / 2**30
    say(f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s, {memory:.1f} GiB at most")
    say(f"adapter: {Path(config.output, ADAPTER_FOLDER)}")
    return 0


def _finetune_together(configs: dict[str, FinetuneConfig], dry_run: bool) -> int:
    console = _console()
    _quiet_transformers()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    if dry_run:
        from ..training.dry_run import dry_run_together

        say(str(dry_run_together(configs)))
        return 0
    from ..training import finetune_together
    from ..training.run_folder import ADAPTER_FOLDER

    found = finetune_together(configs, console=console)
    for name, metrics in found.items():
        for measure, before in metrics["before"].items():
            after = f"{metrics['after'][measure]:.4f} after" if metrics["after"] else metrics["status"]
            say(f"{name}: {measure} {before:.4f} before, {after} {metrics['steps']} steps")
    last = next(iter(found.values()))
    tokens, seconds = sum(m["tokens"] for m in found.values()), max(m["seconds"] for m in found.values())
    memory = last["peak_memory_bytes"] / 2**30
    say(f"{seconds:.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s in all, {memory:.1f} GiB at most")
    say(f"adapters: {', '.join(str(Path(config.output, ADAPTER_FOLDER)) for config in configs.values())}")
    if diverged := [name for name, metrics in found.items() if metrics["status"] == "diverged"]:
        steps = ", ".join(f"{name} at step {found[name]['steps']}" for name in diverged)
        raise FloatingPointError(
            f"the loss became nan or infinite: {steps}; lower the learning rate or eta, or warm up"
        )
    if not any(metrics["status"] == "interrupted" for metrics in found.values()):
        return 0
    say("Interrupted; the same command with --resume goes on.")
    return 130


def explain(
    model: Annotated[str, "Folder of a transformers model, or its name on the hub; only its config is read."],
    *,
    rows: Annotated[int, "M: tokens of a batch."] = 2048,
    r: Annotated[int, "Rank of the adapters."] = 16,
    norm: Annotated[str, "ALLoRA's rule: row, matrix, factor, entry, token, or none for plain LoRA."] = "row",
    target_modules: Annotated[list[str], "Layers to adapt: a name (repeat the option for more) or all-linear."] = (
        "all-linear",
    ),
    experts: Annotated[bool, "Also adapt the experts of a mixture."] = False,
    dtype: Annotated[str | None, "Of the weights: bfloat16, float16 or float32; the checkpoint's if not given."] = None,
) -> int:
    """Show what would be adapted in a model, and which kernels would run each layer on this device."""
    from .model_plan import explain_model

    rule = without_none({"norm": norm})["norm"]
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    weights = None if dtype is None else _dtype(dtype)
    _quiet_transformers()
    explain_model(_console(), model, rows, r, rule, targets, weights, default_device(), experts)
    return 0


def doctor() -> int:
    """Print device, versions and backend, and check this machine's results against the reference."""
    return 0 if diagnose(_console()) else 1


def bench(
    *,
    rows: Annotated[list[int], "M: tokens of a batch; may be given several times."] = (512, 2048, 8192),
    out_features: Annotated[int, "N of the layer."] = 4096,
    in_features: Annotated[int, "K of the layer."] = 4096,
    r: Annotated[int, "Rank of the adapter."] = 16,
    dtype: Annotated[str, "Of the layer and its input: bfloat16, float16 or float32."] = "bfloat16",
    adapter_dtype: Annotated[str | None, "Of lora_A and lora_B; the layer's if not given."] = None,
    tune: Annotated[bool, "Measure every way of the products first, and keep the fastest for later runs."] = False,
) -> int:
    """Measure an adapted layer against the frozen one on this device; with --tune, choose its kernels by measurement."""
    from .bench import report

    check_rule(r, 1.0, None)
    for name, size in (("rows", min(rows)), ("out-features", out_features), ("in-features", in_features)):
        if size < 1:
            raise ValueError(f"--{name} must be at least 1, got {size}")
    dtypes, device = [_dtype(name) for name in (dtype, adapter_dtype or dtype)], default_device()
    if tune and device.type != "cuda":
        raise ValueError("--tune needs a GPU, whose kernels it chooses; leave it out to measure on the CPU")
    report(_console(), [(m, out_features, in_features, r) for m in rows], *dtypes, device, tune)
    return 0


def _dtype(name: str) -> "torch.dtype":
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def merge(
    *,
    adapter: Annotated[str, "Folder of the adapter."],
    output: Annotated[str, "New folder for the merged model and its tokenizer."],
    model: Annotated[str | None, "The base model, where it is not the one the adapter names."] = None,
) -> int:
    """Write base model and adapter as one ordinary transformers model, for inference."""
    _quiet_transformers()
    from .merged_model import write_merged_model

    report = write_merged_model(adapter, output, model)
    _console().print(f"{report}\nmerged into {output}", highlight=False, soft_wrap=True)
    return 0


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[str | None, "YAML or TOML file with these settings; what the command line says counts more."],
)
"""A command that has this parameter takes the others from a file, too."""

_ADAPTERS = inspect.Parameter(
    "adapters",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[str | None, "YAML or TOML file with 'runs', which are trained together over one base model."],
)

_DRY_RUN = inspect.Parameter(
    "dry_run",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, "Read everything, print what would be done, and write nothing."],
)


def _optional(annotation: Any) -> Any:
    kind, text = get_args(annotation)
    return Annotated[kind | None, text]


_COMMANDS: dict[Callable[..., int], Iterable[inspect.Parameter] | None] = {
    finetune: [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is MISSING else field.default,
            annotation=_optional(field.type) if field.default is MISSING else field.type,
        )
        for field in fields(FinetuneConfig)
    ]
    + [_CONFIG, _ADAPTERS, _DRY_RUN],
    explain: None,
    doctor: None,
    bench: None,
    merge: None,
}
"""Each command: its parameters, where they are not the function's own."""


def build_app() -> "typer.Typer":
    """The typer application.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    app = typer.Typer(
        name="allora",
        help="ALLoRA fine-tuning: adapters at almost the cost of the frozen layer.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for function, parameters in _COMMANDS.items():
        if parameters is None:
            parameters = inspect.signature(function).parameters.values()
        app.command(function.__name__)(_command(function, [_option(p) for p in parameters]))
    return app


def _option(parameter: inspect.Parameter) -> inspect.Parameter:
    import typer

    kind, text = get_args(parameter.annotation)
    # What Python may be given without its name, the command line is.
    declare = typer.Option if parameter.kind is inspect.Parameter.KEYWORD_ONLY else typer.Argument
    return parameter.replace(annotation=Annotated[kind, declare(help=text)])


def _command(function: Callable[..., int], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """`function` with these parameters; its return value is the exit code, its errors are one line on stderr."""
    import typer

    @functools.wraps(function)
    def command(context: typer.Context, **arguments: Any) -> None:
        try:
            if _CONFIG.name in arguments:
                arguments = _with_files(context, arguments)
            code = function(**arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            code = _complain(error, 2)
        except (OSError, FloatingPointError) as error:
            code = _complain(error, 1)
        except KeyboardInterrupt:
            code = 130
        raise typer.Exit(code)

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *parameters])
    return command


def _with_files(context: "typer.Context", arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`, with what the file of --config says in the place of those that the command line did not give; and with the
    runs of --adapters."""
    config, adapters = (arguments.pop(parameter.name) for parameter in (_CONFIG, _ADAPTERS))
    known = [name for name in arguments if name != _DRY_RUN.name]
    given = {name for name in known if context.get_parameter_source(name).name == "COMMANDLINE"}
    settings = {} if config is None else read_settings(config, known)
    arguments |= {name: value for name, value in settings.items() if name not in given}
    if adapters is None:
        return arguments
    of_all = {name: arguments[name] for name in given}
    runs = read_runs(adapters, known, of_all, {name: arguments[name] for name in known})
    return {_DRY_RUN.name: arguments[_DRY_RUN.name], "runs": runs}


def _complain(error: Exception, code: int) -> int:
    print(f"allora: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _console():
    from rich.console import Console

    # Of several processes under torchrun the first one speaks. Names and paths may have brackets, and no text has markup.
    return Console(quiet=rank() != 0, markup=False)


def _leave_processes() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """The `allora` command."""
    try:
        app = build_app()
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"allora: {error.name} is not installed; {_INSTALL}")
    app()


def __getattr__(name: str) -> Any:
    # `app` is built when it is asked for, so that importing this module needs no typer.
    if name == "app":
        return build_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
