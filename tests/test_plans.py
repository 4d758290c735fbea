"""The choice between the ways of a product: every case has one, the cheapest by estimate, and a measurement beats it."""

import itertools
import json
import sys
from unittest import mock

import pytest
import torch

import csrc_triton
from csrc_triton import batch_invariance, configs, hides_c, plans, tuning
from csrc_triton.layer_grads import room_for_ds

ARCHS = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "unheard_of", "interpreter"]
MIXED = (torch.bfloat16, torch.float32)
DTYPES = [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16,) * 2, MIXED]
KEY = "Some GPU, torch 1, triton 2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def forget():
    plans.forget()
    tuning._entries.cache_clear()


def call(op="adapted_linear", m=2048, n=4096, k=4096, r=16, dtypes=(torch.bfloat16,) * 2):
    return plans.Call(op, m, n, k, r, *dtypes)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", plans.OPS)
def test_every_case_has_a_plan_that_can_run(op, arch):
    for m, n, k, r in itertools.product([1, 513, 100_000], [1, 4096], [41, 14336], [1, 64, 65, 256]):
        for dtypes, describable in itertools.product(DTYPES, [plans.NOTHING, plans.WIDE]):
            found = plans.options(call(op, m, n, k, r, dtypes), arch, describable)
            assert found[0].way == "tiles" and found[-1] == plans.Plan("vendor", None)
            for plan in found:
                assert plans.estimate(call(op, m, n, k, r, dtypes), plan, arch) > 0
                assert plan.way not in plans.PERSISTENT or describable
                assert plan.way != "inside" or (op == "adapted_linear" and r <= plan.config.BLOCK_R)


def test_whichever_plan_has_the_least_estimate_is_picked(monkeypatch):
    found = plans.options(call(), "sm_90")
    assert len(found) > 5
    for best in found:
        monkeypatch.setattr(plans, "estimate", lambda call, plan, arch, best=best: float(plan != best))
        forget()
        assert plans._pick(call(), "sm_90", plans.EVERYTHING, None) == best


def test_the_interpreter_has_a_program_a_tile():
    assert plans.pick(call(), torch.device("cpu"), plans.EVERYTHING).way == "tiles"


def test_rows_in_groups_of_one_weight_go_the_cheaper_way():
    """A small product is a launch or two, a large one is the GEMM."""
    for arch, dtypes in itertools.product(["sm_80", "sm_90", "sm_100", "gfx942", "unheard_of"], DTYPES[1:]):
        assert plans.vendor_beats_groups(call("fused_linear", m=8192, dtypes=dtypes), arch)
    assert not plans.vendor_beats_groups(call("fused_linear", m=512, k=1024), "sm_90")


def test_the_vendor_takes_no_rows_in_groups_under_batch_invariance_nor_in_the_interpreter(monkeypatch):
    large = call("fused_linear", m=8192)
    assert not plans.by_vendor_for_groups(large, torch.device("cpu"))
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    assert plans.by_vendor_for_groups(large, torch.device("cpu"))
    batch_invariance.enable(True)
    try:
        assert not plans.by_vendor_for_groups(large, torch.device("cpu"))
    finally:
        batch_invariance.enable(False)


def test_each_way_is_the_best_somewhere_on_hopper():
    sizes = itertools.product([64, 512, 8192], [1024, 4096], [896, 4096, 14336])
    chosen = {plans._pick(call(op, *size), "sm_90", plans.EVERYTHING, None).way for size in sizes for op in plans.OPS}
    chosen |= {plans._pick(call(op, r=20), "sm_90", plans.EVERYTHING, None).way for op in plans.OPS}
    assert chosen == set(plans.WAYS)


def test_the_pipelined_gemm_is_for_16_bit_factors_in_whole_wide_loads():
    assert plans._pick(call(), "sm_90", plans.EVERYTHING, None).way == "pipelined"
    assert "pipelined" not in {plan.way for plan in plans.options(call(), "sm_90", plans.WIDE)}
    for other in ({"r": 12}, {"dtypes": (torch.float16, torch.float32)}, {"dtypes": (torch.float32,) * 2}):
        assert "pipelined" not in {plan.way for plan in plans.options(call(**other), "sm_90")}


