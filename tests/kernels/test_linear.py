import pytest
import torch

from armillary.kernels.linear import FusedLinear


@pytest.mark.parametrize("bias", [False, True])
def test_each_output_is_its_own_projection(bias):
    fused = FusedLinear(("q_proj", "k_proj"), 6, (4, 2), bias)
    x = torch.randn(3, 6)
    q, k = fused(x)
    assert torch.equal(q, fused.q_proj(x))
    assert torch.equal(k, fused.k_proj(x))
    assert sorted(fused.state_dict()) == sorted(
        f"{n}.{p}" for n in ("q_proj", "k_proj") for p in (("weight", "bias") if bias else ("weight",))
    )


def test_names_and_sizes_must_match():
    with pytest.raises(ValueError, match="shorter"):
        FusedLinear(("q_proj", "k_proj"), 6, (4,))
