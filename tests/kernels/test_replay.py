"""A replayed call gives what its launcher gives, to the bit, on other tensors of its kind."""

import ctypes
import dataclasses
import threading

import pytest
import torch
from cases import LAYOUTS, dtypes, layouts
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

import csrc_triton
from allora_kernels import FusedALLoRALinear, reference
from allora_kernels.layer import ops
from allora_kernels.testing import make_inputs
from csrc_triton import batch_invariance, chain, configs, plans, replay
from csrc_triton.beside import Beside
from csrc_triton.combine import combine
from csrc_triton.down_project import down_project_beside
from csrc_triton.launching import watch
from csrc_triton.parts import in_parts, width
from csrc_triton.recording import record

norms = pytest.mark.parametrize("norm", reference.NORMS)
ETA = 2.0
SIZES = (70, 21, 35, 16)


@pytest.fixture(autouse=True)
def _interpreter_out_of_sight(monkeypatch):
    """The interpreter calls torch to get at a tensor's memory, which no GPU's launch does."""
    call = GridExecutor.__call__

    def unseen(*args, **options):
        with _disable_current_modes():
            return call(*args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)


def tensor_at(address, dtype):
    """What the interpreter needs of a tensor: where it begins and of what dtype it is."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def interpreter(recording):
    """Starts the launches of a recording by the interpreter."""
    slots, descriptors = dict(recording.slots), dict(recording.descriptors)

    def taken(number, argument):
        if number in slots:
            return tensor_at(argument, slots[number].dtype)
        if number in descriptors:
            base = tensor_at(argument.base.data_ptr(), argument.base.dtype)
            return dataclasses.replace(argument, base=base)
        return argument

    def start(launch, args):
        launch.kernel[launch.grid](*map(taken, launch.numbers, args), **launch.options)

    return start


def replayed(launcher, args, others):
    """``launcher(*others)`` by replay of what ``launcher(*args)`` launched."""
    first, recording = record(launcher, args)
    assert recording is not None, "not recorded"
    kind, inputs, addresses = replay.kind_of(launcher, others)
    assert kind == replay.kind_of(launcher, args)[0]
    if recording.device.type == "cuda":
        return first, replay._replay_on(recording.device.index, recording, inputs, addresses)
    return first, replay.replay(recording, inputs, addresses, interpreter(recording))


def tensors(*args):
    return [a for a in args if isinstance(a, Tensor)]


def assert_same(found, expected):
    assert type(found) is type(expected)
    found, expected = ((t,) if isinstance(t, Tensor) else t or () for t in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        assert torch.equal(one, other)


def check(launcher, make):
    """`make(seed)` gives the arguments of a call: of one kind, with other values, elsewhere in memory."""
    args, others = make(0), make(1)
    plain = [tuple(a.clone() if isinstance(a, Tensor) else a for a in call) for call in (args, others)]
    plain = [tuple(_like(a, b) for a, b in zip(call, copies)) for call, copies in zip((args, others), plain)]
    expected = [launcher(*call) for call in plain]
    first, again = replayed(launcher, args, others)
    assert_same(first, expected[0])
    assert_same(again, expected[1])
    # What is written in place, too, and nothing else.
    for ours, theirs in zip(tensors(*args, *others), tensors(*plain[0], *plain[1])):
        assert torch.equal(ours, theirs)


def _like(a, copy):
    return (
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
        if copy is not None and isinstance(a, Tensor)
        else a
    )


def inputs(device, seed, dtypes=(torch.bfloat16, torch.bfloat16), sizes=SIZES, layout=LAYOUTS["rows"]):
    """x, weight, bias, a, b, g and s."""
    torch.manual_seed(seed)
    x, weight, bias, a, b, g = make_inputs(*sizes, *dtypes, device=device)
    scale = 1 + seed
    x, g = x * scale, g / scale
    s = reference.down_project(x, a, torch.promote_types(x.dtype, a.dtype))
    return tuple(layout(t) if t.dim() == 2 else t for t in (x, weight, bias, a, b, g, s))


@norms
def test_training_by_replay_has_the_same_bits(device, norm, monkeypatch):
    def train():
        torch.manual_seed(0)
        layer = FusedALLoRALinear(35, 21, r=4, norm=norm, device=device)
        torch.nn.init.normal_(layer.lora_B)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
        for _ in range(3):
            x = torch.randn(2, 35, 35, device=device, requires_grad=True)
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.lora_A.detach(), layer.lora_B.detach(), x.grad

    plain, recordings = train(), {}

    def replaying(launcher):
        def call(*args):
            kind, inputs, addresses = replay.kind_of(launcher, args)
            if kind in recordings:
                return replay.replay(recordings[kind], inputs, addresses, interpreter(recordings[kind]))
            result, recordings[kind] = record(launcher, args)
            return result

        return call

    if device == "cpu":
        for name in ("adapted_linear", "layer_grads"):
            monkeypatch.setattr(ops, name, replaying(getattr(csrc_triton, name)))
    for ours, theirs in zip(train(), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert device != "cpu" or len(recordings) == 2


@dtypes
@layouts
def test_forward(device, dtypes, layout):
    def make(seed):
        x, weight, bias, a, b, _, s = inputs(device, seed, dtypes, layout=layout)
        return x, weight, bias, a, b, s.dtype

    check(csrc_triton.adapted_linear, make)
    check(csrc_triton.adapted_linear_and_coefficient, lambda seed: (*make(seed), ETA))


@norms
@dtypes
def test_backward(device, norm, dtypes):
    def make(seed):
        x, weight, _, a, b, g, s = inputs(device, seed, dtypes)
        return g, x, s, weight, a, b, ETA, norm, a.dtype, b.dtype

    check(csrc_triton.layer_grads, make)


@norms
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)])
def test_adapter_grads(device, norm, needs):
    """What is not needed comes back empty: of those results all have one address."""
    need_ds, need_da, need_db = needs

    def make(seed):
        x, _, _, a, b, g, s = inputs(device, seed)
        c = csrc_triton.weight_coefficient(a, b, ETA, norm) if norm in reference.WEIGHT_NORMS else None
        return g, x, s, b, c, ETA, norm, need_ds, a.dtype if need_da else None, b.dtype if need_db else None

    check(csrc_triton.adapter_grads, make)


@pytest.mark.parametrize("norm", reference.WEIGHT_NORMS)
def test_weight_coefficient(device, norm):
    check(csrc_triton.weight_coefficient, lambda seed: (*inputs(device, seed)[3:5], ETA, norm))


def test_in_place(device):
    def make(seed):
        _, _, _, _, b, g, s = inputs(device, seed)
        return g, s, b

    check(csrc_triton.low_rank_add, make)


@dtypes
@layouts
def test_the_vendor_s_gemm(device, dtypes, layout):
    vendor = plans.Plan("vendor", None)

    def forward(seed):
        x, weight, bias, _, b, _, s = inputs(device, seed, dtypes, layout=layout)
        return x, weight, bias, s, b

    def backward(seed):
        _, weight, _, a, _, g, s = inputs(device, seed, dtypes, layout=layout)
        return g, weight.mT, None, s, a.mT

    check(lambda *args: csrc_triton.fused_linear(*args, vendor), forward)
    check(lambda *args: csrc_triton.fused_linear(*args, vendor), backward)


def test_a_product_of_parts(device):
    def launcher(x, weight, out):
        out[1:].addmm_(x[2:], weight[:, 3:])

    def make(seed):
        x, *_ = inputs(device, seed)
        return x[:, :12], x.mT[:12].contiguous()[:, :10], torch.ones(69, 7, dtype=x.dtype, device=device)

    check(launcher, make)


@pytest.mark.parametrize("way", plans.PERSISTENT)
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors(device, transposed, way):
    arch = configs.arch_of(torch.device(device))
    call = plans.Call("fused_linear", 70, 64, 128, 16, torch.bfloat16, torch.bfloat16)
    found = [plan for plan in plans.options(call, arch) if plan.way == way]
    if not found or (way == "pipelined" and device == "cpu"):
        pytest.skip(f"nothing here goes {way}")

    def make(seed):
        x, weight, bias, _, b, _, s = inputs(device, seed, sizes=(70, 64, 128, 16))
        return x, weight.mT.contiguous().mT if transposed else weight, bias, s, b

    def parts(x, weight, bias, s, b):
        return csrc_triton.fused_linear(x[8:], weight[16:], bias[16:], s[8:], b[16:], found[0])

    check(lambda *args: csrc_triton.fused_linear(*args, found[0]), make)
    check(parts, make)


@layouts
def test_fp32_factors_in_parts(device, layout):
    """As the GEMM that takes them, in scratch memory; by tiles, where the way that takes them has no interpreter."""
    call = plans.Call("fused_linear", 70, 21, 35, width(5), torch.bfloat16, torch.bfloat16)
    tiles = plans.options(call, configs.arch_of(torch.device(device)), plans.NOTHING)[0]

    def make(seed):
        x, weight, bias, _, b, _, s = inputs(device, seed, (torch.bfloat16, torch.float32), (70, 21, 35, 5), layout)
        return x, weight, bias, s, b

    def launcher(x, weight, bias, s, b):
        return csrc_triton.fused_linear(x, weight, bias, *in_parts(s, b), tiles)

    check(launcher, make)
    check(lambda *args: in_parts(*args[3:]), make)


@pytest.mark.parametrize("rank", [16, 5])
def test_fp32_factors_that_descriptors_reach_in_parts(device, rank):
    call = plans.Call("fused_linear", 70, 64, 128, rank, torch.bfloat16, torch.float32)
    found = plans.options(call, configs.arch_of(torch.device(device)), plans.WIDE)
    found = [plan for plan in found if plan.way == "pipelined"]
    if not found or device == "cpu":
        pytest.skip("nothing here goes pipelined")

    def make(seed):
        sizes = (70, 64, 128, rank)
        x, weight, bias, _, b, _, s = inputs(device, seed, (torch.bfloat16, torch.float32), sizes)
        return x, weight, bias, s, b

    check(lambda *args: csrc_triton.fused_linear(*args, found[0]), make)


def test_counted_programs(device):
    """What they are counted by is neither an argument nor allocated."""
    under_way = chain.counts(torch.device(device))
    beside = Beside(configs.Config(64, 0, 64, 16, 4, 2), 1, chain.Counted(under_way, 1, 64))

    def make(seed):
        return inputs(device, seed)[0], inputs(device, seed)[3]

    check(lambda x, a: down_project_beside(x, a, None, x.dtype, beside)[0], make)
    assert not under_way.any()


def test_groups(device):
    def make(seed):
        torch.manual_seed(seed)
        x, a, g = torch.randn(70, 67), torch.randn(3, 16, 67), torch.randn(70, 45)
        b, weight, ends = torch.randn(3, 45, 16), torch.randn(3, 45, 67), torch.tensor([20, 20, 70], dtype=torch.int32)
        return tuple(t.to(device) for t in (x, a, g, b, weight, ends))

    def forward(x, a, g, b, weight, ends):
        s = csrc_triton.grouped_down_project(x, a, ends, x.dtype)
        return csrc_triton.grouped_fused_linear(x, weight, None, s, b, ends), s

    def backward(x, a, g, b, weight, ends):
        s = csrc_triton.grouped_down_project(x, a, ends, x.dtype)
        c = csrc_triton.weight_coefficient(a, b, ETA, "factor")
        return csrc_triton.grouped_adapter_grads(g, x, s, b, c, ends, ETA, "factor", True, a.dtype, b.dtype)

    def by_vendor(x, a, g, b, weight, ends):
        s = csrc_triton.grouped_down_project(x, a, ends, x.dtype)
        return csrc_triton.grouped_fused_linear(x, weight[0], None, s, b, ends, None, True)

    check(forward, make)
    check(backward, make)
    check(by_vendor, make)


def test_a_result_that_is_a_part_of_what_was_allocated(device):
    def launcher(partial):
        both = torch.empty(2, *partial.shape[1:], device=partial.device)
        for parts, out in enumerate(both, 1):
            combine(partial[:parts], out.dtype, out=out)
        return both[1], both[0, 1:]

    check(launcher, lambda seed: (torch.arange(1.0 + seed, 61.0 + seed, device=device).view(3, 4, 5),))


def test_inputs_that_are_parts_of_one_tensor(device):
    """As FSDP's and fused optimizers' flat parameters are."""

    def make(seed):
        x, weight, _, a, b, g, s = inputs(device, seed)
        flat = torch.cat([t.flatten() for t in (weight, a, b)])
        weight, a, b = (
            part.view_as(t) for part, t in zip(flat.split([t.numel() for t in (weight, a, b)]), (weight, a, b))
        )
        return g, x, s, weight, a, b, ETA, "row", a.dtype, b.dtype

    check(csrc_triton.layer_grads, make)


def cannot_be_recorded(launcher, *args):
    expected = launcher(*args)
    result, recording = record(launcher, args)
    assert_same(result, expected)
    return recording is None


def add_twice(y, x, weight):
    y.addmm_(x, weight.mT, alpha=2)


def scratch_is_multiplied(x, weight, g):
    between = csrc_triton.down_project(x, weight, x.dtype).addmm_(x, weight.mT)
    return csrc_triton.down_project(between, g, x.dtype)


def test_what_cannot_be_recorded(device):
    x, weight, _, a, _, g, _ = inputs(device, 0)
    assert cannot_be_recorded(lambda g, w: g @ w, g, weight), "a product that makes its result"
    assert cannot_be_recorded(add_twice, g, x, weight), "a product with a factor"
    assert cannot_be_recorded(lambda x, w: csrc_triton.down_project(x, w, x.dtype).addmm_(x, w.mT).sum(), x, weight)
    assert cannot_be_recorded(scratch_is_multiplied, x, weight, g), "a product in scratch memory"
    assert cannot_be_recorded(lambda t: torch.empty_like(t).zero_(), x), "a fill"
    assert cannot_be_recorded(lambda t: t, x), "an input returned"
    assert cannot_be_recorded(
        lambda t: torch.empty(3, device=t.device, dtype=torch.int32).view(torch.float32).zero_(), x
    )
    with torch.inference_mode():
        # There a copy is one op with what may be a view.
        assert cannot_be_recorded(lambda t, a: csrc_triton.down_project(t.mT.contiguous().mT, a, t.dtype), x, a), (
            "a copy"
        )
        assert not cannot_be_recorded(lambda t, a: csrc_triton.down_project(t.contiguous(), a, t.dtype), x, a)
    assert cannot_be_recorded(csrc_triton.down_project, x[:0], a, torch.bfloat16), "an empty input"
    assert cannot_be_recorded(csrc_triton.down_project, x, x[1:17], torch.bfloat16), "overlapping inputs"
    constant = a.clone()
    assert cannot_be_recorded(lambda t: csrc_triton.down_project(t, constant, torch.bfloat16), x), "no argument"
    assert not cannot_be_recorded(csrc_triton.down_project, x, a, torch.bfloat16)


def test_the_kind_knows_all_that_a_launcher_goes_by(device):
    x, *_ = inputs(device, 0, sizes=(64, 45, 64, 16))

    def kind(*args):
        return replay.kind_of(csrc_triton.down_project, args)[0]

    base = kind(x, 1, None)
    assert kind(x.clone(), 1, None) == base
    misplaced = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x)
    for other in (x[:-1], x[:, :-1], x.mT, x.half(), misplaced):
        assert kind(other, 1, None) != base
    assert len({base, kind(x, 2, None), kind(x, 1, x), replay.kind_of(csrc_triton.combine, (x, 1, None))[0]}) == 4
    batch_invariance.enable(True)
    try:
        assert kind(x, 1, None) != base
    finally:
        batch_invariance.enable(False)
    assert kind(x, 1, None) == base
    wide = kind(x.float(), 1, None)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert kind(x.float(), 1, None) != wide
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_only_its_own_thread_is_recorded(device):
    x, _, _, a, *_ = inputs(device, 0)

    def launcher(x, a):
        thread = threading.Thread(target=csrc_triton.down_project, args=(x, a, x.dtype))
        thread.start()
        thread.join()
        return csrc_triton.down_project(x, a, x.dtype)

    _, recording = record(launcher, (x, a))
    assert len(recording.steps) == len(record(csrc_triton.down_project, (x, a, x.dtype))[1].steps)


def test_an_error_while_recording_leaves_nothing_behind(device):
    with pytest.raises(ZeroDivisionError):
        record(lambda t: 1 // 0, (torch.ones(3, device=device),))
    assert watch.watcher is None


def test_a_recording_holds_no_tensor(device):
    x, weight, bias, a, b, _, s = inputs(device, 0, sizes=(70, 64, 128, 16))
    _, recording = record(csrc_triton.adapted_linear, (x, weight, bias, a, b, s.dtype))
    todo, seen = [recording], 0
    while todo:
        thing = todo.pop()
        assert not isinstance(thing, Tensor)
        if isinstance(thing, TensorDescriptor):
            thing = vars(thing)
        if isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (tuple, list)):
            todo += thing
        seen += 1
    assert seen > 50
