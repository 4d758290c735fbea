"""The budget: passes counted by hand give the ratios the design was made by."""

import io

import pytest
from rich.console import Console

from bench import budget
from bench.budget import predicted_ms, predicted_ratio
from bench.cases import TARGETS, Case
from bench.passes import COUNTED, passes, total
from bench.providers import PROVIDERS

CASE = TARGETS["M=8192, 4096x4096"]

# From bytes and FLOPs with 266 FLOP per byte and without the small tensors S, A and B; here it is 266.67, and with them.
DESIGN = {
    "the low-rank FLOPs alone": (1.008, 1.016, 1.012),
    # One more pass over G than in the design, which took dB from the sweep for dS: it is hidden beside dX.
    "ours": (1.069, 1.200, 1.135),
    "addmm-in-place, S and dS computed twice": (1.195, 1.455, 1.33),
    "peft": (1.455, 1.584, 1.52),
}


@pytest.mark.parametrize("name", DESIGN)
def test_the_designs_table_comes_out(name):
    for kind, expected in zip(budget.KINDS, DESIGN[name]):
        assert predicted_ratio(name, CASE, kind) == pytest.approx(expected, abs=0.004), kind


def test_every_provider_is_counted():
    assert set(PROVIDERS) < set(COUNTED)
    for name in COUNTED:
        assert all(predicted_ratio(name, case, "forward_backward") >= 1 for case in TARGETS.values())


def test_a_pass_takes_the_longer_of_bytes_and_flops():
    # 2 x 8192 x 4096² FLOP at 800 TFLOP/s; on a chip with a thousandth of the bandwidth its bytes.
    assert predicted_ms("frozen", CASE, "forward") == pytest.approx(2 * 8192 * 4096**2 / 800e12 * 1e3)
    moved = 2 * (8192 * 4096 * 2 + 4096**2)
    assert predicted_ms("frozen", CASE, "forward", tb_per_s=0.003) == pytest.approx(moved / 3e9 * 1e3)


def test_flops_and_bytes_of_an_order_by_hand():
    case = Case(10, 20, 30, 4)
    flops, moved = total(passes("addmm-in-place", case, "forward"))
    assert flops == 2 * 10 * 20 * 30 + 2 * 10 * 30 * 4 + 2 * 10 * 20 * 4
    x, w, y, a, b, s = 300, 600, 200, 120, 80, 40
    assert moved == 2 * ((x + w + y) + (x + a + s) + (y + s + b + y))


def test_a_fp32_adapter_costs_peft_more_than_it_costs_ours():
    wide = Case(*list(vars(CASE).values())[:5], "float32")
    for name in ("peft-fp32", "ours"):
        assert predicted_ratio(name, wide, "forward") >= predicted_ratio(name, CASE, "forward")
    assert predicted_ratio("peft-fp32", wide, "forward") > 1.2 + predicted_ratio("ours", wide, "forward") - 0.1


def test_the_command_prints_the_table_as_computed():
    console = Console(record=True, width=140, file=io.StringIO())
    assert budget.main([], console) == 0
    text = console.export_text()
    assert (
        text.count("computed for 800 TFLOP/s and 3 TB/s, cost over the frozen layer") == 3
        and "1.135" in text
        and "not yet measured" in text
    )
    budget.main(["--passes", "ours", "--shapes", "M=512,N=4096,K=4096,R=16"], console)
    assert "dB and dA from G and x" in console.export_text()
