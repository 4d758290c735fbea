"""Quantized layers whose product the kernels take over, by the weight that the layer would dequantize."""

import contextlib
import copy
import warnings

import peft
import pytest
import torch
from quantized import KINDS, K, N, check, dequantized, plain_results, quantized, wrapped
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    FusedALLoRALinear,
    WrappedALLoRALinear,
    disable_adapters,
    explain,
    per_sample,
    reference,
    use_batch_invariant,
)
from allora_kernels.integrations.peft import accelerate_lora
from allora_kernels.layer import dequantizing
from allora_kernels.layer import quantized as calls
from allora_kernels.testing import assert_close

FLOAT, HALF = torch.float32, torch.bfloat16
# Those that were told the dtype that they compute in take the kernels for an x of that dtype alone.
COMPUTES_IN = {"4bit in bf16": [HALF], "4bit stored as bf16": [FLOAT]}
GIVE_THEIR_WEIGHT = [kind for kind in KINDS if "4bit" in kind or kind in ("float8", "int4", "int8 in groups")]
kinds = pytest.mark.parametrize(
    "kind, dtype", [(kind, dtype) for kind in GIVE_THEIR_WEIGHT for dtype in COMPUTES_IN.get(kind, [FLOAT, HALF])]
)
one_of_each = pytest.mark.parametrize("kind", ["4bit nf4", "float8", "int4"])


@pytest.fixture(autouse=True)
def kernels_for_few_rows(request, monkeypatch):
    if "gpu" not in request.keywords:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 1)


@contextlib.contextmanager
def taken_over(monkeypatch):
    """Yields the dense weights that are made; a layer's own product is an error."""
    made = []

    def packed_weight(*args):
        weight = dequantizing_packed_weight(*args)

        def dense():
            made.append(weight.dense())
            return made[-1]

        return weight._replace(dense=dense)

    dequantizing_packed_weight = dequantizing.packed_weight
    with monkeypatch.context() as patch:
        patch.setattr(dequantizing, "packed_weight", packed_weight)
        patch.setattr(calls, "add_adapter", None)
        yield made


def batch(dtype=FLOAT, device="cpu", rows=(3, 7)):
    return torch.randn(*rows, K, dtype=dtype, device=device), torch.randn(*rows, N, dtype=dtype, device=device)


# --- values and gradients -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("adapter_dtype", [FLOAT, HALF])
def test_every_kind(kind, dtype, adapter_dtype, monkeypatch):
    layer = wrapped(kind, "row", dtype, adapter_dtype)
    with taken_over(monkeypatch) as made:
        y, *_ = plain_results(layer, *batch(dtype))
    assert y.dtype == dtype and [(w.dtype, tuple(w.shape)) for w in made] == [(dtype, (N, K))] * 2
    assert torch.equal(made[0], made[1]) and torch.equal(made[0].double(), dequantized(layer.base_layer, dtype))
    check(layer, "row", dtype)


@one_of_each
@pytest.mark.parametrize("norm", reference.NORMS)
def test_every_rule(kind, norm):
    check(wrapped(kind, norm), norm, FLOAT)


