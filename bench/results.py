"""The file of results: where a number comes from, and every median with its spread.

    {"format": "allora-bench/1", "runs": [environment, ...], "records": [record, ...], "not_run": {section: [case, ...]}}

A record is one case of one section in one run: {"section", "case", "run": index into runs, "providers": {name: row}, ...}.
All its providers ran side by side, so ratios are taken within a record only. A later record of the same case takes the
place of an earlier one whose providers it has, else both stay.
"""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

FORMAT = "allora-bench/1"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench" / "results"


VERSIONS = ("torch", "triton", "transformers", "peft", "opacus")


def environment(device: torch.device, commit: str | None = None) -> dict:
    """What a number must say of where it comes from; `commit` where the repository, if there is one, does not know."""
    commit, changed = _source(commit)
    found = {
        "device": "cpu",
        "arch": platform.machine(),
        "driver": None,
        **{name: _version(name) for name in VERSIONS},
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "commit": commit,
        "changed_files": changed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hip = torch.version.hip is not None
        found |= {
            "device": properties.name,
            "arch": properties.gcnArchName if hip else f"sm_{properties.major}{properties.minor}",
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def _source(commit: str | None) -> tuple[str | None, bool | None]:
    """(the commit, whether files differ from it): asked of git; None for what it does not know."""
    known = _git("rev-parse", "--verify", "--quiet", f"{commit or 'HEAD'}^{{commit}}")
    if known is None:
        return commit, None
    return known, _git("diff", "--quiet", known, "--") is None


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def default_file(device_name: str) -> Path:
    """Where the results of a device of this name belong."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def load(file: Path) -> dict:
    """The results in `file`.

    Raises:
        ValueError: a file that is something else.
    """
    data = json.loads(file.read_text())
    if data.get("format") != FORMAT:
        raise ValueError(f"{file} is not a file of this benchmark's results ({FORMAT})")
    return data


def all_files(folder: Path = FOLDER) -> list[Path]:
    """The files of this benchmark's results under `folder`."""
    return [file for file in sorted(folder.glob("*.json")) if json.loads(file.read_text()).get("format") == FORMAT]


class Results:
    """Results being gathered: each record is merged and written at once, so that a run cut short keeps what it has."""

    def __init__(self, file: Path | None, run: dict) -> None:
        """`file` None keeps them in memory; `run` is the `environment` of what will be added.

        Raises:
            ValueError: a file of another device, or of something else.
        """
        self.file = file
        found = file is not None and file.exists()
        self.data = load(file) if found else {"format": FORMAT, "runs": [], "records": [], "not_run": {}}
        for other in self.data["runs"]:
            if other.get("device") != run.get("device"):
                raise ValueError(
                    f"{file} has the results of {other.get('device')}, this run is on {run.get('device')}: "
                    "name another file, of this device alone"
                )
        self.data["runs"].append(run)

    @property
    def run(self) -> dict:
        """The environment of this run; what is added to it is written with the next record."""
        return self.data["runs"][-1]

    def has(self, section: str, case: dict, providers: list[str]) -> bool:
        """Whether a record of this very source and these versions has all `providers`, of which none has failed since."""
        for record in self._of(section, case):
            if self._same_source(record):
                if any(record["providers"].get(name, {}).get("status") == "failed" for name in providers):
                    return False
                if set(providers) <= set(record["providers"]):
                    return True
        return False

    def _of(self, section: str, case: dict) -> list[dict]:
        """The records of a case, the newest first."""
        return [r for r in reversed(self.data["records"]) if r["section"] == section and r["case"] == case]

    def _same_source(self, record: dict) -> bool:
        """Whether a record is of this run's commit and versions, and neither is known to have had uncommitted changes."""
        other = self.data["runs"][record["run"]]
        return (
            self.run.get("commit") is not None
            and all(other.get(name) == self.run.get(name) for name in ("commit", *VERSIONS))
            and not (self.run.get("changed_files") or other.get("changed_files"))
        )

    def add(self, section: str, case: dict, providers: dict[str, dict]) -> None:
        """Merge one record and write the file. What was right in an older one of the same source, and failed now, stays."""
        record = {"section": section, "case": case, "run": len(self.data["runs"]) - 1, "providers": providers}

        def replaced(old: dict) -> bool:
            same = old["section"] == section and old["case"] == case
            if not same or not set(old["providers"]) <= set(providers):
                return False
            worse = (
                row.get("status") == "ok" and providers[name].get("status") == "failed"
                for name, row in old["providers"].items()
            )
            return not (self._same_source(old) and any(worse))

        self.data["records"] = [old for old in self.data["records"] if not replaced(old)] + [record]
        waiting = self.data["not_run"].get(section, [])
        self.data["not_run"][section] = [old for old in waiting if old != case]
        self.write()

    def leave(self, section: str, waiting: list[tuple[dict, list[str]]]) -> None:
        """Note the cases that no time was left for, unless an earlier run has them with these providers, beside those that are
        noted: this run may have asked for others."""

        def done(case: dict, providers: list[str]) -> bool:
            return any(set(providers) <= set(record["providers"]) for record in self._of(section, case))

        noted = self.data["not_run"].setdefault(section, [])
        noted += [case for case, providers in waiting if not done(case, providers) and case not in noted]
        self.write()

    def write(self) -> None:
        """Write the file as a whole, without the runs that no record is left of."""
        if self.file is None:
            return
        last = len(self.data["runs"]) - 1
        used = sorted({record["run"] for record in self.data["records"]} | {last})
        place = {old: new for new, old in enumerate(used)}
        for record in self.data["records"]:
            record["run"] = place[record["run"]]
        self.data["runs"] = [self.data["runs"][old] for old in used]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}")
        aside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(aside, self.file)
