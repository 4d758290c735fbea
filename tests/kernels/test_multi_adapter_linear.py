"""`multi_adapter_linear` on both backends, against autograd over its formula; rows without an adapter; errors; compiling."""

from unittest import mock

import pytest
import torch
from comparing import assert_all_close
from torch.utils.checkpoint import checkpoint

from allora_kernels import Adapter, allora_linear, multi_adapter_linear, reference, use_batch_invariant
from allora_kernels.groups import packing
from allora_kernels.groups import reference as grouped
from allora_kernels.groups.packing import Layout
from allora_kernels.testing import assert_close, make_inputs

norms = pytest.mark.parametrize("norm", reference.NORMS)
RANKS = (3, 1, 8, 17)
ETAS = (1.3, 0.7, 2.0, 1.3)


def make(rows, ranks=RANKS, N=33, K=41, dtype=torch.float32, adapter_dtypes=(None,), device="cpu"):
    """(x, weight, bias, [(lora_A, lora_B) of each rank], g, row_adapter)"""
    x, weight, bias, *_, g = make_inputs(len(rows), N, K, 1, dtype, device=device)
    pairs = []
    for e, r in enumerate(ranks):
        own = make_inputs(1, N, K, r, dtype, adapter_dtypes[e % len(adapter_dtypes)], device=device, seed=e + 1)
        pairs.append((own.lora_A, own.lora_B))
    return x, weight, bias, pairs, g, torch.tensor(rows, device=device, dtype=torch.int32)


