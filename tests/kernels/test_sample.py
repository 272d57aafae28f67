"""The kernel that draws a token sorts nothing and gives the token of the plain law, bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.sample import MAX_VOCABULARY, ONE, draw, reference

native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")


def by_definition(row, peak, temperature, top_k, top_p, min_p, u):
    """The law of the module in Python integers, with a sort."""
    x = [float((torch.tensor(value) - peak) / temperature) for value in row]
    weight = [round(math.exp(value) * ONE) for value in x]
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))[: top_k or None]
    limit = math.ceil(top_p * sum(weight[i] for i in order)) if top_p < 1 else math.inf
    kept, before = [], 0
    for i in order:
        if before < limit and weight[i] >= min_p * ONE:
            kept.append(i)
        before += weight[i]
    total = sum(weight[i] for i in kept)
    target, mass = min(int(u * total), total - 1), 0
    for i in sorted(kept):
        mass += weight[i]
        if mass > target:
            return i
    raise AssertionError("nothing was drawn")


ROWS = st.one_of(
    st.builds(
        lambda seed, size, scale: (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).tolist(),
        st.integers(0, 1 << 30), st.integers(1, 700), st.sampled_from((0.0, 0.3, 3.0, 30.0)),
    ),
    st.lists(st.sampled_from((-math.inf, -60.0, -31.0, -9.5, -1.0, 0.0, 0.5, 0.5000001)), min_size=1, max_size=80).filter(
        lambda row: max(row) > -math.inf
    ),  # ties, masks, and what weighs next to nothing
)  # fmt: skip
FILTERS = st.tuples(
    st.sampled_from((0.05, 0.7, 1.0, 3.0)),
    st.sampled_from((0, 0, 1, 2, 40, 10_000)),
    st.sampled_from((1.0, 1.0, 1e-9, 0.3, 0.9, 0.99999, 1 - 2**-53)),
    st.sampled_from((0.0, 0.0, 0.01, 0.5, 1.0)),
)
UNIFORM = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from((0.0, 0.25, 0.5, 1 - 2**-53)))


@given(row=ROWS, filters=FILTERS, u=UNIFORM)
def test_both_draw_what_the_law_says(row, filters, u):
    temperature, top_k, top_p, min_p = filters
    tensor = torch.tensor(row)
    peak = float(tensor.max())
    expected = by_definition(row, peak, temperature, top_k, top_p, min_p, u)
    assert reference(tensor, peak, temperature, top_k, top_p, min_p, u) == expected
    assert draw(tensor, peak, temperature, top_k, top_p, min_p, u) == expected


@native
@pytest.mark.parametrize("size", [49_152, 151_936])
@pytest.mark.parametrize("scale", [0.5, 2.5, 6.0])
def test_the_kernel_equals_torch_on_whole_vocabularies(size, scale):
    generator = torch.Generator().manual_seed(size)
    row = torch.randn(size, generator=generator) * scale
    peak = float(row.max())
    for filters in (
        (0, 1.0, 0.0),
        (0, 1.0, 0.02),
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (2000, 0.95, 0.001),
        (size - 1, 0.5, 0.0),
    ):
        for temperature in (0.6, 1.0):
            for u in torch.rand(5, generator=generator).tolist():
                assert draw(row, peak, temperature, *filters, u) == reference(row, peak, temperature, *filters, u)


@native
def test_weights_are_those_of_a_correctly_rounded_exponential():
    """Two tokens, the second of weight w: every u below 1 / (1 + w) draws the first, every u above it the second."""
    for x in torch.linspace(0, -31, 400).tolist():
        row = torch.tensor([0.0, x])
        weight = round(math.exp(float(row[1])) * ONE)
        edge = ONE / (ONE + weight)
        for u in (edge * (1 - 1e-12), min(edge * (1 + 1e-12), 1 - 2**-53)):
            assert draw(row, 0.0, 1.0, 0, 1.0, 0.0, u) == by_definition(row.tolist(), 0.0, 1.0, 0, 1.0, 0.0, u)


def test_a_vocabulary_whose_weights_would_overflow_is_refused():
    row = torch.zeros(1).expand(MAX_VOCABULARY + 1)
    with pytest.raises(InputError, match="can be sampled from"):
        draw(row, 0.0, 1.0, 0, 1.0, 0.0, 0.5)
