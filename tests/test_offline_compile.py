"""Every kernel compiled, without a GPU, for the GPUs it is meant for."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

GEMM_CASES = {"y", "dx"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills_in_the_chips_shared_memory(arch, dtype):
    # In a process of its own: in this one the kernels may be built for the interpreter.
    command = [
        sys.executable,
        "-m",
        "bench.offline_compile",
        "--json",
        "--arch",
        arch,
        "--dtype",
        dtype,
        "--rank",
        "16",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)

    from bench.offline_compile import SHARED_LIMIT

    kernels = {result["kernel"] for result in results}
    assert kernels >= {"down_project", "fused_linear", "low_rank_add", "gram", "sweep", "combine"}
    for result in results:
        assert result["spills"] == 0, result
        assert result["shared"] <= SHARED_LIMIT[arch], result
    gemms = [result for result in results if result["case"].split()[0] in GEMM_CASES]
    assert len(gemms) == 2
    for gemm in gemms:
        assert gemm["matrix"] > 0, f"no matrix instruction of {arch}'s own kind: {gemm}"
