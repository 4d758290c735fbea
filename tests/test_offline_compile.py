"""Every kernel compiled, without a GPU, for the GPUs it is meant for."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = {
    "combine",
    "down_project",
    "fused_linear",
    "gram",
    "low_rank_add",
    "matrix_coefficient",
    "quadratic_coefficient",
    "row_coefficient",
    "sweep",
}


def compile_for(arch, *options):
    # In a process of its own: in this one the kernels may be built for the interpreter.
    command = [sys.executable, "-m", "bench.offline_compile", "--json", "--arch", arch, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)

    from bench.offline_compile import SHARED_LIMIT

    assert {result["kernel"] for result in results} >= KERNELS - {"combine"}
    for result in results:
        assert result["spills"] == 0, result
        assert result["shared"] <= SHARED_LIMIT[arch], result
    return results


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills_in_the_chips_shared_memory(arch, dtype):
    results = compile_for(arch, "--dtype", dtype, "--rank", "16")
    gemms = [result for result in results if result["kernel"].startswith("fused_linear")]
    assert {result["case"].split()[0] for result in gemms} == {"y", "dx"}
    for gemm in gemms:
        assert gemm["matrix"] > 0, f"no matrix instruction of {arch}'s own kind: {gemm}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16/float32 --rank 16",
        "--dtype bfloat16 --rank 64",
        "--dtype bfloat16 --rank 20 --shape 70 1100 1301",
    ],
)
def test_other_adapters_and_odd_sizes_fit_hopper(options):
    compile_for("sm_90", *options.split())