@pytest.mark.parametrize("r", [1, 8, 12, 16, 64, 200])
def test_fp32_factors_under_bf16_go_pipelined_in_parts_that_descriptors_reach(r):
    mixed = call("fused_linear", r=r, dtypes=MIXED)
    found = [plan for plan in plans.options(mixed, "sm_90", plans.WIDE) if plan.way == "pipelined"]
    of_parts = call("fused_linear", r=-(-3 * r // 8) * 8)
    assert found == [plan for plan in plans.options(of_parts, "sm_90") if plan.way == "pipelined"]
    assert {plan.config.BLOCK_R for plan in found} == {configs.block_r(3 * r)}
    assert "pipelined" not in {plan.way for plan in plans.options(mixed, "sm_90", plans.NOTHING)}
    assert "pipelined" not in {plan.way for plan in plans.options(mixed, "sm_100", plans.EVERYTHING)}
    # A launch of their own, and more columns.
    assert plans.estimate(mixed, found[0], "sm_90") > plans.estimate(of_parts, found[0], "sm_90")


def test_fp32_factors_under_bf16_go_pipelined_where_the_gemm_is_large():
    for op, m, r in itertools.product(("adapted_linear", "fused_linear"), (2048, 8192), (8, 16)):
        assert plans._pick(call(op, m=m, r=r, dtypes=MIXED), "sm_90", plans.WIDE, None).way == "pipelined"
    for m in (64, 512):
        assert plans._pick(call(m=m, dtypes=MIXED), "sm_90", plans.WIDE, None).way != "pipelined"


def test_rows_of_y_that_are_no_multiple_of_16_do_not_keep_s_from_the_gemms_side():
    assert plans._pick(call(n=4104), "sm_90", plans.EVERYTHING, None).way == "pipelined"


def test_without_the_gluon_it_was_written_for_the_other_ways_are_taken(monkeypatch):
    name = "csrc_triton.gluon_names"
    monkeypatch.setattr(plans, "INTERPRETED", False)
    monkeypatch.setitem(sys.modules, name, None)
    plans._gluon_is_there.cache_clear()
    plans._pick.cache_clear()
    try:
        assert plans._pick(call(), "sm_90", plans.EVERYTHING, None).way == "persistent"
    finally:
        plans._gluon_is_there.cache_clear()
        plans._pick.cache_clear()


def test_where_c_is_hidden(monkeypatch):
    def hidden(M=2048, R=16, factors=torch.bfloat16, arch="sm_90"):
        monkeypatch.setattr(configs, "arch_of", lambda device: arch)
        monkeypatch.setattr(configs, "can_overlap", lambda device: arch != "sm_80")
        x, a, b = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((M, 4096), (R, 4096), (4096, R)))
        return hides_c(x, a.to(factors), b.to(factors))

    try:
        assert hidden() and hidden(R=8) and hidden(R=32) and not hidden(M=2047)
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            assert hidden(M=1) and not hidden(R=64)
        assert not any((hidden(R=20), hidden(R=64), hidden(factors=torch.float32)))
        assert not hidden(arch="sm_80")
        batch_invariance.enable(True)
        assert not hidden()
    finally:
        batch_invariance.enable(False)


def test_the_pass_for_ds_runs_beside_the_gemm_where_that_costs_less(monkeypatch):
    """As measured on an H100; docs/steps.md."""
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "can_overlap", lambda device: True)

    def rounds(m, n=4096, k=4096, r=16, norm="row", dtypes=(torch.bfloat16,) * 2, **other):
        plan = plans._pick(call("layer_grads", m=m, n=k, k=n, r=r, dtypes=dtypes), "sm_90", plans.EVERYTHING, None)
        plan = plan._replace(**other)
        found = room_for_ds(plan, plans.LayerCall(m, n, k, r, norm, *dtypes), torch.device("cpu"))
        return 0 if found is None else found.rounds

    assert [rounds(m) for m in (512, 1024, 2048, 4096, 8192, 9216, 16384, 67584, 70000)] == [0, 0, 1, 1, 1, 2, 2, 8, 0]
    assert rounds(2048, n=14336) == 0 and rounds(8192, n=14336) == rounds(2048, n=1024) == rounds(8192, n=1024) == 1
    assert rounds(8192, r=8) == rounds(8192, r=32) == rounds(8192, norm="token") == 1
    assert rounds(8192, r=12) == rounds(8192, r=64) == rounds(8192, dtypes=MIXED) == 0
    # This one would wait for all rounds.
    assert rounds(8192, way="persistent") == 1 and rounds(16384, way="persistent") == 0


def test_the_plan_of_a_layer_says_that_its_factors_go_in_parts(monkeypatch):
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    for dtypes, in_parts in ((MIXED, True), ((torch.bfloat16,) * 2, False)):
        steps = csrc_triton.plan_steps(plans.LayerCall(2048, 4096, 4096, 16, "row", *dtypes), torch.device("cpu"))
        for step in ("adapted_linear (y)", "fused_linear (dx)"):
            assert plans.WAYS["pipelined"] in steps[step] and ("bf16 parts" in steps[step]) == in_parts


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_a_call_of_no_rows_has_a_plan(arch, invariant, monkeypatch):
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    monkeypatch.setattr(batch_invariance, "_enabled", invariant)
    for steps in (csrc_triton.plan_steps, csrc_triton.plan_added_steps):
        calls = (plans.LayerCall(rows, 64, 64, 8, "row", *MIXED) for rows in (0, 1))
        none, one = (steps(of_layer, torch.device("cpu")) for of_layer in calls)
        assert none == one


