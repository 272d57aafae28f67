"""What no simulation can beat: a request alone, and the roofline's ceiling of the rate. Both take microseconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from armillary.core.units import format_duration
from armillary.plan.candidates import Candidate
from armillary.plan.demand import Demand, Moments
from armillary.plan.objective import Objective
from armillary.sim.batch import Batch

_CHUNKED: Final = (
    "sarathi",
    "vllm",
)  # policies that cut prompts to the budget; what others do with a prompt takes at least what it takes whole
_ROUNDING: Final = 1.02  # of a mean batch to whole tokens
_FULL: Final = 1 << 16  # tokens of an iteration that nothing else bounds: by then its fixed part is nothing


@dataclass(frozen=True, slots=True)
class Alone:
    """ns, of a candidate that has nothing else to do: the first token of the prompt that the objective's share of the requests do not exceed,
    and one decode that reads almost nothing."""

    first_token: int
    per_token: int

    def misses(self, objective: Objective) -> str | None:
        """Which bound is already out of reach, in words."""
        for key, bound, least in (("ttft", objective.first_token, self.first_token), ("tpot", objective.per_token, self.per_token)):
            if bound is not None and least > bound:
                return f"{key} alone is {format_duration(least)}, and {format_duration(bound)} is asked for"
        return None


def alone(candidate: Candidate, demand: Demand, objective: Objective) -> Alone:
    """A prompt's iterations one after another, and a decode's."""
    scenario = candidate.scenario
    config, context = scenario.settled, scenario.settled.context
    assert scenario.cost is not None
    assert context is not None
    prompt = demand.prompt_at(objective.attainment, context)
    piece = config.max_batch_tokens if config.policy in _CHUNKED else prompt
    first = 0
    for start in range(0, prompt, piece):
        query = min(piece, prompt - start)
        first += scenario.cost.iteration(Batch(((query, start),), sampled=int(start + query == prompt)))
    longest = config.draft_tokens if scenario.acceptance is not None else 0
    return Alone(first, int(scenario.cost.decodes(1, 1, 1)[0]) // (1 + longest))


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Requests a second that a replica cannot exceed, and why: of the iterations a request needs at least (`iterations`, shared with
    others), each takes at least `ns`. `bound` says which limit makes them so many."""

    rate: float
    iterations: float
    ns: int
    bound: str


def ceiling(candidate: Candidate, moments: Moments) -> Ceiling:
    """The rate at which the replica never idles and every iteration is as full as it can be.

    A request shares iterations with at most max_running decodes and max_batch_tokens tokens, and its cache is read while it lies in a pool of
    so many tokens: it takes at least the largest of decodes / max_running, tokens / max_batch_tokens and cached tokens read / pool
    iterations to itself. A cost that is convex in the batch is least for batches that are all alike (Jensen), and for as few of them as can
    be, since each has its fixed part. Cost models with steps may differ a little. Where drafts are verified a decode gives as many tokens as the
    longest drafts are expected to, and drafting is free. Of batches in flight over pipeline stages one ends each time that the slowest stage does.
    """
    scenario = candidate.scenario
    config = scenario.lane
    if scenario.acceptance is not None:
        tokens_a_pass = scenario.acceptance.expected(config.draft_tokens)
        moments = replace(moments, decodes=moments.decodes / tokens_a_pass, read=moments.read / tokens_a_pass)
    if config.kv_policy != "dense":  # it neither keeps nor reads all of that
        moments = replace(moments, read=0.0)
    assert scenario.cost is not None
    assert config.kv_blocks is not None
    pool, tokens = config.kv_blocks * config.block_size, moments.prompt + moments.decodes
    seats = min(config.max_running, config.max_batch_tokens) if config.policy in _CHUNKED else config.max_running
    shares = {
        f"{seats} sequences at a time": moments.decodes / seats,
        f"{pool:,} tokens of KV cache": moments.read / pool,
    }
    if config.policy in _CHUNKED:
        shares[f"{config.max_batch_tokens} tokens an iteration"] = tokens / config.max_batch_tokens
    bound, iterations = max(shares.items(), key=lambda item: item[1])
    iterations = max(iterations, tokens / _FULL)
    batch = _mean_batch(moments, iterations)
    ns = scenario.cost.iteration(batch)
    if scenario.in_flight > 1:
        stages = [stage.ns(batch) for stage in scenario.deployment.stages()]
        ns = round(ns * max(max(stages) / sum(stages), 1 / scenario.in_flight))
    return Ceiling(_ROUNDING * 1e9 / (iterations * ns), iterations, ns, bound)


def _mean_batch(moments: Moments, iterations: float) -> Batch:
    """That of the mean iteration, rounded down. Prompts of equal lengths read the fewest keys."""
    prompt, decodes = int(moments.prompt / iterations), int(moments.decodes / iterations)
    whole, rest = divmod(prompt, max(1, int(moments.prompt)))
    prompts = ((int(moments.prompt), 0),) * whole + (((rest, 0),) if rest else ())
    return Batch(prompts, decodes, int(moments.read / iterations) if decodes else 0, decodes + whole)
