"""Drafts in virtual time: the closed forms of speculation, memory given back, and the passes of the real draft model."""

import random

import pytest
import torch

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.executors.forward import Logits
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.policies import routing
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.acceptance import Acceptance, Observed, measured, parse
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.drafts import Drafting, VirtualProposer
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.speculation.draft_model import DraftModel
from armillary.serve.speculation.formulas import best_length, expected_tokens, speedup
from armillary.sim.batch import Batch
from armillary.sim.costs import Decoding, Linear

TARGET, DRAFT = Linear("target", 1e6, 0, 0, Decoding(1e6, 0, 0)), Linear("draft", 1e5, 0, 0, Decoding(1e5, 0, 0))
SLOPED = Linear("target", 9e6, 60e3, 50, Decoding(9e6, 50, 60e3)), Linear("draft", 1e6, 6e3, 5, Decoding(1e6, 5, 6e3))
VOCABULARY = 50


class Always:
    """A drafter of `length` tokens, whatever comes of them."""

    def __init__(self, proposer, length):
        self.name, self._proposer, self._length = proposer.name, proposer, length
        self.laws, self.forget = proposer.laws, proposer.forget

    def propose(self, requests, most):
        self._proposer.prepare(requests)
        return self._proposer.propose(requests, [min(self._length, bound) for bound in most])

    def verified(self, request, drafted, accepted): ...

    def ran(self, tokens, duration): ...


def engine(acceptance, *, target=TARGET, draft=DRAFT, length=None, drawn=None, recorder=None, trace=None, clock=None, **options):
    """With drafts of `length`, or of as many as pay."""
    config = EngineConfig(**{"kv_blocks": 4000, "speculate": "ngram", "draft_tokens": 16, **options})
    clock = clock if clock is not None else VirtualClock()
    drafter = Drafting(acceptance, draft).drafter(config, clock, drawn)
    if length is not None:
        drafter = Always(drafter._proposer, length)
    return VirtualEngine(VirtualExecutor(clock, target, drawn), config, drafter=drafter, recorder=recorder, trace=trace)


def asked(count, answer=400, prompt=5, gap=0):
    return [Request(f"r{i}", (7,) * prompt, SamplingParams(answer, ignore_eos=True), arrival=i * gap) for i in range(count)]


@pytest.mark.parametrize(("rate", "length"), [(0.3, 2), (0.7, 4), (0.9, 8)])
def test_tokens_a_pass_and_the_gain_are_leviathans(rate, length):
    """Equation 1 and theorem 3.8, where verifying costs what computing one token does."""
    one = engine(Acceptance((rate,)), length=length, max_running=1)
    requests = asked(4, 1000)
    replay(one, requests)
    passes = one.stats.iterations - len(requests)
    assert sum(len(request.output) - 1 for request in requests) / passes == pytest.approx(expected_tokens(rate, length), rel=0.03)
    took = sum(request.finished - request.first_token for request in requests)
    alone = 999 * 1e6 * len(requests)
    assert alone / took == pytest.approx(speedup(rate, length, 0.1), rel=0.03)


def test_rates_by_place():
    acceptance = parse("0.9,0.5,0.8@0.6")
    assert (acceptance.expected(0), str(acceptance)) == (1.0, "0.9,0.5,0.8@0.6")
    assert acceptance.expected(4) == pytest.approx(1 + 0.6 * (0.9 + 0.45 + 0.36 + 0.288))
    one = engine(acceptance, draft=None, length=4, max_running=1)
    requests = asked(4, 1000)
    replay(one, requests)
    tokens = sum(len(request.output) - 1 for request in requests) / (one.stats.iterations - len(requests))
    assert tokens == pytest.approx(acceptance.expected(4), rel=0.03)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_engine_finds_the_length_that_pays(rate):
    """It knows neither the rate nor the costs, and estimates both from what it sees: as fast as the best fixed length, but for a twentieth."""
    best = best_length(rate, 0.1, 16)
    took = []
    for length in (best, None):
        requests = asked(3, 1000)
        replay(engine(Acceptance((rate,)), length=length, max_running=1), requests)
        took.append(sum(request.finished - request.first_token for request in requests))
    assert took[1] < 1.05 * took[0]


