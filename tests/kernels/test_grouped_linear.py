"""`grouped_linear` on both backends, against autograd over its formula; its errors; compiling, checkpointing, autocast."""

import pytest
import torch
from comparing import ETA, assert_all_close, doubles
from test_groups import CUTS, cuts, make
from torch.utils.checkpoint import checkpoint

from allora_kernels import grouped_linear, reference
from allora_kernels.groups import ops
from allora_kernels.groups import reference as grouped

norms = pytest.mark.parametrize("norm", reference.NORMS)
PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


def run(f, tensors, norm, call=lambda f, *args, **settings: f(*args, **settings), **settings):
    """y, dX, dA and dB."""
    x, weight, bias, a, b, g, offsets = tensors
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = call(f, leaves[0], weight, bias, *leaves[1:], offsets, eta=ETA, norm=norm, **settings)
    y.backward(g.to(y.dtype))
    return y, *(leaf.grad for leaf in leaves)


@cuts
@norms
def test_values_and_gradients(device, cut, norm):
    tensors = make(cut, 33, 41, 3, device=device)
    exact = run(grouped.grouped_linear, doubles(*tensors), norm)
    eager = run(grouped_linear, tensors, norm, backend="eager")
    ours = run(grouped_linear, tensors, norm, backend="triton")
    assert_all_close("y dx da db", ours, eager, exact)
    for name, result, e in zip(("y", "dx", "da", "db"), eager, exact):
        torch.testing.assert_close(result.double(), e, rtol=1e-4, atol=1e-4, msg=name)


@norms
@pytest.mark.parametrize("pair", PAIRS[1:])
def test_dtypes(device, norm, pair):
    tensors = make(CUTS["ragged"], 33, 41, 3, *pair, device=device)
    exact = run(grouped.grouped_linear, doubles(*tensors), norm)
    eager = run(grouped_linear, tensors, norm, backend="eager")
    assert_all_close("y dx da db", run(grouped_linear, tensors, norm, backend="triton"), eager, exact)


def test_a_transposed_weight_and_no_bias(device):
    x, weight, _, *rest = make(CUTS["ragged"], 33, 41, 3, device=device)
    transposed = weight.mT.contiguous().mT
    assert not transposed.is_contiguous()
    for one, other in zip(
        run(grouped_linear, (x, weight, None, *rest), "row", backend="triton"),
        run(grouped_linear, (x, transposed, None, *rest), "row", backend="triton"),
    ):
        torch.testing.assert_close(one, other)