def test_one_row_and_no_bias():
    base = quantized("4bit nf4", K, N)
    base.bias = None
    layer = WrappedALLoRALinear(base, 3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(K)
    assert_close(layer(x), *(x.to(t) @ (dequantized(base).to(t) + (layer.lora_B @ layer.lora_A).to(t)).mT
                             for t in (FLOAT, torch.float64)))  # fmt: skip
    assert layer(torch.randn(0, K)).shape == (0, N)


def test_a_packed_weight_of_one_row():
    """Which bitsandbytes' function for dequantizing takes for a transposed one."""
    layer = wrapped("4bit nf4")
    weight = layer.base_layer.weight
    weight.data = weight.data.view(1, -1)
    check(layer, "row", FLOAT)


@pytest.mark.parametrize("rows_of_b, columns", [(N // 2, K), (2 * N, K), (N, K // 2), (N, 2 * K)])
def test_factors_of_another_layer_are_refused(rows_of_b, columns):
    base, x = quantized("4bit nf4", K, N).requires_grad_(False), torch.randn(5, columns)
    with pytest.raises(ValueError, match=rf"x must be \[..., {K}\] and lora_B \[{N}, R\] for bitsandbytes Linear4bit"):
        calls.linear(base, x, torch.randn(3, columns), torch.randn(rows_of_b, 3), 2.0, "row")


def test_a_weight_on_another_device_is_refused(monkeypatch):
    layer, x = wrapped("4bit nf4"), torch.randn(2, K)
    elsewhere = dequantizing.packed_weight(layer.base_layer, FLOAT, True)._replace(device=torch.device("meta"))
    monkeypatch.setattr(dequantizing, "packed_weight", lambda *_: elsewhere)
    with pytest.raises(ValueError, match="the weight is on meta but x is on cpu"):
        layer(x)


def test_a_weight_that_was_quantized_from_another_dtype():
    """The state's dtype is that of the weight before; the layer computes in its own."""
    layer = wrapped("4bit in bf16", dtype=HALF)
    state = layer.base_layer.weight.quant_state
    state.dtype = torch.float16
    weight = dequantizing.packed_weight(layer.base_layer, HALF, True)
    assert weight.dtype == weight.dense().dtype == HALF and state.dtype == torch.float16
    check(layer, "row", HALF)


@one_of_each
def test_what_is_frozen_and_what_trains(kind, monkeypatch):
    layer, (x, g) = wrapped(kind), batch()
    whole = plain_results(layer, x, g)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        x.requires_grad_(wanted[0])
        layer.lora_A.requires_grad_(wanted[1])
        layer.lora_B.requires_grad_(wanted[2])
        leaves = [t for t in (x, layer.lora_A, layer.lora_B) if t.requires_grad]
        with taken_over(monkeypatch) as made:
            found = torch.autograd.grad(layer(x), leaves, g)
        torch.testing.assert_close(found, tuple(t for t, w in zip(whole[1:], wanted) if w))
        # Only dX reads the weight a second time.
        assert len(made) == 1 + wanted[0]


@one_of_each
def test_nothing_dense_is_kept_for_the_backward_pass(kind):
    layer, (x, g) = wrapped(kind), batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert kept and (N, K) not in kept and (K, N) not in kept
    y.backward(g)


def test_the_backward_pass_reads_the_weight_of_its_forward_pass():
    """As where weights are offloaded between the passes, and the module holds others, or none."""
    layer, (x, g) = wrapped("4bit nf4"), batch()
    expected = plain_results(layer, x, g)
    y = layer(x.requires_grad_())
    layer.base_layer.weight = None
    found = y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- with what else a layer does ------------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, reentrant, monkeypatch):
    layer, (x, g) = wrapped(kind), batch()
    plain = plain_results(layer, x, g)
    with taken_over(monkeypatch) as made:
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
        y.backward(g)
    assert len(made) == 3
    torch.testing.assert_close((y, x.grad, layer.lora_A.grad, layer.lora_B.grad), plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["4bit in bf16", "float8", "int4", "int8 in groups"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_autocast_to_the_dtype_that_the_layer_computes_in(kind, dtype, monkeypatch):
    """An x in float32 is what the norms of a model give that prepare_model_for_kbit_training has been at."""
    layer, (x, g) = wrapped(kind, dtype=HALF, adapter_dtype=FLOAT), batch(dtype)
    expected = plain_results(layer, x.to(HALF), g.to(HALF))
    with torch.autocast("cpu", HALF):
        frozen = layer.base_layer(x)
        with taken_over(monkeypatch):
            y = layer(x.requires_grad_())
            found = y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g.to(y.dtype))
    assert [t.dtype for t in found] == [frozen.dtype, dtype, FLOAT, FLOAT]
    for ours, right in zip(found, expected):
        assert (ours.float() - right.float()).norm() < 0.02 * right.float().norm()


@one_of_each
def test_per_sample_gradients(kind, monkeypatch):
    layer, (x, g) = wrapped(kind), batch(rows=(6, 7))
    with taken_over(monkeypatch), per_sample.record(layer):
        layer(x).backward(g)
    for sample in range(6):
        _, _, da, db = plain_results(layer, x[sample], g[sample])
        torch.testing.assert_close(layer.lora_A.grad_sample[sample], da)
        torch.testing.assert_close(layer.lora_B.grad_sample[sample], db)


@one_of_each
@pytest.mark.parametrize("enabled", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(kind, enabled, monkeypatch):
    monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 512)
    layer, (x, g) = wrapped(kind), batch(rows=(150,))
    with use_batch_invariant(), contextlib.nullcontext() if enabled else disable_adapters(layer):
        y, dx = _y_and_dx(layer, x, g)
        for rows in (slice(0, 1), slice(3, 40)):
            part = _y_and_dx(layer, x[rows], g[rows])
            torch.testing.assert_close(part, (y[rows], dx[rows]), rtol=0, atol=0)
    frozen = x @ dequantized(layer.base_layer).float().mT + layer.base_layer.bias
    low_rank = x @ layer.lora_A.mT @ layer.lora_B.mT if enabled else 0
    torch.testing.assert_close(y, frozen + low_rank)


def _y_and_dx(layer, x, g):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, x, g)


@pytest.mark.parametrize("kind", ["8bit", "int8"])
@pytest.mark.parametrize("enabled", [True, False])
def test_batch_invariance_is_refused_where_the_layer_computes(kind, enabled):
    layer = wrapped(kind)
    layer.enabled = enabled
    why = r"computes its own product, whose rows depend on the batch \(it is not known to multiply by a dequantized weight"
    with use_batch_invariant(), pytest.raises(RuntimeError, match=why):
        layer(torch.randn(2, K))


def test_a_switched_off_adapter_that_overflows_does_not_reach_an_invariant_batch():
    layer, x = wrapped("4bit nf4"), torch.ones(2, K)
    layer.enabled = False
    with torch.no_grad():
        layer.lora_A.fill_(1e38)
    with use_batch_invariant():
        assert layer(x).isfinite().all() and "dequantized" in str(layer.explain())
    plain = FusedALLoRALinear(K, N)
    plain.enabled = False
    with use_batch_invariant(), torch.no_grad():
        plain.lora_A.fill_(1e38)
        assert plain(x).isfinite().all()


@one_of_each
def test_copies(kind):
    layer, (x, g) = wrapped(kind), batch()
    plain = plain_results(layer, x, g)
    torch.testing.assert_close(plain_results(copy.deepcopy(layer), x, g), plain, rtol=0, atol=0)


def test_the_first_call_settles_the_dtype_that_a_4bit_layer_computes_in(monkeypatch):
    base = quantized("4bit nf4", K, N)
    assert base.compute_dtype is None
    layer = WrappedALLoRALinear(base, 3)
    with taken_over(monkeypatch):
        layer(torch.randn(2, K, dtype=HALF))
    assert base.compute_dtype == HALF and base.compute_type_is_set
    assert "it computes in torch.bfloat16 and x is torch.float32" in _why(layer, FLOAT)


def test_the_layers_of_peft(monkeypatch):
    model = nn.ModuleDict({"linear": quantized("4bit nf4", K, N)})
    model.is_loaded_in_4bit = True
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["linear"]), model)
    layer, (x, g) = model["linear"], batch()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)

    def results():
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return y, *torch.autograd.grad(y, (leaf, a, b), g)

    by_peft = results()
    accelerate_lora(model)
    with taken_over(monkeypatch) as made:
        torch.testing.assert_close(results(), by_peft, rtol=1e-4, atol=1e-4)
    assert len(made) == 2 and "bitsandbytes Linear4bit, dequantized once a pass by a kernel" in str(layer.explain())


