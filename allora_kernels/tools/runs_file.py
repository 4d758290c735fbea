"""The runs that `allora finetune --adapters` trains together, from a YAML or TOML file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..training.config import FinetuneConfig, without_none
from .settings_file import check_settings, read_settings

NOT_OF_A_RUN = ("output", "resume")
"""Settings of all runs together."""


def read_runs(
    path: str, known: Collection[str], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, FinetuneConfig]:
    """The runs by name, in the order of the file. Each has an output folder of its own name in the common output.

    A setting is that of the run, else of the command line (`given`), else of the file, else of `defaults`.

    Raises:
        FileNotFoundError, ValueError: as `read_settings`; there is no list of runs, a run has no name or another's, or a
            setting that is none of a run's; a setting that all need is missing.
        ValueError, TypeError: a value that is wrong, and in which run.
    """
    common = read_settings(path, [*known, "runs"])
    runs = common.pop("runs", None)
    if not isinstance(runs, list) or not runs:
        raise ValueError(
            f"{path} must have a list of runs, such as 'runs: [{{name: small, r: 8}}, {{name: large, r: 32}}]'"
        )
    of_a_run = [name for name in known if name not in NOT_OF_A_RUN]
    configs: dict[str, FinetuneConfig] = {}
    for number, run in enumerate(runs, 1):
        where = f"{path}, run {number}"
        own = check_settings(run, [*of_a_run, "name"], where)
        name = own.pop("name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} must have a name, such as 'name: small', got {name!r}")
        if name in configs:
            raise ValueError(f"{where}: there is a run {name!r} already; give each a name of its own")
        if name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{where}: {name!r} cannot be the name of a folder")
        settings = {**defaults, **common, **given, **own}
        for setting in ("model", "data", "output"):
            if settings.get(setting) is None:
                raise ValueError(f"{where} has no {setting}: give it there, for all runs in {path}, or as --{setting}")
        settings = without_none(settings)
        if isinstance(settings["output"], str) and settings["output"]:
            settings["output"] = str(Path(settings["output"], name))
        try:
            configs[name] = FinetuneConfig(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} ({name}): {error}") from error
    return configs
