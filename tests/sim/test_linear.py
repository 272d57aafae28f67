"""DistServe's fitted lines, and that many decodes cost what each of them does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.sim.batch import Batch
from armillary.sim.costs import Decoding, Linear

MS = 1e6
OPT_13B = Linear(
    "opt-13b on one A100-80G", 16.457 * MS, 0.092648 * MS, 6.475e-6 * MS,
    Decoding(19.935 * MS, 6.269e-4 * MS, 0.038507 * MS), Decoding(7.166 * MS, 5.798e-4 * MS, 0.158311 * MS),
)  # fmt: skip


@pytest.mark.parametrize(("tokens", "ms"), [(128, 28.4), (512, 65.6), (1024, 118.1), (2048, 233.4)])
def test_prompts_of_opt_13b(tokens, ms):
    assert OPT_13B.iteration(Batch(((tokens, 0),), sampled=1)) / MS == pytest.approx(ms, abs=0.06)


@pytest.mark.parametrize(("sequences", "ms"), [(1, 20.3), (32, 31.4), (64, 42.9), (128, 65.4)])
def test_decodes_of_opt_13b(sequences, ms):
    assert OPT_13B.iteration(Batch((), sequences, 512 * sequences, sequences)) / MS == pytest.approx(ms, abs=0.06)


def test_pieces_of_a_prompt_attend_as_much_as_the_whole():
    pairs = Linear("pairs", 0, 0, 1000, Decoding(0, 0, 0))
    pieces = [(100, 0), (60, 100), (40, 160)]
    assert sum(pairs.iteration(Batch((piece,))) for piece in pieces) == pairs.iteration(Batch(((200, 0),)))


@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(1, 40))
def test_many_decodes_are_each_of_them(sequences, cached, count):
    each = [OPT_13B.iteration(Batch((), sequences, cached + i * sequences, sequences)) for i in range(count)]
    assert OPT_13B.decodes(sequences, cached, count).tolist() == each