# --- where the layer computes its own product -----------------------------------------------------------------------


def _why(layer, dtype=FLOAT, rows=600):
    return calls.obstacle(layer.base_layer, rows, dtype, layer.lora_A.device, layer.lora_A.dtype)


def hook(layer):
    layer.base_layer.register_forward_hook(lambda *_: None)


def train_bias(layer):
    layer.base_layer.bias.requires_grad_()


def half_bias(layer):
    """What torchao's layers return then depends on the kind."""
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.to(HALF), requires_grad=False)


@pytest.mark.parametrize(
    "kind, change, dtype, rows, why",
    [
        ("8bit", None, FLOAT, 600, "it is not known to multiply by a dequantized weight"),
        ("int8", None, FLOAT, 600, "it is not known to multiply by a dequantized weight"),
        ("4bit nf4", hook, FLOAT, 600, "it has hooks"),
        ("4bit nf4", train_bias, FLOAT, 600, "its bias is trained"),
        ("4bit in bf16", None, FLOAT, 600, "it computes in torch.bfloat16 and x is torch.float32"),
        ("4bit stored as bf16", None, HALF, 600, "it computes in torch.float32 and x is torch.bfloat16"),
        ("float8", half_bias, FLOAT, 600, "it is not known to multiply by a dequantized weight"),
        ("4bit nf4", None, FLOAT, 511, "511 rows are fewer than 512"),
        ("float8", None, FLOAT, 511, "511 rows are fewer than 512"),
        ("4bit nf4", None, torch.float64, 600, "the kernels take float32, float16 and bfloat16, not float64"),
    ],
)
def test_why_a_layer_computes_its_own_product(kind, change, dtype, rows, why, monkeypatch):
    monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 512)
    layer = wrapped(kind)
    if change is not None:
        change(layer)
    assert why in _why(layer, dtype, rows)
    if dtype == FLOAT and kind != "4bit in bf16":
        assert f"its own product ({_why(layer, dtype, rows)})" in layer.explain(rows).plan["y and dx"]


