"""Adapters on quantized layers in two processes train what one process trains, or are refused."""

from functools import partial

import pytest
import torch
from torch import nn

from allora_kernels import WrappedALLoRALinear, load_adapter, save_adapter

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")
pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[quantized]'")

import two_layers  # noqa: E402
from processes import SINCE_TORCH_2_13, run_checks  # noqa: E402
from quantized import quantized  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from two_layers import train  # noqa: E402

from allora_kernels.integrations.tensor_parallel import RowwiseALLoRA  # noqa: E402
from allora_kernels.layer import quantized as calls  # noqa: E402

WORLD, K, HIDDEN = 2, 64, 96
assert_same = partial(two_layers.assert_same, rtol=1e-3, atol=1e-4)
batch = partial(two_layers.batch, features=K)


def make_bare(kind):
    return nn.Sequential(quantized(kind, K, HIDDEN), nn.Tanh(), quantized(kind, HIDDEN, K))


def make_model(kind, norm="row"):
    model = two_layers.adapted(make_bare(kind), norm)
    assert all(type(model[i]) is WrappedALLoRALinear for i in (0, 2))
    return model


def assert_saved_alike(together, alone, kind, folder):
    """What all processes save of a sharded model, or the first of a model that each has whole."""
    first = dist.get_rank() == 0
    if first or not isinstance(together, DistributedDataParallel):
        save_adapter(together, folder / "together")
    if first:
        save_adapter(alone, folder / "alone")
        assert_same(*(load_file(folder / of / "adapter_model.safetensors") for of in ("together", "alone")))
        load_adapter(make_bare(kind), folder / "together")


def frozen(model):
    return {p for layer in (model[0], model[2]) for p in layer.base_layer.parameters()}


def sharded(model, policy=None, **settings):
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy(), **settings)
    return model


# --- what the processes check; each takes a folder they share --------------------------------------------------------


def check_ddp(kind, norm, settings, folder):
    ddp, alone = DistributedDataParallel(make_model(kind, norm), **settings), make_model(kind, norm)
    assert_same(train(ddp, batch(dist.get_rank())), train(alone, batch()))
    assert_saved_alike(ddp, alone, kind, folder)


def check_ddp_accumulation(kind, _):
    ddp, alone = DistributedDataParallel(make_model(kind)), make_model(kind)
    parts = batch(dist.get_rank()).split(1)
    for x in parts[:-1]:
        with ddp.no_sync():
            ddp(x).square().mean().backward()
    ddp(parts[-1]).square().mean().backward()
    for x in batch().split(1):
        (alone(x).square().mean() / WORLD).backward()
    for ours, expected in zip(ddp.parameters(), alone.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-4)


def check_ddp_of_torchao(_):
    with pytest.raises(NotImplementedError, match="Int8Tensor dispatch"):
        DistributedDataParallel(make_model("int8"))


def check_fsdp(kind, norm, leave_out, policy, folder):
    alone, model = make_model(kind, norm), make_model(kind, norm)
    ignored = {"ignored_params": frozen(model)} if leave_out else {}
    sharded(model, policy, **ignored)
    assert isinstance(model[0].lora_A, DTensor) and isinstance(model[0].base_layer.weight, DTensor) != leave_out
    if policy is None:
        assert_same(train(model, batch(dist.get_rank())), train(alone, batch()))
        return assert_saved_alike(model, alone, kind, folder)
    # AdamW's first step is a sign; the gradients say how near the two are.
    found, expected = train(model, batch(dist.get_rank()), 1), train(alone, batch(), 1)
    for name, t in expected.items():
        if name.startswith("d"):
            assert (found[name] - t).norm() < 0.1 * t.norm(), name


def check_fsdp_of_8bit(_):
    model = sharded(make_model("8bit"))
    for call in (model, model.eval()):
        with pytest.raises(
            RuntimeError, match=r"Linear8bitLt whose weight is a Parameter without scales: .*ignored_params="
        ):
            call(batch())


def check_fsdp_that_casts_packed_weights(dtype, _):
    model = sharded(make_model("4bit stored as bf16"), MixedPrecisionPolicy(param_dtype=dtype))
    with pytest.raises(
        RuntimeError, match=rf"packed weight was cast from torch.bfloat16 to {dtype}, .*param_dtype=torch.bf"
    ):
        model(batch())


