"""The best allowed token and the row without the others, native and in torch, are those of the definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.kernels import token_mask

VALUES = st.sampled_from((-math.inf, -3.0, -0.0, 0.0, 0.5, 0.5, 2.0))
CASES = st.integers(1, 75).flatmap(
    lambda size: st.tuples(st.lists(VALUES, min_size=size, max_size=size), st.lists(st.booleans(), min_size=size, max_size=size))
)


def mask_of(bits):
    words = [sum(1 << t for t, bit in enumerate(bits[first : first + 32]) if bit) for first in range(0, len(bits), 32)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("native", [True, False])
@given(case=CASES, whole=st.integers(0, 3))
def test_only_what_is_allowed_counts(native, case, whole):
    row, bits = case
    bits = [True] * len(bits) if whole == 0 else [i >= 32 for i in range(len(bits))] if whole == 1 else bits
    tensor, mask = torch.tensor(row), mask_of(bits)
    left = [value if bit else -math.inf for value, bit in zip(row, bits, strict=True)]
    library = token_mask.library
    try:
        token_mask.library = library if native else lambda: None
        values, peak = token_mask.only_allowed(tensor, mask)
        best = token_mask.best_allowed(tensor, mask)
    finally:
        token_mask.library = library
    assert values.tolist() == left
    assert peak == max(left)
    assert best == ((left.index(peak), peak) if peak > -math.inf else (-1, -math.inf))
    assert tensor.tolist() == row
    assert [token_mask.allows(mask, token) for token in range(len(bits))] == bits


def test_a_mask_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="1 words for 40 tokens"):
        token_mask.best_allowed(torch.zeros(40), mask_of([True] * 32))