def test_to_split_fp32_factors_in_the_gemm_takes_longer():
    for way in ("tiles", "persistent"):
        costs = []
        for dtypes in ((torch.bfloat16,) * 2, MIXED):
            same = call("fused_linear", m=8192, dtypes=dtypes)
            plan = next(plan for plan in plans.options(same, "sm_90") if plan.way == way)
            costs.append(plans.estimate(same, plan, "sm_90"))
        assert 1.01 < costs[1] / costs[0] < 1.03


def test_the_sums_that_run_beside_the_gemm_alone_can_decide():
    alone, with_sums = (call(op, m=8192, n=4096, k=14336) for op in ("fused_linear", "layer_grads"))
    assert plans._pick(alone, "sm_90", plans.EVERYTHING, None).way == "vendor"
    assert plans._pick(with_sums, "sm_90", plans.EVERYTHING, None).way == "pipelined"
    # Where they find no room there, they cost every plan the same.
    for size in ({}, {"n": 1024}, {"m": 300}):
        alone, with_sums = (call(op, r=128, **size) for op in ("fused_linear", "layer_grads"))
        assert plans._pick(alone, "sm_90", plans.EVERYTHING, None) == plans._pick(
            with_sums, "sm_90", plans.EVERYTHING, None
        )


def test_estimates_are_of_the_size_of_bytes_and_flops():
    big = call(m=8192)
    frozen = 2 * 8192 * 4096 * 4096 / configs.MACHINES["sm_90"].flops
    vendor = plans.estimate(big, plans.Plan("vendor", None), "sm_90")
    # One pass over x for S and one over y for the product, of 266 FLOP a byte each, and three launches.
    assert vendor == pytest.approx(frozen * (1 + 2 * (800e12 / 3e12) / 4096) + 3 * 4e-6, rel=1e-3)


def test_small_problems_take_smaller_tiles():
    def tile(m, n):
        config = configs.pick_config("fused_linear", m, n, 4096, 16, torch.bfloat16, "sm_90")
        return config.BLOCK_M * config.BLOCK_N

    assert tile(512, 1024) < tile(512, 4096) < tile(8192, 4096)
    assert -(-512 // 64) * -(-1024 // 64) >= 128  # of 132 multiprocessors


def save(way, config, m=2048, milliseconds=1.0, op="adapted_linear"):
    tuning.save(KEY, tuning.entry(call(op, m=m), way, config, {way: milliseconds}, "2026-01-01"))


def test_a_measurement_is_preferred_near_where_it_was_taken():
    tiles = plans.options(call(), "sm_90")[3]
    assert tiles.way == "tiles"
    save(*tiles)
    for m in (1024, 2000, 2048, 4096):
        assert plans._pick(call(m=m), "sm_90", plans.EVERYTHING, KEY) == tiles
    estimated = plans._pick(call(m=5000), "sm_90", plans.EVERYTHING, None)
    assert plans._pick(call(m=5000), "sm_90", plans.EVERYTHING, KEY) == estimated
    assert plans._pick(call(n=1024), "sm_90", plans.EVERYTHING, KEY) == plans._pick(
        call(n=1024), "sm_90", plans.EVERYTHING, None
    )
    assert plans._pick(call("layer_grads"), "sm_90", plans.EVERYTHING, KEY) == plans._pick(
        call("layer_grads"), "sm_90", plans.EVERYTHING, None
    )
    assert plans._pick(call(), "sm_90", plans.EVERYTHING, "another GPU") == plans._pick(
        call(), "sm_90", plans.EVERYTHING, None
    )


def test_the_benchmark_takes_no_plan_that_was_tuned_here():
    from bench import __main__ as bench

    tiles, by_estimate = plans.options(call(), "sm_90")[3], plans._pick(call(), "sm_90", plans.EVERYTHING, None)
    save(*tiles)
    assert plans._pick(call(), "sm_90", plans.EVERYTHING, KEY) == tiles != by_estimate
    with bench._untuned():
        assert plans._pick(call(), "sm_90", plans.EVERYTHING, KEY) == by_estimate
    assert plans._pick(call(), "sm_90", plans.EVERYTHING, KEY) == tiles


def test_the_nearest_number_of_rows_wins_and_a_new_measurement_replaces_the_old():
    first, second = plans.options(call(), "sm_90")[:2]
    save(*first, m=1024)
    save(*second, m=2048)
    assert plans._pick(call(m=1100), "sm_90", plans.EVERYTHING, KEY) == first
    assert plans._pick(call(m=1900), "sm_90", plans.EVERYTHING, KEY) == second
    save("vendor", None, m=2048)
    plans.forget()
    assert plans._pick(call(m=1900), "sm_90", plans.EVERYTHING, KEY).way == "vendor"
    assert len(json.loads(tuning.path(KEY).read_text())["entries"]) == 2


def test_a_measured_plan_that_cannot_run_is_not_taken():
    persistent = next(plan for plan in plans.options(call(), "sm_90") if plan.way == "persistent")
    save(*persistent)
    assert plans._pick(call(), "sm_90", plans.EVERYTHING, KEY) == persistent
    assert plans._pick(call(), "sm_90", plans.NOTHING, KEY).way != "persistent"


def test_what_was_measured_of_dx_is_taken_for_it_with_its_sums():
    tiles = plans.options(call("fused_linear"), "sm_90")[1]
    save(*tiles, op="fused_linear")
    assert plans._pick(call("layer_grads"), "sm_90", plans.EVERYTHING, KEY) == tiles


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"entries": 3}',
        '{"entries": [{"call": 1}]}',
        '{"entries": [{"call": ["fused_linear", 64, 64, 64, 16, "bfloat16", "bfloat16"], "config": null}]}',
        '{"entries": [{"call": ["fused_linear", 0, 64, 64, 16, "bfloat16", "bfloat16"], "way": "tiles", "config": null}]}',
    ],
    ids=["no-json", "a-list", "no-entries", "no-call", "no-way", "no-rows"],
)
def test_a_broken_file_is_said_and_does_without(content):
    tuning.path(KEY).parent.mkdir(parents=True)
    tuning.path(KEY).write_text(content)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert tuning.lookup(KEY, call()) is None


