"""The scaling of a finished gradient by what backward brings, on the device: kernels/multiply_in_place.py."""

import pytest
import torch

from fastssl import kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(kernels.why_not(DEVICE) is not None, reason=kernels.why_not(DEVICE) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 4096, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
def test_multiplies_unless_the_factor_is_one(dtype, count, factor):
    from fastssl.kernels.multiply_in_place import multiply_in_place

    memory = torch.randn(count + 16, device=DEVICE).to(dtype)
    x, before = memory[:count], memory.clone()
    multiply_in_place(x, torch.tensor(factor, device=DEVICE, dtype=torch.float64))
    expected = (before[:count].float() * factor).to(dtype)
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    torch.testing.assert_close(x, expected, rtol=2**-7 if dtype == torch.bfloat16 and not CUDA else 0, atol=0)
    assert torch.equal(memory[count:], before[count:])


def test_a_factor_of_one_writes_nothing():
    """A signalling NaN would become a quiet one on its way through a float32."""
    from fastssl.kernels.multiply_in_place import multiply_in_place

    x = torch.full((9,), 0x7C01, dtype=torch.int16, device=DEVICE).view(torch.float16)
    multiply_in_place(x, torch.ones((), device=DEVICE))
    assert (x.view(torch.int16) == 0x7C01).all()


def test_strides_in_any_order():
    from fastssl.kernels.multiply_in_place import multiply_in_place

    x = torch.randn(3, 4, 5, device=DEVICE).permute(2, 0, 1)
    expected = x * 2
    multiply_in_place(x, torch.tensor(2.0, device=DEVICE))
    assert torch.equal(x, expected)