def test_drafting_stops_where_it_cannot_pay():
    """But for tries, in case the answer changes: they cost less than a twentieth."""
    one = engine(Acceptance((0.02,)), max_running=1)
    [request] = asked(1, 1000)
    replay(one, [request])
    assert request.finished - request.first_token < 1.05 * 999e6


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "orca", "request-level"])
def test_what_refused_drafts_took_is_given_back(policy):
    one = engine(Acceptance((0.5,)), length=6, policy=policy, block_size=4, kv_blocks=60, max_running=5, max_batch_tokens=64)
    requests = asked(12, 60, prompt=20, gap=10**6)
    bound = []
    for request in requests:
        one.submit(request)
    while one.step():
        one.check()
        bound += [len(request.blocks) - -(-(request.known + 6) // 4) for request in requests if request.blocks]
    if policy in ("sarathi", "vllm"):  # the others take the blocks of the whole answer
        assert max(bound) <= 0
    assert one.free_blocks == 60
    assert one.stats.accepted_tokens < one.stats.drafted_tokens
    assert all(len(request.output) == 60 for request in requests)


def test_a_seed_gives_the_same_again_and_a_cluster_of_one_is_the_engine():
    found = []
    for seed, together in ((1, False), (1, True), (2, False)):
        trace = Trace()
        one = engine(Acceptance((0.6,)), target=SLOPED[0], draft=SLOPED[1], seed=seed, trace=trace, max_running=4)
        requests = asked(20, 50, prompt=200, gap=40_000_000)
        Cluster([one], routing.get("round-robin")).run(requests) if together else replay(one, requests)
        found.append((trace.spans(), [(request.first_scheduled, request.finished) for request in requests]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_better_workload_takes_fewer_iterations_token_by_token():
    counts = []
    for rate in (0.2, 0.5, 0.8, 1.0):
        one = engine(Acceptance((rate,)), length=4, max_running=1)
        replay(one, asked(1, 600))
        counts.append(one.stats.iterations)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1 + -(-599 // 5)


def test_who_comes_while_drafts_are_drawn_is_in_time():
    """A draft of 4 tokens takes 0.4 ms after the first token at 1 ms: who comes at 1.2 ms is in the iteration from 1.4 ms on."""
    for together in (False, True):
        one = engine(Acceptance((1.0,)), length=4)
        first, second = Request("a", (1, 2), SamplingParams(50, ignore_eos=True)), Request("b", (3, 4), SamplingParams(1, ignore_eos=True))
        first.arrival, second.arrival = 0, 1_200_000
        Cluster([one], routing.get("round-robin")).run([first, second]) if together else replay(one, [first, second])
        assert second.first_scheduled == 1_400_000 + 100_000 * (second.first_scheduled != 1_400_000)


class Drawn:
    """Tokens by place; a draft model knows them but at every seventh place, where it is wrong."""

    @staticmethod
    def token(request, position):
        return (3 * position + len(request.prompt)) % (VOCABULARY - 1)

    found = 1.0

    def right(self, request, position, place, seed, again):
        return bool(position % 7)

    def proposed(self, request, seed, again):
        return True


class Stub:
    """A draft model's forward without a model: it takes what `cost` says, and notes what it computed."""

    def __init__(self, clock, cost, requests):
        self.clock, self.cost, self.requests, self.passes = clock, cost, requests, []

    def logits(self, batch):
        pieces = [(span.count, span.start) for span in batch.spans]
        single = [start for count, start in pieces if count == 1]
        found = Batch(tuple(piece for piece in pieces if piece[0] > 1), len(single), sum(single), len(batch.rows))
        self.passes.append(found)
        self.clock.advance(self.cost.iteration(found))
        values = torch.zeros(len(batch.rows), VOCABULARY)
        for row, place in enumerate(batch.rows):
            # Whose a row is shows in the tokens: the prompt's length is part of each.
            position, token = batch.positions[place], batch.tokens[place]
            request = next(r for r in self.requests if token - Drawn.token(r, position) in (0, 1))
            wanted = Drawn.token(request, position + 1)
            values[row, wanted if (position + 1) % 7 else wanted + 1] = 1.0
        return Logits(values)


class Noting:
    def __init__(self, cost):
        self.cost, self.name, self.passes = cost, cost.name, []

    def iteration(self, batch):
        self.passes.append(batch)
        return self.cost.iteration(batch)


@pytest.mark.parametrize("blocks", [400, 60])
def test_the_passes_are_those_of_the_real_draft_model(blocks):
    """The same engine with `speculation.draft_model` and in its place the virtual proposer: the same passes of the draft model, the same times."""
    generator = random.Random(3)
    found = []
    for real in (True, False):
        clock = VirtualClock()
        generator.seed(3)
        requests = []
        for number in range(6):
            prompt = tuple(generator.randrange(9) for _ in range(100 * number + 2 * number + 3))
            requests.append(
                Request(f"r{number}", prompt, SamplingParams(40, temperature=0.0, ignore_eos=True), arrival=number * 30_000_000)
            )
        config = EngineConfig(kv_blocks=400, block_size=8, speculate="model", draft_model="none", max_batch_tokens=256)
        if real:
            cost = Stub(clock, SLOPED[1], requests)
            proposer = DraftModel("draft", cost, num_blocks=blocks, block_size=8, context=480, seed=0, deterministic=True)
        else:
            cost = Noting(SLOPED[1])
            proposer = VirtualProposer(
                "draft", Drawn(), clock, cost=cost, num_blocks=blocks, block_size=8, context=480, drawn=Drawn.token
            )  # fmt: skip
        one = VirtualEngine(VirtualExecutor(clock, SLOPED[0], Drawn.token), config, drafter=Adaptive(proposer, 5, clock))
        replay(one, requests)
        found.append((cost.passes, [(request.finished, request.drafted, request.accepted) for request in requests]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    assert any(batch.prompts and batch.prompts[0][0] == 2 for batch in found[1][0])  # what full acceptance leaves unread


def test_an_acceptance_is_measured():
    alone = [[(4, 0)], [(2, 1)], [(1, 1)], [(4, 4)], [(0, 0)] * 4]
    assert measured(alone) == Acceptance((3 / 4, 1 / 2, 1.0), 0.5)
    assert measured([]) == Acceptance((0.0,))
    after = measured([[(2, 2), (2, 2), (2, 0), (0, 0)]])
    assert after == Acceptance((1.0,), 0.5, Acceptance((0.5, 1.0)))
    assert parse(str(after)) == after
    real = Acceptance((0.5,), 0.4, Acceptance((0.9,), 0.95))
    one = engine(real, draft=None, draft_tokens=2)
    observed = one.drafter = Observed(one.drafter)
    replay(one, asked(3, 1500))
    found = measured(observed.passes.values(), places=1)
    assert (found.rates[0], found.found) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.4, abs=0.05))
    assert (found.again.rates[0], found.again.found) == (pytest.approx(0.9, abs=0.03), pytest.approx(0.95, abs=0.03))


def test_texts_that_repeat_themselves_for_a_while():
    acceptance = Acceptance((0.5,), 0.4, Acceptance((0.9,), 0.95))
    one = engine(acceptance, draft=None, length=3, max_running=1)
    requests = asked(5, 1500)
    replay(one, requests)
    tokens = sum(len(request.output) - 1 for request in requests) / (one.stats.iterations - len(requests))
    assert tokens == pytest.approx(acceptance.expected(3), rel=0.05)


@pytest.mark.parametrize("text", ["", "1.5", "0.5,,0.5", "often", "0.5@2", "0.5@", "0.5+0.5+0.5", "0.5+"])
def test_what_is_no_acceptance(text):
    with pytest.raises(InputError, match=r"accept|shares from 0 to 1"):
        parse(text)
