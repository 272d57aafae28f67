"""Memory reserved ahead and memory in blocks, in closed form; and the paper's figures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.clock import VirtualClock
from armillary.reproduce import paged_attention
from armillary.reproduce.reserved import BOUNDS, Buddies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Outcome, Plan
from armillary.sim.costs import Decoding, Linear


class Watched:
    """Integrates over time how many tokens the cache holds."""

    def __init__(self, executor: VirtualExecutor) -> None:
        self._executor = executor
        self.time = self.held = 0

    def run(self, plan: Plan) -> Outcome:
        outcome = self._executor.run(plan)
        duration = outcome.end - outcome.start
        self.time += duration
        self.held += duration * sum(entry.start + entry.count for entry in plan.schedule.entries)
        return outcome


def engine(policy: str, blocks: int, block_size: int) -> tuple[Engine, Watched]:
    clock = VirtualClock()
    watched = Watched(VirtualExecutor(clock, Linear("1 ns", 1, 0, 0, Decoding(1, 0, 0))))
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
    for means in (paged_attention.SHAREGPT, paged_attention.ALPACA):
        found = paged_attention.lengths(means, 4096)
        assert [sum(column) / len(found) for column in zip(*found, strict=True)] == pytest.approx(means, rel=0.001)


@settings(max_examples=60)
@given(st.integers(64, 5000), st.lists(st.one_of(st.integers(1, 700), st.integers(-8, -1)), max_size=60))
def test_pieces_of_memory_never_overlap_and_are_whole_again_when_all_are_given_back(slots: int, moves: list[int]) -> None:
    """A positive number takes so many slots, a negative one gives back one of the pieces."""
    memory, taken = Buddies(slots), list[tuple[int, int]]()
    for move in moves:
        if move > 0 and (piece := memory.take(move)) is not None:
            assert move <= piece[1] < 2 * move
            assert piece[0] + piece[1] <= slots
            assert all(at + size <= piece[0] or piece[0] + piece[1] <= at for at, size in taken)
            taken.append(piece)
        elif move < 0 and taken:
            memory.give(*taken.pop(move % len(taken)))
    for piece in taken:
        memory.give(*piece)
    largest = 1 << (slots.bit_length() - 1)
    assert memory.take(largest) == (0, largest)


def test_more_is_in_use_the_less_is_reserved_and_the_context_allows_seven() -> None:
    """15.7k slots are seven contexts: figure 13's seven sequences."""
    in_use = [paged_attention.held(system, 120) for system in (*BOUNDS[::-1], "vllm")]
    assert in_use == sorted(in_use)
    result = paged_attention.serve("max", paged_attention.workload(paged_attention.SHAREGPT, 2.0, 60))
    at = sorted([(time, 1) for time in result.first_scheduled.tolist()] + [(time, -1) for time in result.finished.tolist()])
    assert max(sum(step for _, step in at[: place + 1]) for place in range(len(at))) == 7
