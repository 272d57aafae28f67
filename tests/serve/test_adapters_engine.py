"""Requests with adapters through the whole engine: the tokens of the merged model, whatever shares the batch, the memory or the prefix."""

import random

import pytest
import torch
from adapters import adapter, merged, write
from models import VOCABULARY, greedy, loaded, tiny

from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.kernels import cpu_library
from armillary.serve.config import EngineConfig
from armillary.serve.executors.forward import TakesAdapters
from armillary.serve.llm import LLM, build_engine
from armillary.serve.request import Request, SamplingParams

BACKENDS = ("torch", *(("native",) if cpu_library.available() else ()))
BASE = tiny("llama", seed=11, num_layers=3)
MADE = {"one": adapter(BASE.config, 1, rank=3), "two": adapter(BASE.config, 2, rank=18, parts=("q_proj", "v_proj", "down_proj"))}
EXACT = {None: BASE, **{name: merged(BASE, low) for name, low in MADE.items()}}
COUNT = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(write(root / name, BASE.config, low)) for name, low in MADE.items()}


def llm_of(folders, backend, **options):
    settings = {"kv_blocks": 64, "block_size": 4, "max_batch_tokens": 64, "backend": backend, "lora": folders, "weight_cache": "off"}
    return LLM(loaded(BASE), **settings | options)


def prompts_of(count, seed=0, shared=0, length=11):
    rng = random.Random(seed)
    stem = [rng.randrange(VOCABULARY - 1) for _ in range(shared)]
    return [stem + [rng.randrange(VOCABULARY - 1) for _ in range(rng.randint(2, length))] for _ in range(count)]


def sampling(**changes):
    return SamplingParams(**{"max_tokens": COUNT, "temperature": 0.0, "ignore_eos": True, **changes})


def tokens(completions):
    return [list(completion.tokens) for completion in completions]


