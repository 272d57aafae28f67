"""The prefix cache: what it finds is there, what it shares is right, and nobody loses by it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Lawful, TableExecutor, plain_loop, request

from armillary.serve import policies
from armillary.serve.block_pool import BlockPool
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.prefix_cache import PrefixCache


def make(policy="sarathi", *, eos=(), **config):
    config = {"kv_blocks": 400, "block_size": 16} | config
    executor = TableExecutor(config["block_size"])
    return Engine(executor, EngineConfig(**config), clock=executor.clock, eos_ids=eos, policy=Lawful(policies.get(policy)))


def served(engine, name, prompt, max_tokens=1, salt="", **sampling):
    made = request(name, prompt, max_tokens, **sampling)
    made.cache_salt = salt
    engine.submit(made)
    engine.run_until_idle()
    return made


@pytest.mark.parametrize("policy", policies.names())
def test_few_shot_questions_reuse_their_preamble(policy):
    """A preamble of 256 tokens and 16 questions of 16: 15 * 256 of 4,352 tokens are reused, 88.24 % (SGLang's example)."""
    engine = make(policy)
    preamble = range(256)
    reused = [served(engine, number, [*preamble, *([number] * 16)]).reused for number in range(16)]
    assert reused == [0] + [256] * 15
    assert round(100 * engine.stats.reused_tokens / engine.stats.prompt_tokens, 2) == 88.24
    assert "256 of them from the prefix cache" in engine.explain("15")[1]


def test_a_conversation_reuses_its_own_answers():
    engine, turns = make(), list(range(40))
    for number in range(4):
        made = served(engine, number, turns, max_tokens=30)
        assert made.output == plain_loop(turns, 30, eos=())
        computed = len(turns) + 29  # the last token drawn is never computed
        turns += [*made.output, 5, 6, 7]
        assert served(engine, f"again {number}", turns).reused == computed // 16 * 16


def test_at_least_one_token_is_computed_and_only_whole_blocks_are_reused():
    engine = make()
    for length, expected in ((32, 0), (32, 16), (33, 32), (31, 16), (16, 0), (17, 16)):
        assert served(engine, f"{length} {expected} {engine.stats.iterations}", range(length)).reused == expected


def test_tenants_share_nothing():
    engine = make()
    assert served(engine, "a", range(100), salt="one").reused == 0
    assert served(engine, "b", range(100), salt="two").reused == 0
    assert served(engine, "c", range(100)).reused == 0
    assert served(engine, "d", range(100), salt="two").reused == 96


def test_a_prompt_whose_probabilities_are_asked_for_is_computed():
    engine = make()
    served(engine, "a", range(100))
    assert served(engine, "b", range(100), prompt_logprobs=1).reused == 0


def test_switched_off_it_reuses_nothing():
    engine = make(prefix_cache="off")
    served(engine, "a", range(100))
    assert served(engine, "b", range(100)).reused == 0
    assert engine.stats.reused_tokens == 0


def test_the_end_of_a_sequence_goes_before_its_beginning():
    engine = make(kv_blocks=8)
    served(engine, "old", range(64))
    served(engine, "big", range(100, 190))  # 6 of 8 blocks: two of the old four stay
    assert served(engine, "back", range(64)).reused == 32


def test_an_iteration_that_fails_leaves_nothing_behind():
    engine = make()
    engine.executor.fail = True
    assert served(engine, "a", range(100)).finish_reason == "error"
    assert served(engine, "b", range(100)).reused == 0


@given(st.integers(1, 5), st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_hits_are_those_of_a_dictionary_of_prefixes(size, seed):
    draw = random.Random(seed)
    pool = BlockPool(2_000, size)
    cache, known = PrefixCache(pool), set()
    for number in range(30):
        made = request(number, [draw.randrange(2) for _ in range(draw.randint(1, 20))], 4)
        tokens = made.prompt
        longest = max((end for end in range(0, len(tokens), size) if tokens[:end] in known), default=0)
        hit = cache.hit(made)
        assert (hit.tokens, len(hit.blocks)) == (longest, longest // size)
        pool.share(hit.blocks)
        made.blocks = [*hit.blocks, *pool.allocate(-(-len(tokens) // size) - len(hit.blocks))]
        made.computed, made.kept = draw.randint(hit.tokens, len(tokens)), len(hit.blocks)
        cache.keep(made, made.computed)
        known |= {tokens[:end] for end in range(size, made.computed + 1, size)}
        if draw.random() < 0.7:
            pool.free(made.blocks)
        pool.check()


@pytest.mark.parametrize("policy", policies.names())
@given(st.integers(0, 1 << 30))
@settings(max_examples=25)
def test_answers_are_those_of_the_plain_loop_whatever_is_shared_preempted_and_cancelled(policy, seed):
    draw = random.Random(seed)
    size = draw.choice([1, 2, 4, 16])
    stems = [[draw.randrange(50) for _ in range(draw.randint(0, 40))] for _ in range(3)]
    requests = []
    for number in range(draw.randint(2, 24)):
        prompt = draw.choice(stems)[: draw.randint(0, 40)] + [draw.randrange(50) for _ in range(draw.randint(1, 6))]
        requests.append(request(number, prompt, draw.randint(1, 12)))
        requests[-1].cache_salt = draw.choice(["", "", "other"])
    blocks = -(-max(made.max_length for made in requests) // size) + draw.randint(0, 20)
    engine = make(policy, eos=(7,), block_size=size, kv_blocks=blocks, max_batch_tokens=draw.randint(1, 64), max_running=draw.randint(1, 8))
    waiting, cancelled = list(requests), set()
    while waiting or engine.snapshot()["requests"]:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop(0))
        engine.step()
        engine.check()
        if draw.random() < 0.05:
            victim = draw.choice(requests)
            if engine.cancel(victim.id):
                cancelled.add(victim.id)
    for made in requests:
        if made.id not in cancelled:
            assert made.output == plain_loop(made.prompt, made.sampling.max_tokens)
    engine.check()
    assert engine.snapshot()["blocks"]["used"] == 0


def test_what_is_kept_can_be_reached_though_it_was_computed_twice():
    engine = make(kv_blocks=12, block_size=4)
    twins = [request(name, range(24), 1) for name in "ab"]
    for made in twins:  # admitted together: both compute all of it
        engine.submit(made)
    engine.run_until_idle()
    assert [made.reused for made in twins] == [0, 0]
    assert engine.snapshot()["blocks"]["kept"] == 6
    served(engine, "a stranger", range(30, 55), max_tokens=1)  # 7 blocks: one of the six goes, the last
    assert served(engine, "c", range(24)).reused == 20


def test_a_salt_may_be_any_string():
    engine = make()
    assert served(engine, "a", range(40), salt="\ud800").finish_reason == "length"
    assert served(engine, "b", range(40), salt="\ud800").reused == 32
    assert served(engine, "c", range(40), salt="\ud801").reused == 0


def test_a_policy_that_does_not_reach_a_request_does_not_look_for_it():
    engine = make(max_running=1)
    looked = []
    engine._memory.hit = lambda made, hit=engine._memory.hit: looked.append(made.id) or hit(made)
    for name in ("runs", "waits"):
        engine.submit(request(name, range(40), 5))
    engine.step()
    engine.step()
    assert set(looked) == {"runs"}
