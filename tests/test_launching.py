"""A remembered launch passes what Triton's own would, and is taken only where Triton would take the same code.

The driver is a stub: nothing is compiled or run, so this needs no GPU.
"""

import contextlib
import functools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.knobs import HookChain
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton import launching, recording, replay

# Specialising a descriptor imports this, which fails where `conftest` had Triton itself loaded for the interpreter.
with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
    import triton.experimental.gluon


@triton.jit(do_not_specialize=["M"])
def _kernel(x_desc, y_ptr, z_ptr, M, N, stride, scale, NORM: tl.constexpr, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr, M + N + stride)


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):
    """What a launch would hand to the driver, recorded."""

    def __init__(self, launches):
        self.launches, self.function, self.packed_metadata = launches, "function", ()

    def _init_handles(self):
        pass

    def launch_metadata(self, *_):
        return None

    def run(self, *args):
        # An empty chain of hooks is as good as none.
        self.launches.append((self, [None if isinstance(a, HookChain) and not a.calls else a for a in args]))


@pytest.fixture
def launches(monkeypatch):
    recorded = []

    def compile_(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled = self.device_caches[device][0][key] = Compiled(recorded)
        return compiled

    monkeypatch.setattr(JITFunction, "_do_compile", compile_)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    launching._compiled.clear()
    _kernel.device_caches.clear()
    yield recorded
    launching._compiled.clear()
    _kernel.device_caches.clear()


@functools.cache
def huge(dtype):
    """More than 2 GB of address space, of which nothing is touched."""
    return torch.empty(2**31 // dtype.itemsize + 64, dtype=dtype)


def arguments(
    rows=5,
    columns=64,
    offset=0,
    z=True,
    m=100,
    n=32,
    stride=1,
    scale=0.5,
    dtype=torch.float32,
    block=(16, 16),
    large=False,
):
    x = TensorDescriptor.from_tensor(torch.zeros(rows, 64, dtype=torch.bfloat16), list(block))
    y = (huge(dtype) if large else torch.zeros(2 * columns, dtype=dtype))[offset : offset + columns]
    return x, y, torch.zeros(1) if z else None, m, n, stride, scale


def options(norm="row", flag=True, block=16, warps=4):
    return {"NORM": norm, "FLAG": flag, "BLOCK": block, "num_warps": warps, "num_stages": 2}


def test_the_second_launch_hands_over_what_the_first_did(launches):
    for grid in ((3,), (3, 2), (3, 2, 4)):
        launches.clear()
        args = arguments()
        _kernel[grid](*args, **options())
        for _ in range(2):
            launching.launch_remembered(_kernel, grid, args, options(), 0)
        (_, first), (compiled, second), (again, third) = launches
        assert compiled is again
        assert all(a is b or a == b for a, b in zip(first, second, strict=True))
        assert all(a is b or a == b for a, b in zip(first, third, strict=True))
    assert len(launching._compiled) == 1


def test_the_second_launch_does_not_ask_triton(launches, monkeypatch):
    launching.launch_remembered(_kernel, (1,), arguments(), options(), 0)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("asked again"))
    launching.launch_remembered(_kernel, (9,), arguments(rows=6, m=101, scale=0.5), options(), 0)
    assert len(launches) == 2


@pytest.fixture
def replayed(launches, monkeypatch):
    """(an op of two launches, how often its launcher has run); CPU tensors pass for those of the current device."""
    # A CPU's number.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    ran = []

    def launch(kernel, grid, *args, **options):
        compiled = launching.launch_remembered(kernel, grid, args, options, -1)
        if launching.watch.watcher is not None:
            launching.watch.watcher(kernel, grid, args, options, compiled)

    def launcher(x, y, n):
        ran.append(n)
        out, between = torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(16)
        described = TensorDescriptor.from_tensor(x[1:], [16, 16])
        launch(_kernel, (3,), described, y, between[4:], 100, n, 1, 0.5, **options())
        launch(_kernel, (3, 2), described, out[2:], None, 7, n, 1, 0.5, **options())
        return out

    yield replay.replayed(launcher), ran
    replay.forget()


def handed_over(launch):
    """What one launch hands to the driver, tensors and descriptors by what they come to."""
    compiled, args = launch

    def described(a):
        return a.base.data_ptr(), a.base.dtype, list(a.shape), list(a.strides), list(a.block_shape), a.padding

    plain = [described(a) if isinstance(a, TensorDescriptor) else a for a in args]
    return compiled, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in plain]