def check_fsdp_of_torchao(_):
    with pytest.raises(NotImplementedError, match="Int8Tensor dispatch"):
        sharded(make_model("int8"))


def check_tensor_parallelism(kind, _):
    mesh = init_device_mesh("cpu", (WORLD,))
    for style, error, message in (
        (ColwiseParallel(), NotImplementedError, "only support nn.Linear"),
        (RowwiseParallel(), NotImplementedError, "only support nn.Linear"),
        (RowwiseALLoRA(), TypeError, "got WrappedALLoRALinear: .*a quantized layer cannot be cut"),
    ):
        model = make_model(kind)
        with pytest.raises(error, match=message):
            parallelize_module(model, mesh, {"0": style})
        torch.testing.assert_close(model(batch()), make_model(kind)(batch()))
    with pytest.raises((RuntimeError, NotImplementedError)):
        parallelize_module(make_model(kind), mesh, {"0.base_layer": ColwiseParallel()})(batch())


def by_the_kernels(check, folder):
    """`check` with the product of quantized layers taken over by the kernels, in both passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(calls, "DEQUANTIZED_FROM_ROWS", 1)
        patch.setattr(calls, "add_adapter", None)
        check(folder)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
EACH = ("4bit nf4", "8bit", "int8")
CHECKS = {
    **{f"ddp, {kind}, {norm}": partial(check_ddp, kind, norm, {}) for kind in EACH[:2] for norm in ("row", "token")},
    "ddp, int8, as it is": check_ddp_of_torchao,
    "ddp, int8, from a seed": partial(check_ddp, "int8", "row", {"init_sync": False}),
    **{f"ddp, {kind}, accumulation": partial(check_ddp_accumulation, kind) for kind in EACH[:2]},
    **{f"fsdp, 4bit, {norm}": partial(check_fsdp, "4bit nf4", norm, False, None) for norm in ("row", "entry", None)},
    "fsdp, 4bit stored as bf16": partial(check_fsdp, "4bit stored as bf16", "row", False, None),
    "fsdp, 4bit in bf16": partial(check_fsdp, "4bit nf4", "row", False, BF16),
    "fsdp, 4bit stored as bf16, in bf16": partial(check_fsdp, "4bit stored as bf16", "row", False, BF16),
    **{f"fsdp, {kind}, left out": partial(check_fsdp, kind, "row", True, None) for kind in EACH},
    **{f"fsdp, {kind}, left out, in bf16": partial(check_fsdp, kind, "row", True, BF16) for kind in EACH},
    "fsdp, 8bit": check_fsdp_of_8bit,
    **{f"fsdp, cast to {t}": partial(check_fsdp_that_casts_packed_weights, t) for t in (torch.float16, torch.float32)},
    "fsdp, int8": check_fsdp_of_torchao,
    **{f"tensor parallelism, {kind}": partial(check_tensor_parallelism, kind) for kind in EACH},
}
TAKEN_OVER = (
    *(
        "ddp, 4bit nf4, row",
        "ddp, 4bit nf4, token",
        "ddp, 4bit nf4, accumulation",
        "fsdp, 4bit, row",
        "fsdp, 4bit, None",
    ),
    *(
        "fsdp, 4bit stored as bf16",
        "fsdp, 4bit in bf16",
        "fsdp, 4bit nf4, left out",
        "fsdp, 4bit nf4, left out, in bf16",
    ),
)
CHECKS |= {f"{name}, by the kernels": partial(by_the_kernels, CHECKS[name]) for name in TAKEN_OVER}
CHECKS["fsdp, float8, left out, by the kernels"] = partial(
    by_the_kernels, partial(check_fsdp, "float8", "row", True, None)
)
if not SINCE_TORCH_2_13:
    for name in ("fsdp, 8bit", "fsdp, 4bit in bf16", *(f"fsdp, 4bit, {norm}" for norm in ("row", "entry", None))):
        del CHECKS[name]
        CHECKS.pop(f"{name}, by the kernels", None)


def test_two_processes_train_what_one_does(tmp_path):
    run_checks(WORLD, CHECKS, tmp_path)
