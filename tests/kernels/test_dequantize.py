"""The weight in 4 bits made dense: bit for bit what its numbers, code and scales say, and bitsandbytes' own."""

import pytest
import torch
from quantized import quantized
from red_zones import in_red_zone, poisoned_outputs

import csrc_triton
from allora_kernels import reference
from allora_kernels.layer import dequantizing, ops

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes is not installed: pip install '.[quantized]'"
)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def packed_weight(n, k, device, block=64, kind="nf4", nested=True, storage=torch.uint8, dtype=torch.float32):
    torch.manual_seed(n * k)
    weight = torch.randn(n, k, dtype=dtype) * torch.rand(n, 1)
    packed, state = functional.quantize_4bit(weight.to(device), None, None, block, nested, kind, storage)
    return packed, state


def arguments(packed, state, dtype, place=lambda t: t):
    """Of the op, its operands where `place` puts them."""
    *tensors, block, scale_block = dequantizing._scales(state)
    tensors = [packed.view(torch.uint8).view(-1), state.code, *tensors]
    return *(None if t is None else place(t) for t in tensors), block, scale_block, *state.shape, dtype


def theirs(packed, state, dtype):
    wanted, state.dtype = state.dtype, dtype
    try:
        return functional.dequantize_4bit(packed, state)
    finally:
        state.dtype = wanted


@dtypes
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n, k", [(1, 2), (3, 64), (33, 96), (41, 53), (96, 64), (130, 272)])
def test_every_form(device, n, k, kind, nested, dtype):
    packed, state = packed_weight(n, k, device, kind=kind, nested=nested)
    with poisoned_outputs():
        found = csrc_triton.dequantize_4bit(*arguments(packed, state, dtype, in_red_zone))
    assert torch.equal(found, reference.dequantize_4bit(*arguments(packed, state, dtype)))
    # bitsandbytes' own function for the CPU takes blocks of weights for parts of rows, which they need not be.
    if n > 1 and k % 64 == 0:
        assert torch.equal(found, theirs(packed, state, dtype))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_every_size_of_a_block_and_dtype_of_the_storage(device, block, storage):
    packed, state = packed_weight(96, 272, device, block, storage=storage)
    assert packed.dtype == storage
    args = arguments(packed, state, torch.bfloat16)
    assert torch.equal(csrc_triton.dequantize_4bit(*args), reference.dequantize_4bit(*args))


@dtypes
def test_a_weight_of_zeros_and_one_that_overflows(device, dtype):
    for weight in (torch.zeros(8, 64), torch.full((8, 64), 1e30), torch.full((8, 64), 1e-30)):
        packed, state = functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        torch.testing.assert_close(
            csrc_triton.dequantize_4bit(*arguments(packed, state, dtype)),
            theirs(packed, state, dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )


def test_the_op(device):
    packed, state = packed_weight(33, 96, device)
    torch.library.opcheck(ops.dequantize_4bit.op, arguments(packed, state, torch.bfloat16))


def test_a_state_of_another_make_is_left_to_bitsandbytes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = quantized("4bit fp4", 64, 96)
    state = layer.weight.quant_state
    expected, absmax, code = theirs(layer.weight, state, torch.bfloat16), state.absmax, state.code

    def made_by(kernels=True):
        weight = dequantizing.packed_weight(layer, torch.bfloat16, kernels)
        assert torch.equal(weight.dense(), expected)
        return weight.by

    assert made_by() == "a kernel" and made_by(kernels=False) == "bitsandbytes"
    state.absmax = absmax.double()
    assert made_by() == "bitsandbytes"
    state.absmax = torch.stack([absmax, absmax], dim=-1)[:, 0]
    assert dequantizing._scales(state) is None
    state.absmax, state.code = absmax, torch.stack([code, code], dim=-1)[:, 0]
    assert made_by() == "bitsandbytes"
    state.code = code
    packed = layer.weight.data
    layer.weight.data = torch.stack([packed, packed], dim=-1)[..., 0]
    assert not layer.weight.is_contiguous() and made_by() == "a kernel"
    state.blocksize = 48
    assert dequantizing._scales(state) is None


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("n, k", [(4096, 4096), (14336, 4096), (1024, 4096)])
def test_a_models_sizes(n, k, nested, dtype):
    packed, state = packed_weight(n, k, "cuda", nested=nested, dtype=torch.bfloat16)
    found = csrc_triton.dequantize_4bit(*arguments(packed, state, dtype))
    assert torch.equal(found, theirs(packed, state, dtype))