def test_a_replay_hands_over_what_the_launcher_does(launches, replayed):
    op, ran = replayed
    calls = [(torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32) for _ in range(5)]
    outs = [op(*call) for call in calls]
    assert len(ran) == replay.CALLS_BEFORE + 1 and len(launches) == 10
    for i, ((x, y, _), out) in enumerate(zip(calls, outs)):
        (first, one), (second, two) = map(handed_over, launches[2 * i : 2 * i + 2])
        (like_first, base_one), (like_second, base_two) = map(handed_over, launches[:2])
        assert first is like_first and second is like_second
        # 0 to 8 is before the kernel's own: the grid, the stream, what was compiled, the hooks.
        assert one[:9] == base_one[:9] and two[:9] == base_two[:9]
        assert one[9][0] == two[9][0] == x.data_ptr() + 128 and one[9][1:] == base_one[9][1:] and two[9] == (one[9])
        assert one[10] == y.data_ptr() and two[10] == out.data_ptr() + 256 and two[11] is None
        assert one[12:] == base_one[12:] and two[12:] == base_two[12:]
        assert out.shape == (8, 64) and out.dtype == torch.bfloat16


def test_a_replay_asks_neither_triton_nor_the_launcher(replayed, monkeypatch):
    op, ran = replayed
    call = (torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32)
    for _ in range(replay.CALLS_BEFORE + 1):
        op(*call)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(launching, "specialization_key", lambda *_: pytest.fail("asked again"))
    ran.clear()
    op(*call)
    assert not ran


def test_another_kind_runs_its_launcher(replayed):
    op, ran = replayed
    x, y = torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(34)
    for _ in range(replay.CALLS_BEFORE + 2):
        op(x, y[:32], 32)
    for other in ((x, y[:32], 48), (x, y[:31], 32), (x, y[1:33], 32), (x, y[:32].half(), 32), (x, y[::2], 32)):
        ran.clear()
        op(*other)
        assert len(ran) == 1
    ran.clear()
    op(x, y[:32], 32)
    assert not ran
    replay.forget()
    op(x, y[:32], 32)
    assert len(ran) == 1


def test_one_call_is_recorded_at_a_time(replayed):
    op, ran = replayed
    call = (torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32)
    with replay._recording_lock:
        for _ in range(replay.CALLS_BEFORE + 3):
            op(*call)
    assert len(ran) == replay.CALLS_BEFORE + 3, "as another thread records"
    op(*call)
    op(*call)
    assert len(ran) == replay.CALLS_BEFORE + 4


@pytest.mark.parametrize("what", ["fails", "forgets", "changes a switch"])
def test_what_goes_wrong_while_recording_is_not_replayed(replayed, monkeypatch, what):
    op, ran = replayed
    call = (torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32)
    for _ in range(replay.CALLS_BEFORE):
        op(*call)
    record = replay.record

    def interrupted(*args):
        found = record(*args)
        if what == "fails":
            raise torch.OutOfMemoryError
        if what == "forgets":
            replay.forget()
        else:
            monkeypatch.setattr(replay.batch_invariance, "enabled", lambda: True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(replay, "record", interrupted)
        with pytest.raises(torch.OutOfMemoryError) if what == "fails" else contextlib.nullcontext():
            op(*call)
    monkeypatch.setattr(replay.batch_invariance, "enabled", lambda: False)
    ran.clear()
    op(*call)
    assert len(ran) == 1
    assert not replay._recording_lock.locked() and launching.watch.watcher is None


def test_a_hook_that_keeps_what_was_compiled(replayed, monkeypatch):
    op, ran = replayed
    call = (torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32)
    monkeypatch.setattr(launching, "launch_remembered", lambda *_: None)
    for _ in range(replay.CALLS_BEFORE + 3):
        op(*call)
    assert len(ran) == replay.CALLS_BEFORE + 3


def test_the_kinds_kept_are_bounded(replayed, monkeypatch):
    op, _ = replayed
    monkeypatch.setattr(replay, "MAX_KINDS", 4)
    x, y = torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(64)
    for n in range(20):
        op(x, y[: n + 1], 32)
        assert len(replay._kinds) <= 4


def test_replays_call_the_hooks_of_a_profiler(launches, replayed, monkeypatch):
    op, _ = replayed
    call = (torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(32), 32)
    for _ in range(replay.CALLS_BEFORE + 1):
        op(*call)
    chain = HookChain()
    chain.add(print)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", chain)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", chain)
    monkeypatch.setattr(Compiled, "launch_metadata", lambda *_: "metadata")
    launches.clear()
    op(*call)
    assert [args[6:9] for _, args in launches] == [["metadata", chain, chain]] * 2


