"""What the interpreter says beyond what Triton's own says: an overflow, and bf16 by their bits."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from csrc_triton.tiling import narrow


@pytest.fixture
def interpreted(device):
    if device != "cpu":
        pytest.skip("the interpreter is for tensors of the CPU")


@pytest.mark.parametrize(
    "x, y, fits",
    [(2**30, 1, True), (2**30, 2, False), (-(2**30), 2, True), (-(2**30) - 1, 2, False), (2**16, 2**15, False)],
)
def test_a_product_beyond_32_bits_is_an_error(interpreted, x, y, fits):
    @triton.jit
    def multiply(out, x, y, SIZE: tl.constexpr):
        places = tl.arange(0, SIZE)
        tl.store(out + places, (places * 0 + x) * y)

    out = torch.zeros(4, dtype=torch.int32)
    if fits:
        multiply[(1,)](out, x, y, SIZE=4)
        assert out.tolist() == [x * y] * 4
    else:
        with pytest.raises(Exception, match="mul of int32 overflows"):
            multiply[(1,)](out, x, y, SIZE=4)


def test_64_bits_hold_more(interpreted):
    @triton.jit
    def multiply(out, x, y, SIZE: tl.constexpr):
        places = tl.arange(0, SIZE).to(tl.int64)
        tl.store(out + places, (places * 0 + x) * y)

    out = torch.zeros(4, dtype=torch.int64)
    multiply[(1,)](out, 2**30, 2**30, SIZE=4)
    assert out.tolist() == [2**60] * 4


def test_bf16_and_fp32_are_the_same_numbers(interpreted):
    @triton.jit
    def there_and_back(bf16, fp32, back, SIZE: tl.constexpr):
        places = tl.arange(0, SIZE)
        wide = tl.load(bf16 + places).to(tl.float32)
        tl.store(fp32 + places, wide)
        tl.store(back + places, wide.to(tl.bfloat16))

    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    fp32, back = torch.empty(2**16), torch.empty_like(bf16)
    there_and_back[(1,)](bf16, fp32, back, SIZE=2**16)
    assert torch.equal(fp32.view(torch.int32), bf16.float().view(torch.int32))
    assert torch.equal(back.view(torch.int16), bf16.view(torch.int16))


def test_narrow_needs_no_conversion_of_the_interpreter(interpreted, monkeypatch):
    """Which takes denormals, and what is rounded to zero, to other numbers: `quick_interpreter` has its own."""

    @triton.jit
    def narrowed(fp32, bf16, SIZE: tl.constexpr):
        places = tl.arange(0, SIZE)
        tl.store(bf16 + places, narrow(tl.load(fp32 + places), tl.bfloat16))

    halves = torch.arange(-(2**15), 2**15)[:, None] * 2**16 + torch.tensor([0, 0x7FFF, 0x8000, 0xFFFF])
    fp32 = halves.flatten().to(torch.int32).view(torch.float32)
    bf16 = torch.empty_like(fp32, dtype=torch.bfloat16)
    monkeypatch.setattr(interpreter, "_convert_float", None)
    narrowed[(1,)](fp32, bf16, SIZE=2**18)
    nan = fp32.isnan()
    assert bf16[nan].isnan().all()
    assert torch.equal(bf16[~nan].view(torch.int16), fp32[~nan].bfloat16().view(torch.int16))