def test_tuning_that_can_keep_nothing_says_why(monkeypatch):
    from allora_kernels.tools import tune

    monkeypatch.setattr(tune.backend, "choose", lambda *arguments: None)
    monkeypatch.setattr(
        tune, "rejected", lambda product, options: dict.fromkeys(options, "RuntimeError: no kernel image")
    )
    with pytest.raises(
        ValueError, match=r"no plan of y can be used here, so none is kept; .*: RuntimeError: no kernel image"
    ):
        next(tune.tune((32, 32, 32, 4), torch.float32, torch.float32, torch.device("cpu")))


def test_a_measurement_is_of_these_kernels(tmp_path, monkeypatch):
    keys = []
    for source in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "kernel.py").write_text(source)
        monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
        keys.append(tuning.device_key.__wrapped__(torch.device("cpu")))
    assert keys[0] == keys[2] != keys[1]


def test_files_are_kept_apart_by_device_and_versions():
    assert tuning.path(KEY) != tuning.path(KEY + "1")
    assert tuning.path("NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0").name == (
        "nvidia-h100-80gb-hbm3-torch-2.11.0-cu130-triton-3.6.0.json"
    )


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2])
@pytest.mark.parametrize(
    "op, rank, K, offered",
    [
        *(
            ("adapted_linear", *rest)
            for rest in [(16, 4096, 2), (64, 4096, 2), (65, 4096, 0), (12, 4096, 0), (16, 64, 0), (16, 128, 1)]
        ),
        *(("layer_grads", *rest) for rest in [(16, 4096, 2), (24, 4096, 0), (16, 128, 1)]),
        ("fused_linear", 16, 4096, 0),
    ],
)
def test_a_way_that_no_gpu_has_run_is_offered_to_who_asks_alone(dtypes, op, rank, K, offered):
    call = plans.Call(op, 4096, 4096, K, rank, *dtypes)

    def found(**asked):
        return [plan for plan in plans.options(call, "sm_90", **asked) if plan.way in plans.UNTRIED_WAYS]

    assert found() == []
    assert len(found(untried=True)) == (offered if dtypes == (torch.bfloat16,) * 2 else 0)
    assert not [plan for plan in plans.options(call, "sm_90", plans.WIDE, True) if plan.way in plans.UNTRIED_WAYS]
    if offered:
        assert all("first column" in str(plan) for plan in found(untried=True))


def test_dx_is_planned_as_the_product_that_it_is(monkeypatch):
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    half = torch.bfloat16
    of_layer = plans.LayerCall(512, 4096, 1024, 16, "row", half, half)
    assert of_layer.dx == plans.Call("layer_grads", 512, 1024, 4096, 16, half, half)
    dx, turned = (
        plans._pick(plans.Call("layer_grads", 512, n, k, 16, half, half), "sm_90", plans.EVERYTHING, None)
        for n, k in ((1024, 4096), (4096, 1024))
    )
    assert dx != turned
    assert str(dx) in csrc_triton.plan_steps(of_layer, torch.device("cpu"))["fused_linear (dx)"]