def mixed(count, adapters=4):
    """A row's adapter drawn at random, some of them none."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, adapters, (count,), generator=generator).tolist()


def run(f, tensors, rules, call=None, trained="xab", **settings):
    """y, dX, then dA and dB of each adapter; None for what is not in `trained`."""
    x, weight, bias, pairs, g, row_adapter = tensors
    x = x.detach().requires_grad_("x" in trained)
    pairs = [(a.detach().requires_grad_("a" in trained), b.detach().requires_grad_("b" in trained)) for a, b in pairs]
    adapters = [Adapter(*pair, eta, norm) for pair, (eta, norm) in zip(pairs, rules)]
    f = f if call is None else call(f)
    y = f(x, weight, bias, adapters, row_adapter, **settings)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, *(t.grad for pair in pairs for t in pair)


def doubled(tensors):
    x, weight, bias, pairs, g, row_adapter = tensors
    bias = None if bias is None else bias.double()
    return x.double(), weight.double(), bias, [(a.double(), b.double()) for a, b in pairs], g.double(), row_adapter


def check(tensors, rules):
    exact = run(grouped.multi_adapter_linear, doubled(tensors), rules)
    eager = run(multi_adapter_linear, tensors, rules, backend="eager")
    ours = run(multi_adapter_linear, tensors, rules, backend="triton")
    assert_all_close("y dx", ours[:2], eager[:2], exact[:2])
    # Of all adapters together: where one has a single row, eager is right by luck.
    for i, name in ((2, "dA"), (3, "dB")):
        for values in zip(ours[i::2], exact[i::2]):
            assert values[0].shape == values[1].shape
        assert_close(*(torch.cat([t.flatten() for t in found[i::2]]) for found in (ours, eager, exact)), name)
    for result, e in zip(run(multi_adapter_linear, doubled(tensors), rules, backend="eager"), exact):
        torch.testing.assert_close(result, e, rtol=1e-9, atol=1e-9)


def one_rule(norm, count=4):
    return [(ETAS[e % len(ETAS)], norm) for e in range(count)]


@norms
def test_values_and_gradients(device, norm):
    check(make(mixed(150), device=device), one_rule(norm))


@norms
def test_one_eta_for_all(device, norm):
    check(make(mixed(70), device=device), [(1.3, norm)] * len(RANKS))


def test_each_adapter_under_its_own_rule(device):
    names = [*reference.NORMS, "row", "token"]
    ranks = (2, 5, 3, 1, 4, 7, 3, 2)
    check(make(mixed(90, len(ranks)), ranks, device=device), [(0.5 + 0.3 * i, norm) for i, norm in enumerate(names)])


ROWS = {
    "one adapter has all": [2] * 130,
    "none has any": [-1] * 40,
    "one row each": list(range(24)),
    "in the order of the adapters": [0] * 20 + [1] * 37 + [2] * 5 + [3] * 2,
    "the last rows have none": [1] * 33 + [-1] * 32,
    "half of them without rows": [e for e in range(0, 24, 2) for _ in range(3)],
    "one row": [3],
    "no rows": [],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_any_share_of_rows(device, rows):
    count = 24 if max(rows, default=0) > 3 else 4
    ranks = tuple(RANKS[e % len(RANKS)] for e in range(count))
    check(make(rows, ranks, device=device), one_rule("row", count))


@pytest.mark.parametrize(
    "dtype, adapter_dtypes",
    [
        (torch.float16, (torch.float16,)),
        (torch.bfloat16, (torch.bfloat16,)),
        (torch.bfloat16, (torch.float32,)),
        (torch.bfloat16, (torch.bfloat16, torch.float32)),
    ],
)
@pytest.mark.parametrize("norm", ["row", "entry", None])
def test_dtypes(device, dtype, adapter_dtypes, norm):
    tensors = make(mixed(90), dtype=dtype, adapter_dtypes=adapter_dtypes, device=device)
    exact = run(grouped.multi_adapter_linear, doubled(tensors), one_rule(norm))
    eager = run(multi_adapter_linear, tensors, one_rule(norm), backend="eager")
    ours = run(multi_adapter_linear, tensors, one_rule(norm), backend="triton")
    for i, results in enumerate(zip(ours, eager, exact)):
        assert_close(*results, f"result {i}")
    for (a, b), da, db in zip(tensors[3], ours[2::2], ours[3::2]):
        assert (da.dtype, db.dtype) == (a.dtype, b.dtype)


@pytest.mark.parametrize("ranks", [(256, 1, 16), (40, 136, 64)])
def test_ranks_from_1_to_256(device, ranks):
    check(make(mixed(40, 3), ranks, N=40, K=30, device=device), one_rule("row", 3))


def test_strides_no_bias_and_leading_dimensions(device):
    x, weight, _, pairs, g, rows = make(mixed(60), device=device)
    rules = one_rule("row")
    expected = run(multi_adapter_linear, (x, weight, None, pairs, g, rows), rules, backend="triton")
    wide = torch.randn(60, 2 * x.shape[1], device=device)
    wide[:, ::2] = x
    strided = (wide[:, ::2], weight.mT.contiguous().mT, None, pairs, g.mT.contiguous().mT, rows)
    for one, other in zip(expected, run(multi_adapter_linear, strided, rules, backend="triton")):
        torch.testing.assert_close(one, other)
    batch = (x.view(5, 12, -1), weight, None, pairs, g.view(5, 12, -1), rows.view(5, 12))
    y, dx, *grads = run(multi_adapter_linear, batch, rules, backend="triton")
    assert (
        y.shape == (5, 12, 33)
        and torch.equal(y.view(60, -1), expected[0])
        and torch.equal(dx.view(60, -1), expected[1])
    )
    assert all(map(torch.equal, grads, expected[2:]))


# --- rows without an adapter, and rows of others --------------------------------------------------------------------


def test_a_row_without_an_adapter_is_the_frozen_layers_to_the_bit_in_eager_torch():
    tensors = make(mixed(64))
    y, *_ = run(multi_adapter_linear, tensors, one_rule("row"), backend="eager")
    none = tensors[-1] == -1
    x, weight, bias = tensors[:3]
    assert none.any() and torch.equal(y[none], torch.nn.functional.linear(x, weight, bias)[none])


@pytest.mark.parametrize("backend", ["triton", "eager"])
@norms
def test_what_another_adapter_holds_reaches_no_row_and_no_gradient_but_its_own(device, backend, norm):
    tensors = make(mixed(90), device=device)
    x, weight, bias, pairs, g, rows = tensors
    plain = run(multi_adapter_linear, tensors, one_rule(norm), backend=backend)
    (a, b), *others = pairs
    broken = (x, weight, bias, [(a * float("nan"), b * float("inf")), *others], g, rows)
    y, dx, _, _, *grads = run(multi_adapter_linear, broken, one_rule(norm), backend=backend)
    own = rows == 0
    assert y[own].isnan().all() and torch.equal(y[~own], plain[0][~own])
    assert dx[own].isnan().all() and torch.equal(dx[~own], plain[1][~own])
    assert all(map(torch.equal, grads, plain[4:]))


@norms
def test_an_adapter_gets_what_its_rows_alone_would_give_it(device, norm):
    tensors = make(mixed(120), device=device)
    x, weight, bias, pairs, g, rows = tensors
    y, dx, *grads = run(multi_adapter_linear, tensors, one_rule(norm), backend="triton")
    for e, (a, b) in enumerate(pairs):
        own = rows == e
        leaves = [t.detach().requires_grad_() for t in (x[own], a, b)]
        alone = allora_linear(leaves[0], weight, bias, *leaves[1:], eta=ETAS[e], norm=norm, backend="triton")
        results = (alone, *torch.autograd.grad(alone, leaves, g[own]))
        for ours, theirs in zip((y[own], dx[own], *grads[2 * e : 2 * e + 2]), results):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def invariant(dots_in_one_order):
    with use_batch_invariant():
        yield


@norms
def test_batch_invariance(device, norm, invariant):
    tensors = make(mixed(120), N=53, K=70, device=device)
    x, weight, bias, pairs, g, rows = tensors
    whole = run(multi_adapter_linear, tensors, one_rule(norm), backend="triton")
    # Another batch with all rows of adapters 1 and 2, and some others, in another order among them.
    keep = torch.cat([torch.arange(120)[-20:], torch.arange(100)[((rows[:100] == 1) | (rows[:100] == 2)).cpu()]]).to(
        device
    )
    keep = keep[torch.argsort(rows[keep] == 1, stable=True)]
    part = run(
        multi_adapter_linear, (x[keep], weight, bias, pairs, g[keep], rows[keep]), one_rule(norm), backend="triton"
    )
    assert torch.equal(part[0], whole[0][keep]) and torch.equal(part[1], whole[1][keep])


@pytest.mark.parametrize("norm", ["row", "entry"])
def test_under_batch_invariance_an_adapters_gradient_has_the_bits_of_its_rows_alone(device, norm, invariant):
    tensors = make(mixed(150), N=53, K=70, device=device)
    x, weight, bias, pairs, g, rows = tensors
    _, _, *grads = run(multi_adapter_linear, tensors, one_rule(norm), backend="triton")
    for e in range(len(pairs)):
        own = rows == e
        alone = (x[own], weight, bias, pairs, g[own], rows[own])
        _, _, *mine = run(multi_adapter_linear, alone, one_rule(norm), backend="triton")
        assert torch.equal(mine[2 * e], grads[2 * e]) and torch.equal(mine[2 * e + 1], grads[2 * e + 1])


def test_under_batch_invariance_a_row_without_an_adapter_has_the_disabled_layers_bits(device, invariant):
    x, weight, bias, pairs, _, rows = make(mixed(90), N=53, K=70, device=device)
    adapters = [Adapter(*pair) for pair in pairs]
    y = multi_adapter_linear(x, weight, bias, adapters, rows, backend="triton")
    a, b = pairs[0]
    frozen = allora_linear(x, weight, bias, a, torch.zeros_like(b), norm=None, backend="triton")
    assert torch.equal(y[rows == -1], frozen[rows == -1])


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "xb", "ab"])
@pytest.mark.parametrize("rules", [one_rule("row"), [(1.0, "row"), (2.0, None), (1.0, "entry"), (1.0, "row")]])
def test_only_what_is_trained_gets_a_gradient(device, backend, trained, rules):
    tensors = make(mixed(50), device=device)
    whole = run(multi_adapter_linear, tensors, rules, backend=backend)
    part = run(multi_adapter_linear, tensors, rules, trained=trained, backend=backend)
    kinds = ["y", "x", *"ab" * len(RANKS)]
    for kind, p, w in zip(kinds, part, whole):
        if kind == "y" or kind in trained:
            torch.testing.assert_close(p, w)
        else:
            assert p is None


def test_one_adapter_frozen_beside_another(device):
    x, weight, bias, pairs, g, rows = make(mixed(50), device=device)
    a, b = pairs[0]
    adapters = [Adapter(a, b), Adapter(*(t.requires_grad_() for t in pairs[1])), *(Adapter(*p) for p in pairs[2:])]
    multi_adapter_linear(x, weight, bias, adapters, rows, backend="triton").backward(g)
    assert a.grad is None and pairs[1][0].grad.abs().sum() > 0


def test_an_adapter_without_rows_gets_zeros(device):
    x, weight, bias, pairs, g, rows = make([0, 2, 2, -1], device=device)
    _, _, *grads = run(multi_adapter_linear, (x, weight, bias, pairs, g, rows), one_rule("row"), backend="triton")
    assert all(not t.any() for t in (*grads[2:4], *grads[6:8])) and all(t.any() for t in grads[:2])


def test_a_change_between_forward_and_backward_is_an_error():
    x, weight, bias, pairs, g, rows = make(mixed(20))
    adapters = [Adapter(a.requires_grad_(), b.requires_grad_()) for a, b in pairs]
    y = multi_adapter_linear(x, weight, bias, adapters, rows)
    with torch.no_grad():
        pairs[1][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(g)


def test_what_happens_to_row_adapter_after_the_call_does_not_matter(device):
    x, weight, bias, pairs, g, rows = make(mixed(40), device=device)
    expected = run(multi_adapter_linear, (x, weight, bias, pairs, g, rows), one_rule("row"), backend="triton")
    leaves = [(a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in pairs]
    adapters = [Adapter(*pair, *rule) for pair, rule in zip(leaves, one_rule("row"))]
    x = x.requires_grad_()
    y = multi_adapter_linear(x, weight, bias, adapters, rows, backend="triton")
    rows.zero_()
    grads = torch.autograd.grad(y, [x, *(t for pair in leaves for t in pair)], g)
    assert all(map(torch.equal, grads, expected[1:]))


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_a_second_derivative_is_refused(loss):
    x, weight, bias, pairs, _, rows = make(mixed(9))
    adapters = [Adapter(a.requires_grad_(), b) for a, b in pairs]
    y = multi_adapter_linear(x, weight, bias, adapters, rows)
    (grad,) = torch.autograd.grad(loss(y), pairs[0][0], create_graph=True)
    with pytest.raises(RuntimeError, match="a rescaled gradient has no derivative"):
        grad.sum().backward()


# --- the rest of PyTorch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(device, reentrant):
    tensors = make(mixed(60), device=device)

    def checkpointed(f):
        return lambda x, w, bias, adapters, rows, **settings: checkpoint(
            lambda x: f(x, w, bias, adapters, rows, **settings), x, use_reentrant=reentrant
        )

    plain = run(multi_adapter_linear, tensors, one_rule("row"), backend="triton")
    again = run(multi_adapter_linear, tensors, one_rule("row"), checkpointed, backend="triton")
    assert all(map(torch.equal, plain, again))


def test_autocast(device):
    tensors = make(mixed(60), device=device)

    def autocast(f):
        def call(*args, **settings):
            with torch.autocast(device, torch.bfloat16):
                return f(*args, **settings)

        return call

    y, dx, *grads = run(multi_adapter_linear, tensors, one_rule("row"), autocast, backend="triton")
    assert y.dtype == torch.bfloat16 and {t.dtype for t in (dx, *grads)} == {torch.float32}
    whole = run(multi_adapter_linear, tensors, one_rule("row"), backend="triton")
    for ours, wide in zip((y, dx, *grads), whole):
        assert (ours.float() - wide).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("rules", [one_rule("row"), [(1.0, "row"), (2.0, None), (1.0, "entry"), (1.0, "row")]])
def test_fullgraph_compile_gives_the_eager_values(device, rules):
    tensors = make(mixed(20), device=device)
    plain = run(multi_adapter_linear, tensors, rules, backend="triton")
    compiled = torch.compile(multi_adapter_linear, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, run(compiled, tensors, rules, backend="triton"), plain))
    # What was traced left nothing behind.
    assert all(map(torch.equal, run(multi_adapter_linear, tensors, rules, backend="triton"), plain))


def test_in_inference_mode_first(device):
    tensors = make(mixed(20), device=device)
    rules = [(0.1 + e, norm) for e, norm in enumerate(("row", None, "row", "token"))]
    x, weight, bias, pairs, _, rows = tensors
    with torch.inference_mode():
        y = multi_adapter_linear(x, weight, bias, [Adapter(*p, *r) for p, r in zip(pairs, rules)], rows)
    assert torch.equal(run(multi_adapter_linear, tensors, rules)[0], y)


def test_a_few_adapters_more_make_no_other_shapes():
    def groups(count):
        return Layout.of([Adapter(torch.zeros(2, 3), torch.zeros(4, 2))] * count).groups

    assert groups(1) == groups(4) == 4 and groups(5) == 8 and groups(64) == 64
    assert len({groups(count) for count in range(33, 65)}) == 4
    assert all(count <= groups(count) <= max(count + 3, 1.25 * count) for count in range(1, 300))


@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("samples", [[], [-1, -1], [2, 0, -1, 1, 2, 0, -1, 1, 2], [0] * 4])
def test_the_rows_of_whole_samples_need_no_sort(samples, length, device):
    adapters = [Adapter(torch.zeros(2, 3), torch.zeros(4, 2), norm=norm) for norm in ("row", None, "row")]
    layout = Layout.of(adapters)
    assert layout.slots == (0, 2, 1)
    rows = torch.tensor(samples, dtype=torch.int32, device=device).repeat_interleave(length)
    for found, want in zip(layout.rows_of_samples(samples, length, rows.device), layout.rows(rows), strict=True):
        assert found.dtype == torch.int32 and torch.equal(found, want)


# --- errors ---------------------------------------------------------------------------------------------------------


def call(**changes):
    x, weight, bias, pairs, _, rows = make(mixed(20))
    values = {"x": x, "weight": weight, "bias": bias, "adapters": [Adapter(*p) for p in pairs], "row_adapter": rows}
    return multi_adapter_linear(**values | changes)


A, B = make([0])[3][0]
BAD = {
    "no adapters": ({"adapters": []}, ValueError, "adapters is empty"),
    "no Adapter": ({"adapters": [(A, B)]}, TypeError, r"adapters\[0\] must be an allora_kernels.Adapter, got tuple"),
    "another K": ({"adapters": [Adapter(A, B), Adapter(A[:, 1:], B)]}, ValueError, r"adapters\[1\]: lora_A must be .* K = 41"),
    "another N": ({"adapters": [Adapter(A, B[1:])]}, ValueError, r"adapters\[0\]: lora_B must be"),
    "a rule": ({"adapters": [Adapter(A, B, 2.0, "rows")]}, ValueError, r"adapters\[0\]: norm must be one of"),
    "an eta": ({"adapters": [Adapter(A, B, -1.0)]}, ValueError, r"adapters\[0\]: eta must be finite"),
    "a rank": ({"adapters": [Adapter(A.repeat(90, 1), B.repeat(1, 90))]}, ValueError, "between 1 and 256, got 270"),
    "a number too large": ({"row_adapter": torch.full((20,), 4)}, ValueError, "from 0 to 3 for 4 adapters.* from 4 to 4"),
    "a number too small": ({"row_adapter": torch.full((20,), -2)}, ValueError, "or -1 for none; got values from -2"),
    "floats": ({"row_adapter": torch.zeros(20)}, TypeError, "row_adapter must be int32 or int64, got torch.float32"),
    "a list": ({"row_adapter": [0] * 20}, TypeError, "row_adapter must be a Tensor, got list"),
    "too few": ({"row_adapter": torch.zeros(19, dtype=torch.int32)}, ValueError, r"row_adapter must be \[20\]"),
    "a trained weight": ({"weight": torch.randn(33, 41, requires_grad=True)}, ValueError, "weight is frozen"),
    "another dtype": ({"x": torch.randn(20, 41).double()}, ValueError, "x is torch.float64 but weight is torch.float32"),
    "a backend": ({"backend": "cuda"}, ValueError, "backend"),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_compiled_it_refuses_wrong_numbers_too():
    compiled = torch.compile(multi_adapter_linear, backend="aot_eager", fullgraph=True)
    x, weight, bias, pairs, _, rows = make(mixed(20))
    with pytest.raises(RuntimeError, match="row_adapter must be from -1 to the number of adapters less one"):
        compiled(x, weight, bias, [Adapter(*p) for p in pairs], rows + 5)


def test_vmap_over_batches(device):
    x, weight, bias, pairs, _, rows = make(mixed(24), device=device)
    adapters = [Adapter(*p) for p in pairs]
    batches = x.view(3, 8, -1)

    def loss(x):
        return multi_adapter_linear(x, weight, bias, adapters, rows[:8], backend="eager").square().sum()

    each = torch.stack([torch.func.grad(loss)(batch) for batch in batches])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batches), each)


def test_a_kept_table_is_there_before_another_stream_can_read_it(monkeypatch):
    done = mock.Mock()
    done.copy.return_value = torch.tensor([1.0])
    monkeypatch.setattr(packing, "on_device", done.copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: done)
    packing._kept.cache_clear()
    for _ in range(2):
        packing._table((1.0,), torch.device("cuda"), torch.float32)
    packing._kept.cache_clear()
    assert [call[0] for call in done.method_calls] == ["copy", "synchronize"]
