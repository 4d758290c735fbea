"""Every kernel compiled, without a GPU, for the GPUs it is meant for: the part of `bench.compile_report` that fits a test."""

import json
import subprocess
import sys
from pathlib import Path

import compiled_code
import pytest

from bench.occupancy import fit_together

KERNELS = {
    "combine",
    "down_project",
    "fused_linear",
    "gram",
    "low_rank_add",
    "matrix_coefficient",
    "quadratic_coefficient",
    "factor_coefficient",
    "sweep",
}


def compile_for(arch, *options, kernels=KERNELS - {"combine"}):
    # In a process of its own: in this one the kernels may be built for the interpreter.
    command = [sys.executable, "-m", "bench.compile_report", "--json", "--arch", arch, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)
    assert {result["kernel"] for result in results} >= kernels
    faulty = [result for result in results if result["faults"]]
    assert not faulty and done.returncode == 0, faulty or done.stderr
    assert all(result["blocks"] >= 1 and 0 < result["occupancy"] <= 1 for result in results)
    return results


def pairs_side_by_side(results):
    """How many (GEMM, small kernel) run beside one another on Hopper, after a check that all have room there together."""
    found = 0
    pairs = (("y", "down_project beside y"), ("dx", "down_project beside dx"), ("dx", "outer_pair beside dx"))
    for product, small in pairs:
        gemms = tuple(f"{product} {way} beside" for way in ("persistent", "pipelined"))
        for one in (result for result in results if result["case"].startswith(gemms)):
            # fp32 factors go pipelined, at any rank.
            if "persistent" in one["case"] and "/float32" in one["case"]:
                continue
            for other in (result for result in results if result["case"].startswith(small)):
                # The GEMM in Gluon alone waits for a round.
                if "persistent" in one["case"] and "in rounds" in other["case"]:
                    continue
                blocks = [(result["num_warps"], result["registers"], result["shared"]) for result in (one, other)]
                assert fit_together("sm_90", *blocks), (one, other)
                found += 1
    return found


def written_in_parts(results):
    """How many GEMMs take fp32 factors in parts, after a check that what writes these has room beside them and loads wide."""
    gemms = [
        result for result in results if result["kernel"] == "fused_linear_pipelined" and "/float32" in result["case"]
    ]
    for small in (result for result in results if result["kernel"] == "in_parts"):
        loads, *_ = small["widths"]
        assert {bits for bits, _ in loads} == {128}, small
        for gemm in gemms:
            blocks = [(result["num_warps"], result["registers"], result["shared"]) for result in (gemm, small)]
            assert fit_together("sm_90", *blocks), (gemm, small)
    return len(gemms)


@pytest.fixture(scope="module")
def problems():
    """By the name of a check."""
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import compiled_code; compiled_code.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("check", compiled_code.CHECKS)
def test_compiled_code(check, problems):
    assert problems[check] is None, problems[check]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, dtype",
    # fp16 takes the same tiles as bf16; one architecture of each kind of matrix unit stands for the rest.
    [
        ("sm_80", "bfloat16"),
        ("sm_90", "bfloat16"),
        ("sm_90", "float16"),
        ("sm_100", "bfloat16"),
        ("gfx942", "bfloat16"),
    ],
)
def test_compiles_without_spills_in_the_chips_shared_memory(arch, dtype):
    results = compile_for(arch, "--dtype", dtype, "--rank", "16", "--shape", "large")
    gemms = [result for result in results if result["kernel"].startswith("fused_linear")]
    assert {result["case"].split()[0] for result in gemms} == {"y", "dx"}
    assert arch != "sm_90" or (any(result["tma"] for result in gemms) and pairs_side_by_side(results))
    for gemm in gemms:
        assert gemm["matrix"] > 0, f"no matrix instruction of {arch}'s own kind: {gemm}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16/float32 --rank 16 --shape large",
        "--dtype bfloat16 --rank 64 --shape large",
        "--dtype bfloat16 --rank 20 --shape unaligned",
    ],
)
def test_other_adapters_and_odd_sizes_fit_hopper(options):
    results = compile_for("sm_90", *options.split())
    assert bool(pairs_side_by_side(results)) == ("large" in options)
    assert bool(written_in_parts(results)) == ("float32" in options)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--dtype bfloat16 --rank 8", "--dtype bfloat16/float32 --rank 8 32 64"])
def test_what_runs_beside_the_gemm_has_room_there(options):
    options = [*options.split(), "--shape", "large", "--case", "beside"]
    kernels = {"outer_pair", "fused_linear_persistent", "fused_linear_pipelined"}
    if "float32" not in " ".join(options):
        kernels.add("down_project")
    assert pairs_side_by_side(compile_for("sm_90", *options, kernels=kernels))


@pytest.mark.slow
def test_what_writes_factors_in_parts_has_room_beside_the_gemm_that_takes_them():
    options = ["--dtype", "bfloat16/float32", "--rank", "8", "20", "64", "--shape", "large", "--case", " pipelined"]
    assert written_in_parts(compile_for("sm_90", *options, kernels={"in_parts", "fused_linear_pipelined"}))
