"""Memory reserved ahead and memory in blocks, in closed form; and the paper's figures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.clock import VirtualClock
from armillary.reproduce import paged_attention, registry
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.scripted import ScriptedExecutor
from armillary.serve.request import Request, SamplingParams


def engine(policy: str, blocks: int, block_size: int) -> tuple[Engine, paged_attention.Watched]:
    clock = VirtualClock()
    watched = paged_attention.Watched(ScriptedExecutor(clock, token=lambda request, position: 0))
    config = EngineConfig(policy=policy, block_size=block_size, kv_blocks=blocks, max_batch_tokens=4096, prefix_cache="off")
    return Engine(watched, config, clock=clock), watched


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.integers(0, 60))
def test_the_use_of_what_is_reserved_for_the_longest_answer_is_the_mean_occupation_over_the_reservation(
    count: int, prompt: int, answer: int, unused: int
) -> None:
    """After iteration k of g a sequence holds p + k - 1 tokens, p + (g - 1) / 2 on average, of the p + g + unused that are reserved."""
    reserved = prompt + answer + unused
    served, watched = engine("orca", count * reserved, 1)
    for index in range(count):
        served.submit(Request(f"{index}", (1,) * prompt, SamplingParams(max_tokens=answer + unused, ignore_eos=True)))
    for _ in range(answer):
        assert served.snapshot()["blocks"]["total"] == count * reserved
        served.step()
    assert watched.held / watched.time / (count * reserved) == pytest.approx((prompt + (answer - 1) / 2) / reserved)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6), st.sampled_from([1, 4, 16]))
def test_in_blocks_a_sequence_wastes_less_than_one(shapes: list[tuple[int, int]], block_size: int) -> None:
    served, _ = engine("vllm", 4096 // block_size, block_size)
    requests = [
        Request(f"{index}", (1,) * prompt, SamplingParams(max_tokens=answer, ignore_eos=True))
        for index, (prompt, answer) in enumerate(shapes)
    ]
    for request in requests:
        served.submit(request)
    while served.step():
        running = [request for request in requests if request.blocks]
        held = sum(request.computed for request in running)
        assert 0 <= served.snapshot()["blocks"]["used"] * block_size - held < block_size * max(1, len(running))


def test_the_lengths_are_those_of_the_paper_on_average() -> None:
    found = paged_attention.lengths()
    assert sum(prompt for prompt, _ in found) / len(found) == pytest.approx(161.31, rel=0.05)
    assert sum(answer for _, answer in found) / len(found) == pytest.approx(337.99, rel=0.05)


@pytest.mark.slow
def test_every_row_holds_and_more_is_in_use_the_less_is_reserved() -> None:
    rows = registry.get("paged-attention").run().rows
    assert [row.holds for row in rows] == [True] * 6
    in_use = [row.ours for row in rows[:4]]
    assert in_use == sorted(in_use)
