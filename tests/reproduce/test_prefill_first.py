"""Prompts first and whole: no iteration is of both, nobody is forgotten, and leaps change nothing."""

from __future__ import annotations

import pytest

from armillary.core.clock import VirtualClock
from armillary.core.units import MS
from armillary.reproduce.prefill_first import PrefillFirst
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.schedule import Plan
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.workload import fixed, poisson, requests
from armillary.serve.workload.requests import Arrival, arrivals
from armillary.sim.costs import Decoding, Linear

COST = Linear("line", 5 * MS, 0.1 * MS, 0, Decoding(10 * MS, 0, 0.1 * MS))


class Watched(VirtualExecutor):
    """Asserts of every iteration that it is prompts or decodes."""

    def duration(self, plan: Plan, *, ahead: bool = False) -> int:
        kinds = {entry.count == 1 and entry.start > 0 for entry in plan.schedule.entries}
        assert len(kinds) == 1
        return super().duration(plan, ahead=ahead)


def served(coming: list[Arrival], blocks: int, *, leaps: bool = True, **options: int) -> tuple[list[tuple[int | None, ...]], VirtualEngine]:
    config = EngineConfig.model_validate({"policy": "vllm", "kv_blocks": blocks, "prefix_cache": "off", "block_size": 16, **options})
    those = list(requests(coming))
    engine = VirtualEngine(
        Watched(VirtualClock(), COST), config, policy=PrefillFirst(), recorder=Recorder(), fast_forward=leaps, told=False
    )
    replay(engine, those)
    return [(one.first_scheduled, one.first_token, one.finished, len(one.output), one.preemptions) for one in those], engine


@pytest.mark.parametrize(("blocks", "preempts"), [(400, False), (24, True)])
def test_everybody_ends_and_leaps_change_nothing(blocks: int, preempts: bool) -> None:
    coming = list(arrivals(poisson(8.0, 3), fixed(60, 40), 60))
    leapt, engine = served(coming, blocks)
    stepped, _ = served(coming, blocks, leaps=False)
    assert leapt == stepped
    assert {row[3] for row in leapt} == {40}
    assert (engine.stats.preemptions > 0) is preempts


def test_answers_stand_still_while_a_prompt_is_computed() -> None:
    """A prompt of 1,000 tokens comes in the second decode of another: 105 ms are added to that answer, and no more."""
    rows, _ = served([Arrival(0, 10, 4), Arrival(20 * MS, 1000, 2)], 400, max_batch_tokens=2048)
    first = 6 * MS
    decode, pair = round(10.1 * MS), round(10.2 * MS)
    assert rows[0][1] == first
    assert rows[1][1] == first + 2 * decode + 105 * MS
    assert rows[0][2] == first + 2 * decode + 105 * MS + pair


def test_a_prompt_beyond_the_budget_runs_alone() -> None:
    rows, _ = served([Arrival(0, 100, 2), Arrival(0, 900, 2), Arrival(0, 100, 2)], 400, max_batch_tokens=512)
    assert [row[1] for row in rows] == [15 * MS, 110 * MS, 125 * MS]
