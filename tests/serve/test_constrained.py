"""Answers that follow a grammar: the tokens of the plainest masked loop, however they are scheduled, drafted and preempted."""

from __future__ import annotations

import re

import pytest
import torch
from models import VOCABULARY, loaded, logits_of, tiny

pytest.importorskip("xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): constrained answers are NOT tested")

from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.grammar import grammar as grammars
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.llm import LLM, build_engine
from armillary.serve.request import Request, SamplingParams

PATTERN = r'\[("KEY-[A-Z]{1,3}": [0-9]{1,4}, ){2,4}"THE END"\]'
FREE = r"[A-Z ]{5,30}"
PROMPTS = [[1, 2, 3], list(range(30, 60)), [7] * 9, list(b"HELLO"), list(range(40, 44))]
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def decoder():
    return tiny(seed=11, num_layers=4)


@pytest.fixture(scope="module")
def compiler(decoder):
    return GrammarCompiler(loaded(decoder).tokenizer, VOCABULARY)


@pytest.fixture(scope="module")
def expected(decoder, compiler):
    """Tokens by recomputing everything for each, under a fresh mask; and how far the best allowed logit was ahead."""
    results = {}
    for pattern in (PATTERN, FREE):
        for prompt in PROMPTS:
            matcher, known, gap = compiler.compile(grammars.regex(pattern)).matcher(), list(prompt), float("inf")
            while not matcher.finished and len(known) - len(prompt) < GREEDY.max_tokens:
                words = matcher.mask()[0]
                allowed = torch.tensor([bool(int(words[token // 32]) >> token % 32 & 1) for token in range(VOCABULARY)])
                logits = logits_of(decoder, known)[-1].masked_fill(~allowed, -torch.inf)
                best = logits.topk(2).values
                gap = min(gap, (best[0] - best[1]).item())
                known.append(int(logits.argmax()))
                matcher.accept(known[-1])
            results[pattern, tuple(prompt)] = tuple(known[len(prompt) :])
            assert gap > 1e-4
    return results


CASES = {
    "plain": {},
    "torch": {"backend": "torch"},
    "one at a time": {"max_running": 1},
    "chunks": {"max_batch_tokens": 5},
    "preemption": {"kv_blocks": 44},
    "no prefix cache": {"prefix_cache": "off"},
    "vllm": {"policy": "vllm", "max_batch_tokens": 64},
    "orca": {"policy": "orca", "max_batch_tokens": 64},
    "request-level": {"policy": "request-level", "max_batch_tokens": 64},
    "n-gram": {"speculate": "ngram"},
    "half the layers": {"speculate": "layers"},
    "asynchronous": {"async_scheduling": "on"},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_plain_loops(decoder, expected, name):
    llm = LLM(loaded(decoder), **{"kv_blocks": 160, "block_size": 4, "max_batch_tokens": 32, **CASES[name]})
    for pattern in (PATTERN, FREE):
        answers = llm.generate(PROMPTS, GREEDY, grammar=grammars.regex(pattern))
        assert [answer.tokens for answer in answers] == [expected[pattern, tuple(prompt)] for prompt in PROMPTS]
        for answer in answers:
            assert re.fullmatch(pattern, answer.text)
            assert answer.finish_reason == "stop"
    if name == "preemption":
        assert llm.engine.stats.preemptions > 0
    state = llm.engine.features["grammar"]() if "grammar" in llm.engine.features else None
    assert (state is None) == (name == "asynchronous")
    if state is not None:
        # Of these, single characters are all that the vocabulary has: what is forced is what is drawn.
        assert state["forced"] == state["accepted"] > 50
        assert llm.engine.stats.iterations < sum(map(len, expected.values()))
    llm.engine.check()


@pytest.mark.parametrize("speculate", ["off", "ngram"])
def test_seeded_draws_are_the_same_with_drafts_and_without(decoder, speculate):
    seeded = [SamplingParams(max_tokens=100, temperature=1.3, top_p=0.9, seed=seed, logprobs=2) for seed in range(5)]
    grammar = grammars.regex(PATTERN)
    without = LLM(loaded(decoder), kv_blocks=160, block_size=4, async_scheduling="on").generate(PROMPTS, seeded, grammar=grammar)
    with_drafts = LLM(loaded(decoder), kv_blocks=160, block_size=4, speculate=speculate).generate(PROMPTS, seeded, grammar=grammar)
    assert [answer.tokens for answer in without] == [answer.tokens for answer in with_drafts]
    assert len({answer.text for answer in without}) > 1
    assert [len(answer.logprobs) for answer in with_drafts] == [len(answer.tokens) for answer in with_drafts]


def test_constrained_and_free_answers_in_one_batch(decoder, compiler, expected):
    compiled = compiler.compile(grammars.regex(PATTERN))
    free = LLM(loaded(decoder), kv_blocks=160, block_size=4).generate(PROMPTS, GREEDY)
    engine = build_engine(loaded(decoder), EngineConfig(kv_blocks=160, block_size=4), keep_weights=True)
    requests = [
        Request(f"{kind}{index}", tuple(prompt), GREEDY, constraint=compiled.matcher() if kind else None)
        for index, prompt in enumerate(PROMPTS)
        for kind in ("", "g")
    ]
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    assert [tuple(request.output) for request in requests[::2]] == [answer.tokens for answer in free]
    assert [tuple(request.output) for request in requests[1::2]] == [expected[PATTERN, tuple(prompt)] for prompt in PROMPTS]


def test_choices_of_one_prompt_each_follow_the_grammar_by_themselves(decoder, compiler):
    compiled = compiler.compile(grammars.regex(PATTERN))
    outputs = []
    for forked in (True, False):
        engine = build_engine(loaded(decoder), EngineConfig(kv_blocks=160, block_size=4), keep_weights=True)
        sampling = [SamplingParams(max_tokens=100, temperature=1.5, seed=seed) for seed in range(4)]
        requests = [Request(f"r{i}", (1, 2, 3, 4, 5), one, constraint=compiled.matcher()) for i, one in enumerate(sampling)]
        for request in requests[1:]:
            request.parent = requests[0] if forked else None
        for request in requests:
            engine.submit(request)
        engine.run_until_idle()
        texts = ["".join(map(chr, request.output)) for request in requests]
        assert all(re.fullmatch(PATTERN, text) for text in texts)
        assert len(set(texts)) == 4
        outputs.append(texts)
    assert outputs[0] == outputs[1]


def test_an_answer_that_is_cut_off_says_so(decoder):
    (answer,) = LLM(loaded(decoder), kv_blocks=40, block_size=4).generate(
        [[1, 2]], SamplingParams(max_tokens=9, temperature=0.0), grammar=grammars.regex(PATTERN)
    )
    assert (answer.finish_reason, len(answer.tokens), answer.text[:6]) == ("length", 9, '["KEY-')


def test_the_end_of_text_ends_an_answer_only_where_the_grammar_lets_it(decoder):
    llm = LLM(loaded(decoder), kv_blocks=80, block_size=4)
    (answer,) = llm.generate(
        [[1, 2]], SamplingParams(max_tokens=40, temperature=0.0, logit_bias=((VOCABULARY - 1, 100.0),)), grammar=grammars.regex("A{3,9}")
    )
    assert (answer.text, answer.finish_reason, answer.tokens[-1]) == ("AAA", "stop", VOCABULARY - 1)


def test_what_has_no_end_cannot_follow_a_grammar(decoder):
    with pytest.raises(InputError, match="ignore_eos") as caught:
        LLM(loaded(decoder), kv_blocks=40).generate([[1]], SamplingParams(max_tokens=4, ignore_eos=True), grammar=grammars.regex("A*"))
    assert caught.value.field == "ignore_eos"