def test_what_is_remembered_is_bounded(launches, monkeypatch):
    monkeypatch.setattr(launching, "MAX_REMEMBERED", 4)
    for n in range(10):
        launching.launch_remembered(_kernel, (1,), arguments(n=n), options(), 0)
        assert len(launching._compiled) <= 4
    assert len(launches) == 10


def test_devices_are_kept_apart():
    args = arguments()
    keys = {launching.specialization_key(_kernel, args, options(), device) for device in (0, 1)}
    assert len(keys) == 2


sizes = st.sampled_from([1, 2, 15, 16, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**40])
calls = st.tuples(
    st.fixed_dictionaries(
        {
            "offset": st.sampled_from([0, 1, 2, 4, 8]),
            "z": st.booleans(),
            "m": sizes,
            "n": sizes,
            "stride": sizes,
            "scale": st.sampled_from([0.25, 1.0]),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
            "block": st.sampled_from([(16, 16), (16, 32)]),
            "large": st.booleans(),
        }
    ),
    st.fixed_dictionaries(
        {
            "norm": st.sampled_from(["row", None]),
            "flag": st.booleans(),
            "block": st.sampled_from([1, 16]),
            "warps": st.sampled_from([4, 8]),
        }
    ),
)


TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


@pytest.fixture(params=TARGETS)
def backend(request, monkeypatch):
    monkeypatch.setattr(launching, "ON_ROCM", request.param == "hip")
    return triton.compiler.make_backend(TARGETS[request.param])


def specialization(backend, args, options):
    """What Triton itself goes by on this backend."""
    binder = create_function_from_signature(_kernel.signature, _kernel.params, backend)
    _, specialized, rest = binder(*args, **options, debug=False)
    return str((specialized, sorted(rest.items())))


# Nothing an example does outlives it.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls, data=st.data())
def test_equal_keys_are_specialised_alike(backend, call, data):
    # The other call differs in a few places, or the keys would hardly ever be equal.
    other = tuple(dict(part) for part in call)
    for _ in range(data.draw(st.integers(0, 2))):
        part = data.draw(st.sampled_from([0, 1]))
        name = data.draw(st.sampled_from(sorted(call[part])))
        other[part][name] = data.draw(calls)[part][name]
    launched = [(arguments(**numbers), options(**flags)) for numbers, flags in (call, other)]
    keys = [launching.specialization_key(_kernel, *one, 0) for one in launched]
    if keys[0] == keys[1]:
        assert specialization(backend, *launched[0]) == specialization(backend, *launched[1])


