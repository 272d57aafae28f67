"""KV policies in the engine: streams without end in constant memory, page selection under every schedule, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from models import VOCABULARY, loaded, tiny

from armillary.core.errors import FormatError, InputError
from armillary.kernels import cpu_library
from armillary.kernels.seen import Seen
from armillary.models.load import load
from armillary.serve import kv_policies
from armillary.serve.config import EngineConfig
from armillary.serve.executors.pattern_search import find_patterns, load_patterns, save_patterns
from armillary.serve.fleet.build import share
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.llm import LLM, build_engine
from armillary.serve.request import Request, SamplingParams

needs_native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")
BACKENDS = ("torch", pytest.param("native", marks=needs_native))
DECODER = tiny(seed=3)


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY - 1) for _ in range(length)] for length in lengths]


def answers(asked: list[list[int]], count: int, **options: object) -> list[tuple[int, ...]]:
    llm = LLM(loaded(DECODER), **{"kv_blocks": 200, "threads": 1, **options})
    sampling = [SamplingParams(max_tokens=count, temperature=0.8, seed=i, ignore_eos=True) for i in range(len(asked))]
    found = [answer.tokens for answer in llm.generate(asked, sampling)]
    llm.engine.check()
    return found


STREAMING = {"kv_policy": "streaming", "kv_sinks": 4, "kv_window": 40, "prefix_cache": "off"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_passes_the_context_in_constant_memory(backend: str) -> None:
    """A prompt of twice the model's context and an answer beyond it: blocks in use never exceed the policy's bound, and all are given back."""
    config = EngineConfig(**STREAMING, backend=backend, kv_blocks=12, max_batch_tokens=32, block_size=8, threads=1)
    engine = build_engine(loaded(DECODER), config, keep_weights=True)
    bound = config.kv.most_blocks
    assert bound == 1 + 9 + 2
    (prompt,) = prompts(0, 520)
    request = Request("stream", tuple(prompt), SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
    engine.submit(request)
    used = []
    while engine.step():
        used.append(engine.snapshot()["blocks"]["used"])
        engine.check()
    assert len(request.output) == 90
    assert request.finish_reason == "length"
    assert max(used) <= bound
    assert used[-1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_do_not_depend_on_the_schedule(backend: str) -> None:
    """Chunks, company, another policy, and a pool in which sequences are thrown out and computed anew."""
    asked = prompts(1, 150, 30, 301, 77)
    roomy = answers(asked, 40, **STREAMING, backend=backend, max_batch_tokens=64)
    assert answers(asked, 40, **STREAMING, backend=backend, policy="vllm", kv_blocks=14, max_batch_tokens=48) == roomy
    assert [answers([one], 40, **STREAMING, backend=backend, max_batch_tokens=512)[0] for one in asked[:1]] == roomy[:1]
    if backend == "native":
        assert answers(asked, 40, **STREAMING, backend=backend, speculate="ngram", draft_tokens=3) == roomy


@needs_native
def test_a_window_that_holds_everything_is_full_attention() -> None:
    asked = prompts(2, 60, 20)
    wide = {"kv_policy": "streaming", "kv_sinks": 4, "kv_window": 252, "prefix_cache": "off", "backend": "native"}
    assert answers(asked, 50, **wide) == answers(asked, 50, backend="native")


@needs_native
def test_a_real_stream_needs_its_sinks() -> None:
    """SmolLM2, 64 tokens of memory, 256 of the licence: without the first tokens the loss leaps, four bring it back (table 1)."""
    model = load("smollm2")
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    tokens = model.tokenizer.encode(text, special=False)[:256]
    means = []
    for sinks in (0, 4):
        kept = {"kv_policy": "streaming", "kv_sinks": sinks, "kv_window": 64 - sinks, "prefix_cache": "off"}
        llm = LLM(model, **kept, backend="native", kv_blocks=40, max_batch_tokens=128)
        (answer,) = llm.generate([tokens], SamplingParams(max_tokens=0, prompt_logprobs=0))
        losses = [-one.logprob for one in answer.request.prompt_logprobs if one is not None and one.logprob is not None]
        assert len(losses) == 255
        means.append(sum(losses[100:]) / 155)
    assert means[0] > means[1] + 0.25


H2O = {"kv_policy": "h2o", "kv_budget": 24, "kv_window": 24, "prefix_cache": "off", "backend": "torch"}


def test_heavy_hitters_hold_their_budget_under_every_schedule() -> None:
    """Blocks in use stay at the budget's and one; chunks, company and lost blocks change no token; a budget of all is dense."""
    asked = prompts(5, 120, 30, 77)
    roomy = answers(asked, 30, **H2O, max_batch_tokens=64)
    assert answers(asked, 30, **H2O, policy="vllm", kv_blocks=8, max_batch_tokens=40) == roomy
    assert answers(asked, 30, **{**H2O, "kv_budget": 300}) == answers(asked, 30, backend="torch") != roomy
    config = EngineConfig(**H2O, kv_blocks=4, block_size=16)
    assert config.kv.most_blocks == 4
    engine = build_engine(loaded(DECODER), config, keep_weights=True)
    request = Request("long", tuple(prompts(6, 200)[0]), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    engine.submit(request)
    engine.run_until_idle()
    assert len(request.output) == 40


def test_sparse_prompts_follow_the_patterns_of_a_file(tmp_path: Path) -> None:
    """Found on a text, saved, served: a budget of everything is dense, a small one is not, and company changes nothing."""
    (text,) = prompts(7, 200)
    kinds, recalls = find_patterns(DECODER, text, sinks=4, local=16, budget=64)
    assert [len(layer) for layer in kinds] == [DECODER.config.num_heads] * DECODER.config.num_layers
    assert all(0 < recall <= 1 + 1e-5 for layer in recalls for recall in layer)
    file = tmp_path / "patterns.json"
    save_patterns(file, kinds)
    assert load_patterns(file, DECODER.config) == kinds
    options = {
        "kv_policy": "minference",
        "kv_sinks": 2,
        "kv_window": 4,
        "prefix_cache": "off",
        "backend": "torch",
        "kv_patterns": str(file),
    }
    asked = prompts(8, 180, 90, 150)
    sparse = answers(asked, 20, **options, kv_budget=64, max_batch_tokens=512)
    assert [answers([one], 20, **options, kv_budget=64, max_batch_tokens=512)[0] for one in asked[:1]] == sparse[:1]
    dense = answers(asked, 20, backend="torch")
    assert answers(asked, 20, **options, kv_budget=300) == dense != sparse
    file.write_text('{"patterns": [["spiral"]]}')
    with pytest.raises(FormatError, match=f"is not of {DECODER.config.num_layers} layers"):
        load_patterns(file, DECODER.config)


def test_looked_up_units_carry_a_sequence_past_the_context() -> None:
    """Twice the model's context is served, company changes nothing, and a window of everything is dense."""
    options = {"kv_policy": "infllm", "kv_window": 128, "kv_budget": 128, "prefix_cache": "off", "backend": "torch"}
    asked = prompts(9, 520, 140, 300)
    found = answers(asked, 12, **options, max_batch_tokens=1024)
    assert answers(asked[:1], 12, **options, max_batch_tokens=1024) == found[:1]
    near = prompts(10, 200, 60)
    assert answers(near, 20, **{**options, "kv_window": 256}) == answers(near, 20, backend="torch")


QUEST = {"kv_policy": "quest", "kv_budget": 32, "kv_dense_layers": 1, "backend": "native"}


@needs_native
def test_selected_pages_do_not_depend_on_the_schedule() -> None:
    """Chunks, preemption, prefix hits, refused drafts: the same tokens, and others than dense attention's."""
    stem, *rest = prompts(3, 90, 20, 31, 64)
    asked = [[*stem, *one] for one in rest]
    alone = answers(asked, 40, **QUEST, prefix_cache="off", max_batch_tokens=512)
    assert answers(asked, 40, **QUEST, max_batch_tokens=24) == alone
    assert answers(asked, 40, **QUEST, policy="vllm", kv_blocks=15, max_batch_tokens=40) == alone
    assert answers(asked, 40, **QUEST, speculate="ngram", draft_tokens=4) == alone
    assert answers(asked, 40, **{**QUEST, "kv_budget": 1024}) == answers(asked, 40, backend="native") != alone


@pytest.mark.parametrize(("budget", "always"), [(32, (0, 1)), (48, (1, 1)), (1024, (1, 16))])
def test_quest_always_reads_the_first_page_and_the_last_quarter(budget: int, always: tuple[int, int]) -> None:
    kv = EngineConfig(kv_policy="quest", kv_budget=budget, kv_dense_layers=3, backend="native").kv
    assert kv.seen == Seen(budget // 16, *always, dense_layers=3)


@needs_native
def test_a_later_prompt_does_not_take_an_answers_selected_keys() -> None:
    """The second turn begins with the first and its answer: what the prefix cache gives it is what it would compute alone."""
    (first,) = prompts(4, 100)
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    llm = LLM(loaded(DECODER), kv_blocks=200, threads=1, **QUEST)
    (answer,) = llm.generate([first], sampling)
    (second,) = llm.generate([[*first, *answer.tokens, 5]], sampling)
    assert second.request.reused == 96
    (alone,) = LLM(loaded(DECODER), kv_blocks=200, threads=1, prefix_cache="off", **QUEST).generate([[*first, *answer.tokens, 5]], sampling)
    assert second.tokens == alone.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_policy": "sparse"}, "kv_policy 'sparse' is unknown"),
        ({"kv_policy": "quest", "backend": "torch"}, "kv_policy quest has no kernels in the torch backend"),
        ({"kv_policy": "quest", "block_size": 24}, "a KV block of 24 is not whole pages"),
        ({"kv_policy": "quest", "kv_budget": 16}, "kv_budget 16 is less than"),
        ({"kv_policy": "streaming"}, "the prefix cache keeps whole beginnings"),
        ({**STREAMING, "kv_sinks": 600}, "kv_sinks is 600"),
        ({**STREAMING, "policy": "orca"}, "policy orca computes a prompt in one iteration"),
        ({"kv_policy": "h2o", "backend": "native"}, "kv_policy h2o has no kernels in the native backend"),
        ({**H2O, "backend": "auto", "kv_dtype": "int8"}, "kv_dtype needs the native backend, and kv_policy h2o"),
        ({"kv_policy": "infllm"}, "looks up what a piece of a prompt reads"),
        ({"kv_policy": "infllm", "prefix_cache": "off", "block_size": 24}, "KV blocks of 24 do not fill one"),
        ({"kv_policy": "minference"}, "so its keys are no other prompt's"),
        ({"kv_patterns": "x.json"}, "has no use for kv_patterns"),
        ({**H2O, "speculate": "ngram"}, "cannot take back what a refused draft has left"),
        ({**STREAMING, "speculate": "layers"}, "speculate layers fills a cache of its own"),
    ],
)
def test_what_cannot_be_together_is_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_a_stream_is_not_handed_over_between_prefill_and_decode_workers() -> None:
    with pytest.raises(InputError, match="prefill workers hand over all blocks"):
        share(EngineConfig(**STREAMING), DECODER.config, FleetConfig(prefill_workers=1, decode_workers=1), None, 2)


def test_what_no_query_sees_is_what_may_be_dropped() -> None:
    """For every position: what is kept begins within a block of the window's bound, and nothing is dropped that somebody still sees."""
    for block_size in (1, 8, 16):
        for sinks in (0, 4, 19):
            seen, before = Seen(sinks=sinks, rolling=50), 0
            for position in range(400):
                first, dropped = seen.first(position, block_size), seen.droppable(position, block_size)
                assert dropped >= before
                before = dropped
                if position < sinks + 50:
                    assert first == 0
                if first:
                    assert position + 1 - 50 - block_size < first <= position + 1 - 50
                    assert (dropped + -(-sinks // block_size)) * block_size <= max(first, -(-sinks // block_size) * block_size)


def test_the_default_reads_everything() -> None:
    kv = EngineConfig().kv
    assert (kv.name, kv.most_blocks, kv.seen, kv.dropped(10**6), kv.shareable(3, 10)) == ("dense", None, Seen(), 0, 10)
    assert set(kv_policies.names()) >= {"dense", "streaming", "quest"}