def expected(prompts, names):
    found = [greedy(EXACT[name], prompt, COUNT) for prompt, name in zip(prompts, names, strict=True)]
    assert min(gap for _, gap in found) > 1e-3  # else the test is about rounding: choose another seed
    return [tokens for tokens, _ in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "orca"},
        {"max_batch_tokens": 5},  # chunks
        {"kv_blocks": 12, "max_batch_tokens": 16, "max_running": 6},  # preemption
        {"prefix_cache": "off"},
        {"speculate": "ngram"},
        {"speculate": "layers", "draft_layers": 0.7},
        {"async_scheduling": "on"},
        {"kv_blocks": 24, "block_size": 1, "max_running": 3},
    ],
    ids=str,
)
def test_mixed_batches_say_what_the_merged_models_say(folders, backend, options):
    """Several adapters and the base in one batch, prompts that begin alike."""
    prompts = prompts_of(8, seed=3, shared=5, length=5)
    names = ["one", None, "two", "one", None, "two", "two", "one"]
    llm = llm_of(folders, backend, **options)
    answers = llm.generate(prompts, sampling(), lora=names)
    assert tokens(answers) == expected(prompts, names)
    assert llm.engine.snapshot()["features"]["adapters"]["loaded"] == 2
    if options.get("kv_blocks") == 12:
        assert llm.engine.stats.preemptions > 0
    again = llm.generate(prompts, sampling(), lora=list(reversed(names)))  # what others have computed of the same prompt is not theirs
    assert tokens(again) == expected(prompts, list(reversed(names)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_is_reused_by_the_same_adapter_only(folders, backend):
    llm, (prompt,) = llm_of(folders, backend), prompts_of(1, shared=20)
    reused = []
    for name in ("one", "one", None, None, "two", "one"):
        (answer,) = llm.generate([prompt], sampling(), lora=name)
        assert tokens([answer]) == expected([prompt], [name])
        reused.append(answer.request.reused)
    assert [bool(count) for count in reused] == [False, True, False, True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_and_seeds_and_logprobs_are_the_adapters_own(folders, backend):
    """A drawn answer with its log-probabilities, alone and in company, and a choice that shares its parent's prompt."""
    (prompt,) = prompts_of(1, seed=5)
    drawn = sampling(temperature=1.0, seed=7, logprobs=2)
    plain = llm_of({}, backend)
    plain_merged = LLM(loaded(EXACT["one"]), kv_blocks=64, block_size=4, backend=backend, weight_cache="off")
    llm = llm_of(folders, backend)
    (alone,) = plain_merged.generate([prompt], drawn)
    mixed = llm.generate([prompt, prompt, prompt], drawn, lora=["one", None, "two"])
    assert mixed[0].tokens == alone.tokens
    ours, theirs = (torch.tensor([token.logprob for token in answer.logprobs]) for answer in (mixed[0], alone))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert mixed[1].tokens == plain.generate([prompt], drawn)[0].tokens
    engine = llm.engine
    key = engine.adapters.key("one")
    parent = Request("parent", tuple(prompt), drawn, adapter=key)
    child = Request("child", tuple(prompt), sampling(), adapter=key, parent=parent)
    engine.submit(parent)
    engine.submit(child)
    with pytest.raises(InputError, match="different adapters"):
        engine.submit(Request("other", tuple(prompt), drawn, parent=parent))
    engine.run_until_idle()
    assert tuple(parent.output) == alone.tokens
    assert child.output == expected([prompt], ["one"])[0]


def test_new_weights_under_a_name_leave_running_requests_theirs(folders, tmp_path):
    llm, (prompt,) = llm_of(folders, BACKENDS[-1]), prompts_of(1, seed=6)
    engine, store = llm.engine, llm.engine.adapters
    before = Request("before", tuple(prompt), sampling(), adapter=store.key("one"))
    engine.submit(before)
    engine.step()
    engine.step()
    assert before.output
    llm.load_lora("one", write(tmp_path / "new", BASE.config, MADE["two"]))
    after = Request("after", tuple(prompt), sampling(), adapter=store.key("one"))
    engine.submit(after)
    engine.run_until_idle()
    assert [before.output, after.output] == expected([prompt, prompt], ["one", "two"])
    assert after.reused == 0
    state = engine.snapshot()["features"]["adapters"]
    assert state["loaded"] == 2  # the old weights went with their last request
    assert {row["name"]: row["running"] for row in state["adapters"]} == {"one": 0, "two": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_adapters_than_memory_take_turns(folders, backend):
    llm, prompts = llm_of(folders, backend, max_loras=1), prompts_of(2, seed=8)
    for names in (["one", "one"], ["two", None], ["one", "one"]):
        assert tokens(llm.generate(prompts, sampling(), lora=names)) == expected(prompts, names)
    with pytest.raises(CapacityError, match="--max-loras"):
        llm.generate(prompts, sampling(), lora=["one", "two"])
    assert tokens(llm.generate(prompts, sampling(), lora="two")) == expected(prompts, ["two", "two"])
    assert not any(row["running"] for row in llm.engine.snapshot()["features"]["adapters"]["adapters"])


def test_a_cancelled_requests_weights_may_go_in_the_middle_of_an_iteration(folders):
    """The plan names an adapter that has left the memory by the time it is carried out: the others of the batch are computed."""
    llm, prompts = llm_of(folders, BACKENDS[-1], max_loras=2), prompts_of(2, seed=9)
    engine, store, executor = llm.engine, llm.engine.adapters, llm.engine.executor
    gone = Request("gone", tuple(prompts[0]), sampling(), adapter=store.key("one"))
    stays = Request("stays", tuple(prompts[1]), sampling(), adapter=store.key("two"))
    inner = executor.run

    def run(plan):
        executor.run = inner
        engine.cancel("gone")
        store.unload("one")
        return inner(plan)

    executor.run = run
    for request in (gone, stays):
        engine.submit(request)
    engine.run_until_idle()
    assert gone.finish_reason == "cancelled"
    assert stays.output == expected(prompts[1:], ["two"])[0]
    only = Request("only", tuple(prompts[0]), sampling(), adapter=store.key("two"))  # a batch of nothing else

    def run_alone(plan):
        executor.run = inner
        engine.cancel("only")
        store.unload("two")
        return inner(plan)

    executor.run = run_alone
    engine.submit(only)
    engine.run_until_idle()
    assert only.finish_reason == "cancelled"
    assert store.state() == {}
    assert "adapters" not in engine.snapshot()["features"]


def test_what_is_wrong_with_a_name_is_told(folders):
    llm, (prompt,) = llm_of(folders, BACKENDS[-1]), prompts_of(1)
    with pytest.raises(NotFoundError, match="did you mean 'one'"):
        llm.generate([prompt], sampling(), lora="ome")
    with pytest.raises(InputError, match="2 adapters for 1 prompts"):
        llm.generate([prompt], sampling(), lora=["one", "two"])
    with pytest.raises(CapacityError, match="just left"):
        llm.engine.submit(Request("x", tuple(prompt), sampling(), adapter="one#99"))
    llm.unload_lora("two")
    with pytest.raises(NotFoundError):
        llm.generate([prompt], sampling(), lora="two")


def test_an_engine_that_takes_no_adapters_says_so(monkeypatch, folders):
    class Plain:
        """A forward pass without adapters."""

        name, prepared, weight_bytes, cache_bytes = "plain", "", 0, 0

    assert not isinstance(Plain(), TakesAdapters)
    monkeypatch.setattr("armillary.serve.llm.build_forward", lambda *args, **kwargs: Plain())
    with pytest.raises(InputError, match="plain takes no adapters: leave --lora out"):
        build_engine(loaded(BASE), EngineConfig(kv_blocks=8, lora=folders))
    engine = build_engine(loaded(BASE), EngineConfig(kv_blocks=8))
    with pytest.raises(InputError, match="serves none"):
        engine.submit(Request("x", (1, 2), sampling(), adapter="one#1"))


@pytest.mark.parametrize("given", ["sql", "=path", "sql=", ("a=1", "a=2")])
def test_flags_of_adapters_are_names_and_paths(given):
    with pytest.raises(ValueError, match=r"NAME=PATH|twice"):
        EngineConfig(lora=given)
    assert EngineConfig(lora=("a=x=y", "b=z")).lora == EngineConfig(lora={"a": "x=y", "b": "z"}).lora


@pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_with_deterministic_company_and_threads_change_no_bit(folders, quantize):
    prompts, names = prompts_of(5, seed=2), ["one", None, "two", "one", "two"]
    asked = sampling(temperature=0.9, seed=3, logprobs=3)

    def bits(**options):
        llm = llm_of(folders, "native", quantize=quantize, deterministic=True, **options)
        together = llm.generate(prompts, asked, lora=names)
        return [answer.logprobs for answer in together]

    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        (answer,) = llm_of(folders, "native", quantize=quantize, deterministic=True, threads=1).generate([prompt], asked, lora=name)
        alone.append(answer.logprobs)
    assert bits(threads=2) == alone
    assert bits(threads=3, max_batch_tokens=7, kv_blocks=12) == alone
