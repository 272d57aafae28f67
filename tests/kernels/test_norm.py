import pytest
import torch

from armillary.kernels.norm import RMSNorm, rms_norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_the_definition(offset):
    x, weight = torch.randn(5, 16), torch.randn(16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + offset)
    assert torch.allclose(rms_norm(x, weight, 1e-3, offset), expected, atol=1e-6)


def test_bfloat16_sums_in_float32():
    x, weight = torch.full((1, 4096), 1.0, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 0.0), x)  # 4,096 ones added in bfloat16 stop at 256


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_new_norm_only_normalises(offset):
    x = torch.randn(3, 8)
    assert torch.equal(RMSNorm(8, 1e-5, offset)(x), rms_norm(x, torch.ones(8), 1e-5))