def test_each_group_is_a_layer_of_its_own(device):
    x, weight, bias, a, b, g, offsets = make(CUTS["ragged"], 33, 41, 3, device=device)
    y, dx, da, db = run(grouped_linear, (x, weight, bias, a, b, g, offsets), "row", backend="triton")
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        rows, start = slice(start, stop), stop
        leaves = [t.detach().requires_grad_() for t in (x[rows], a[e], b[e])]
        alone = reference.allora_linear(leaves[0], weight[e], bias[e], *leaves[1:], eta=ETA)
        grads = torch.autograd.grad(alone, leaves, g[rows])
        for ours, theirs in zip((y[rows], dx[rows], da[e], db[e]), (alone, *grads)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_happens_to_the_offsets_after_the_call_does_not_matter(device):
    x, weight, bias, a, b, g, offsets = make(CUTS["ragged"], 33, 41, 3, device=device)
    expected = run(grouped_linear, (x, weight, bias, a, b, g, offsets), "row", backend="triton")
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = grouped_linear(leaves[0], weight, bias, *leaves[1:], offsets, eta=ETA, backend="triton")
    offsets.zero_()
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(y, leaves, g), expected[1:]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(device, reentrant):
    tensors = make(CUTS["ragged"], 33, 41, 3, device=device)

    def checkpointed(f, *args, **settings):
        return checkpoint(lambda *args: f(*args, **settings), *args, use_reentrant=reentrant)

    plain = run(grouped_linear, tensors, "row", backend="triton")
    assert all(
        torch.equal(*pair) for pair in zip(plain, run(grouped_linear, tensors, "row", checkpointed, backend="triton"))
    )


def test_autocast(device):
    tensors = make(CUTS["ragged"], 33, 41, 3, device=device)
    half = [t.to(torch.bfloat16) if i in (0, 1, 2) else t for i, t in enumerate(tensors)]

    def autocast(f, *args, **settings):
        with torch.autocast(device, torch.bfloat16):
            return f(*args, **settings)

    y, dx, da, db = run(grouped_linear, tensors, "row", autocast, backend="triton")
    assert y.dtype == torch.bfloat16 and dx.dtype == da.dtype == db.dtype == torch.float32
    x, weight, bias, a, b, _, offsets = half
    s = grouped.grouped_down_project(x, a, offsets, torch.bfloat16)
    torch.testing.assert_close(y, grouped.grouped_fused_linear(x, weight, bias, s, b, offsets), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_nothing_to_train(device, backend):
    x, weight, bias, a, b, _, offsets = make(CUTS["ragged"], 33, 41, 3, device=device)
    y = grouped_linear(x, weight, bias, a, b, offsets, backend=backend)
    assert not y.requires_grad
    x.requires_grad_()
    y = grouped_linear(x, weight, bias, a, b, offsets, backend=backend)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


# --- ops ------------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    x, weight, bias, a, b, g, offsets = make(((3, 0, 4), 1), 9, 11, 3, device=device)
    s = grouped.grouped_down_project(x, a, offsets, torch.float32)
    torch.library.opcheck(ops.grouped_down_project.op, (x, a, offsets, torch.float32))
    torch.library.opcheck(ops.grouped_fused_linear.op, (x, weight, bias, s, b, offsets))
    for norm in reference.WEIGHT_NORMS:
        torch.library.opcheck(ops.weight_coefficient.op, (a, b, 2.0, norm))
    for needs in ((True, torch.float32, torch.float32), (False, None, torch.float32), (True, torch.float32, None)):
        args = (g, x, s, b, None, offsets, 2.0, None, *needs)
        torch.library.opcheck(ops.grouped_adapter_grads.op, args)


@pytest.mark.parametrize("norm", ["row", "entry", None])
def test_fullgraph_compile_gives_the_eager_values(device, norm):
    tensors = make(((3, 0, 4), 1), 9, 11, 3, device=device)
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    plain = run(grouped_linear, tensors, norm, backend="triton")
    assert all(torch.equal(*pair) for pair in zip(run(compiled, tensors, norm, backend="triton"), plain))


def test_compiled_it_refuses_offsets_too(device):
    if device == "cuda":
        pytest.skip("a device assertion, which ends the process's use of the GPU")
    *tensors, _, offsets = make(((3, 0, 4), 1), 9, 11, 3, device=device)
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    for wrong in (offsets + 2, offsets.flip(0), offsets - 4):
        with pytest.raises(RuntimeError, match="offsets must not be negative, fall, nor pass the rows of x"):
            compiled(*tensors, wrong, backend="triton")


# --- errors ---------------------------------------------------------------------------------------------------------

X, W, BIAS, A, B, OFFSETS = range(6)
BAD = {
    "x not 2-D": (X, lambda t: t[None], ValueError, r"x must be \[M, K\]"),
    "x of another K": (X, lambda t: t[:, 1:], ValueError, "with K = 11"),
    "x an integer": (X, lambda t: t.long(), TypeError, "x must have a floating-point dtype"),
    "x of another dtype": (X, lambda t: t.double(), ValueError, "x is torch.float64 but weight is torch.float32"),
    "no tensor": (W, lambda t: 3, TypeError, "weight must be a Tensor, got int"),
    "no groups": (W, lambda t: t[:0], ValueError, "at least one group"),
    "one weight": (W, lambda t: t[0], ValueError, r"weight \[E, N, K\]"),
    "a bias for all": (BIAS, lambda t: t[0], ValueError, r"bias must be \[3, 9\]"),
    "a trained weight": (W, lambda t: t.clone().requires_grad_(), ValueError, "weight is frozen in ALLoRA"),
    "fewer adapters": (A, lambda t: t[1:], ValueError, r"lora_A must be \[3, 3, 11\]"),
    "another rank": (B, lambda t: t[..., 1:], ValueError, r"lora_B must be \[3, 9, 3\]"),
    "too wide": (A, lambda t: t.repeat(1, 90, 1), ValueError, r"lora_B must be \[3, 9, 270\]"),
    "too few offsets": (OFFSETS, lambda t: t[1:], ValueError, r"offsets must be \[3\]"),
    "offsets of floats": (OFFSETS, lambda t: t.float(), TypeError, "offsets must be int32 or int64, got"),
    "offsets that fall": (OFFSETS, lambda t: t.flip(0), ValueError, r"none less than the one before; got \[7, 3, 3\]"),
    "offsets past x": (OFFSETS, lambda t: t + 2, ValueError, "from 0 to the 8 rows of x"),
    "a negative offset": (OFFSETS, lambda t: t - 4, ValueError, "from 0 to the 8 rows of x"),
}


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize(("which", "change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(device, which, change, error, message, backend):
    values_are_wrong = which == OFFSETS and error is ValueError and "must be" not in message
    if device == "cuda" and values_are_wrong:
        pytest.skip("a device assertion, which ends the process's use of the GPU")
    *tensors, _, offsets = make(((3, 0, 4), 1), 9, 11, 3, device=device)
    tensors = [*tensors, offsets]
    tensors[which] = change(tensors[which])
    with pytest.raises(error, match=message):
        grouped_linear(*tensors, backend=backend)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"norm": "rows"}, "norm must be one of"), ({"eta": 0.0}, "eta must be finite"), ({"backend": "x"}, "backend")],
)
def test_bad_settings_are_named(device, settings, message):
    *tensors, _, offsets = make(((3, 0, 4), 1), 9, 11, 3, device=device)
    with pytest.raises(ValueError, match=message):
        grouped_linear(*tensors, offsets, **settings)
