"""The kernels as Triton compiles them for a GPU, executed on the CPU by ttsem: `make test-device-ir` and nothing else.

A launch stops the test that made it where a program reads or writes past a tensor, where two programs touch one element
and one of them writes, and where memory that nothing has written shows in a result: it is NaN.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# As pytest does for the other tests, whose conftest is left out here.
sys.path.append(str(Path(__file__).parents[1]))

if importlib.util.find_spec("ttsem") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from ttsem import harness, mlir, sanitize

    mlir.enable_generic_printing()

CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 90}
"""What the code is compiled for. The IR that is executed comes before any backend's, so gfx942 differs by its
configurations alone."""

FEW_SMS = 3


def write_back_descriptors(monkeypatch):
    """ttsem 0.1.0 executes a store through a descriptor that the host made, but copies back only what is a tensor."""
    write_back = sanitize._write_back

    def with_descriptors(record, execution):
        bound = {k: v.base if harness._is_descriptor(v) else v for k, v in record.bound.items()}
        write_back(dataclasses.replace(record, bound=bound), execution)

    monkeypatch.setattr(sanitize, "_write_back", with_descriptors)


_ir = {}


def stop_at_what_is_executed(monkeypatch):
    """ttsem 0.1.0 compiles every kernel to machine code for the sake of the first IR, which is all that it executes."""

    def ir_for_launch(record, stage, target):
        # Gluon's first IR is Triton's second.
        stage = "ttgir" if record.fn.is_gluon() else stage
        specialized = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn.cache_key, stage, target, *map(str, specialized))
        if key not in _ir:
            _ir[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return _ir[key]

    monkeypatch.setattr(harness, "ir_for_launch", ir_for_launch)


@pytest.fixture(autouse=True)
def launches(request, monkeypatch):
    """The session of a test, on the chip that its parameters `arch` and `few_sms` name: ``launches`` counts its launches."""
    from csrc_triton import configs, plans, sweep_plan

    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    arch = parameters.get("arch", "sm_90")
    # To the kernels' host code these are tensors of some GPU, which cannot say which one.
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    sms = FEW_SMS if parameters.get("few_sms") else configs.NUM_SMS[arch]
    monkeypatch.setitem(configs.NUM_SMS, arch, sms)
    configs.sms_of.cache_clear()
    monkeypatch.setattr(configs, "num_sms", lambda device: sms)
    # ttsem takes launches one after another, and does not know the instructions by which one lets the next begin.
    monkeypatch.setattr(configs, "can_overlap", lambda device: False)
    for planned in (configs.pick_config, plans._pick, plans._pick_invariant, sweep_plan.plan_sweep):
        planned.cache_clear()
    write_back_descriptors(monkeypatch)
    stop_at_what_is_executed(monkeypatch)
    torch.manual_seed(0)
    with sanitize.session(CAPABILITY[arch], request.node.name) as session:
        yield session
    assert session.launches, "nothing was launched: this test checks nothing"
    assert session.races_unchecked == 0, f"{session.races_unchecked} launches were too large to be searched for races"