CHANGES = [
    {"offset": 1},
    {"z": False},
    {"n": 33},
    {"stride": 2},
    {"dtype": torch.bfloat16},
    {"m": 2**31},
    {"block": (16, 32)},
    {"large": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_the_key_keeps_apart_what_triton_does(backend, change):
    launched = [(arguments(), options()), (arguments(**change), options())]
    base, other = (launching.specialization_key(_kernel, *one, 0) for one in launched)
    base_code, other_code = (specialization(backend, *one) for one in launched)
    assert (base != other) == (base_code != other_code)


def test_the_key_is_the_same_for_what_triton_does_not_look_at(backend):
    keys = {launching.specialization_key(_kernel, arguments(m=m, rows=m), options(), 0) for m in (7, 100, 16)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "group, name, value", [("runtime", "debug", True), ("compilation", "instrumentation_mode", "x")]
)
def test_the_key_knows_triton_s_settings(group, name, value, monkeypatch):
    before = launching.specialization_key(_kernel, arguments(), options(), 0)
    monkeypatch.setattr(getattr(triton.knobs, group), name, value)
    assert launching.specialization_key(_kernel, arguments(), options(), 0) != before


def test_a_kernel_of_the_interpreter_takes_a_gpu_s_tensors(monkeypatch):
    """TRITON_INTERPRET=1 with CUDA tensors: there is nothing compiled to remember."""
    calls = []

    class Interpreted:
        arg_names = ("x_ptr", "M", "BLOCK")

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    class OnGPU:
        device = torch.device("cuda", 0)

    x = OnGPU()
    launching.launch(Interpreted(), (3,), x, 5, BLOCK=16)
    assert calls == [((3,), (x, 5), {"BLOCK": 16})]


def test_another_number_of_rows_takes_no_other_code():
    """Ragged training has another M in every step. These numbers are cut into as many tiles, so that the plan is one."""
    script = """
import torch
from unittest import mock
from bench.offline_compile import catch_launches
from csrc_triton import launching
import csrc_triton

def step(m, norm):
    n = k = 4096
    x, g, w = (torch.empty(size, dtype=torch.bfloat16) for size in ((m, k), (m, n), (n, k)))
    a, b, s = (torch.empty(size, dtype=torch.bfloat16) for size in ((16, k), (n, 16), (m, 16)))
    c = torch.empty(n) if norm == "row" else None
    csrc_triton.down_project(x, a, torch.bfloat16)
    csrc_triton.adapted_linear(x, w, None, a, b, torch.bfloat16)
    csrc_triton.adapter_grads(g, x, s, b, c, 2.0, norm, True, torch.bfloat16, torch.bfloat16)
    csrc_triton.fused_linear(g, w.mT, None, s, a.mT)

for norm in ("row", "token"):
    for start in (930, 8010):
        keys = set()
        for m in range(start, start + 50):
            with mock.patch.object(torch.Tensor, "addmm_", lambda y, x, w: y):
                caught = catch_launches(lambda: step(m, norm), "sm_90")
            new = {launching.specialization_key(kernel, args, kwargs, 0) for kernel, args, kwargs in caught}
            assert m == start or new <= keys, [key for key in new - keys]
            keys |= new
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kernel_has_its_arguments_in_that_order():
    script = """
import sys, triton, csrc_triton
from csrc_triton.launching import signature
kernels = {
    value
    for name, module in list(sys.modules.items())
    if name.startswith("csrc_triton")
    for value in vars(module).values()
    if isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel")
}
for kernel in kernels:
    signature(kernel)
print(len(kernels))
"""
    # In a process of its own: in this one the kernels may be built for the interpreter.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


def test_a_descriptor_of_gluon_stays_one_when_it_is_replayed():
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    first = GluonDescriptor.from_tensor(torch.zeros(32, 64, dtype=torch.bfloat16), [16, 64], layout)
    again = recording.described(first, recording.Address(4096, torch.bfloat16))
    assert launching.is_descriptor(first) and type(again) is GluonDescriptor
    assert (again.layout, again.shape, again.strides) == (first.layout, first.shape, first.strides)
    assert again.base.data_ptr() == 4096 and launching._tensor_part(again) == launching._tensor_part(first)


def test_only_so_many_descriptors_of_one_place_are_kept():
    first = TensorDescriptor.from_tensor(torch.zeros(32, 64, dtype=torch.bfloat16), [16, 64])
    known = recording.Described(first, recording.Slot(0, 0, torch.bfloat16), {})
    for address in (*range(0, 16 * 300, 16), 0, 16):
        found = known.at(address)
        assert found.base.data_ptr() == address and known.at(address) is found
        assert found.block_shape == first.block_shape and len(known.made) <= recording.MAX_DESCRIPTORS
