"""``python -m bench``: run the benchmarks with pytest-benchmark; extra arguments go to pytest.

On a GPU the results are also written to bench/results/<device>.json.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def main() -> int:
    arguments = [str(HERE), "--benchmark-only", "--benchmark-sort=name", "--benchmark-columns=median,iqr,rounds"]
    if torch.cuda.is_available():
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        arguments.append(f"--benchmark-json={results / name}.json")
    return pytest.main([*arguments, *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