def test_a_call_of_few_rows_does_not_ask_for_the_weight(monkeypatch):
    monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 22)
    layer, (x, g) = wrapped("4bit nf4"), batch()
    with monkeypatch.context() as patch:
        patch.setattr(dequantizing, "packed_weight", None)
        plain_results(layer, x, g)
    monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 21)
    with taken_over(monkeypatch):
        plain_results(layer, x, g)


def test_a_dtype_that_keeps_the_kernels_from_the_product_is_warned_of_once():
    calls._warn_of_dtype.cache_clear()
    layer, x = wrapped("4bit in bf16"), torch.randn(7, K)
    with pytest.warns(RuntimeWarning, match=r"it computes in torch.bfloat16 and x is torch.float32; .*compute_dtype"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        layer(x)


def test_autocast_to_another_dtype_leaves_the_product_to_the_layer():
    layer = wrapped("4bit nf4")
    with torch.autocast("cpu", HALF):
        assert _why(layer) == "it computes in torch.float32 and autocast in torch.bfloat16"


def test_without_the_kernels_the_layer_computes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "cpu tensors" in _why(wrapped("4bit nf4"))


@one_of_each
def test_a_compiled_call_is_the_layers_own(kind, monkeypatch):
    """Inductor would keep the dense weight from the forward pass to the backward pass."""
    monkeypatch.setattr(calls, "_dequantized", None)
    layer, (x, _) = wrapped(kind), batch()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(TypeError):
        layer(x)


def test_the_number_of_rows_compiles_nothing_again(monkeypatch):
    monkeypatch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 512)
    layer = wrapped("float8")
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True)
    for rows in (7, 300, 600, 2000):
        compiled(torch.randn(rows, K))
    assert len(graphs) == 1


def test_a_transformed_call_is_the_layers_own():
    layer, (x, _) = wrapped("float8"), batch()
    dx = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(dx, plain_results(layer, x, torch.ones(3, 7, N))[1])


@one_of_each
def test_what_it_says_of_itself(kind):
    layer = wrapped(kind)
    plan = layer.explain(rows=600).plan
    by = "a kernel" if kind == "4bit nf4" else "torchao"
    assert plan["weight"] == f"{layer.base_kind}, dequantized once a pass by {by}, for an x in torch.float32"
    assert plan == {"weight": plan["weight"], **FusedALLoRALinear(K, N, layer.r).explain(rows=600).plan}
    (told,) = explain(nn.Sequential(layer), rows=600).layers.values()
    assert told.fused and dict(told.plan) == plan
    layer.base_layer.register_forward_hook(lambda *_: None)
    (told,) = explain(nn.Sequential(layer), rows=600).layers.values()
    assert not told.fused and f"{layer.base_kind} computes y and dx (it has hooks" in told.reason


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("adapter_dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rows", [calls.DEQUANTIZED_FROM_ROWS, 2048 + 3])
def test_every_kind_on_a_gpu(kind, dtype, adapter_dtype, rows, monkeypatch):
    layer = wrapped(kind, "row", dtype, adapter_dtype, device="cuda")
    with taken_over(monkeypatch) as made:
        plain_results(layer, *batch(dtype, "cuda", (rows,)))
    assert len(made) == 2
    check(layer, "row", dtype, (rows,))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", reference.NORMS)
def test_every_rule_on_a_gpu(norm):
    check(wrapped("4bit nf4", norm, HALF, FLOAT, device="cuda"), norm, HALF, (4, 512))
