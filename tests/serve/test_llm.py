"""`LLM`: prompts in, answers out, in order; the pool and the context are settled within what the machine and the model have."""

import os
import threading

import pytest
import torch
from models import VOCABULARY, greedy, loaded, tiny

from armillary.core.errors import CapacityError, InputError
from armillary.serve.config import EngineConfig
from armillary.serve.kv_pool import available_memory, settle
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture(scope="module")
def decoder():
    return tiny(seed=3)


@pytest.fixture(scope="module")
def llm(decoder):
    return LLM(loaded(decoder, TEMPLATE), kv_blocks=32, block_size=4, max_batch_tokens=16)


def test_answers_are_the_plain_loops_in_the_order_of_the_prompts(llm, decoder):
    prompts = [[1, 2, 3], list(range(40, 60)), [9], "HELLO", [5] * 7]
    done = []
    answers = llm.generate(prompts, GREEDY, progress=lambda count, total: done.append((count, total)))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [ord(letter) for letter in prompt] if isinstance(prompt, str) else prompt
        tokens, gap = greedy(decoder, ids, 8)
        assert gap > 1e-3
        assert answer.prompt_tokens == tuple(ids)
        assert answer.prompt == (prompt if isinstance(prompt, str) else None)
        assert list(answer.tokens) == tokens
        assert answer.text == "".join(chr(token) for token in tokens if token != VOCABULARY - 1)
        assert answer.finish_reason == "length"
        assert answer.logprobs == ()
    assert done == [(count, 5) for count in range(1, 6)]


def test_one_prompt_is_a_list_of_one(llm):
    together = llm.generate([[72, 73]], GREEDY)
    assert [answer.tokens for answer in llm.generate([72, 73], GREEDY)] == [answer.tokens for answer in together]
    assert [answer.tokens for answer in llm.generate("HI", GREEDY)] == [answer.tokens for answer in together]
    assert llm.generate([], GREEDY) == []


def test_chat_renders_the_template(llm):
    (one,) = llm.chat("HI", GREEDY)
    assert one.prompt == "U:HI\nA:"
    several = llm.chat(
        [[{"role": "user", "content": "HI"}], [{"role": "system", "content": "X"}, {"role": "user", "content": "Y"}]], GREEDY
    )
    assert several[0].tokens == one.tokens
    assert several[1].prompt == "S:X\nU:Y\nA:"
    with pytest.raises(InputError, match="no chat template"):
        LLM(loaded(tiny()), kv_blocks=4).chat("HI")


def test_each_prompt_may_have_its_own_sampling(llm):
    short, long = llm.generate([[1], [1]], [SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=3), GREEDY])
    assert long.tokens[:2] == short.tokens
    assert [one.token for one in short.logprobs] == list(short.tokens)
    assert all(len(one.top) == 3 for one in short.logprobs)
    with pytest.raises(InputError, match="2 sampling parameters for 1 prompts"):
        llm.generate([[1]], [GREEDY, GREEDY])


def test_stop_strings_end_an_answer(llm):
    (whole,) = llm.generate([[1, 2, 3]], GREEDY)
    stop = whole.text[3:5]
    (cut,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_bad_prompt_leaves_nothing_behind(llm):
    with pytest.raises(InputError, match="context"):
        llm.generate([[1, 2], [3] * 250], GREEDY)
    assert llm.engine.snapshot()["blocks"]["used"] == 0
    assert len(llm.generate([[1, 2]], GREEDY)) == 1


def test_ids_that_the_model_lacks_never_reach_it(llm):
    """The kernels look embeddings up by id: no server stands before this door."""
    for token in (VOCABULARY, -1, 2**31, 2**70):
        with pytest.raises(InputError, match=f"prompt: token {token} is outside the vocabulary of {VOCABULARY}"):
            llm.generate([[1, 2], [3, token]], GREEDY)
        with pytest.raises(InputError, match=f"logit_bias: token {token} is outside"):
            llm.generate([[1, 2]], SamplingParams(max_tokens=3, logit_bias=((token, 1.0),)))
    assert llm.engine.snapshot()["blocks"]["used"] == 0
    assert len(llm.generate([[1, 2]], GREEDY)) == 1


def test_a_failing_request_raises(decoder):
    broken = tiny(seed=3)
    with torch.no_grad():
        broken.embed_tokens.weight[13] = float("nan")
    llm = LLM(loaded(broken), kv_blocks=16)
    with pytest.raises(Exception, match="NaN"):
        llm.generate([[1, 2], [13]], GREEDY)
    assert list(llm.generate([[1, 2]], GREEDY)[0].tokens) == greedy(decoder, [1, 2], 8)[0]


def test_it_works_while_its_engine_runs_on_a_thread(decoder):
    llm = LLM(loaded(decoder), kv_blocks=32)
    llm.engine.start()
    try:
        answers = {}
        callers = [threading.Thread(target=lambda i=i: answers.setdefault(i, llm.generate([[i]], GREEDY)[0].tokens)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        llm.engine.stop()
    assert {i: list(tokens) for i, tokens in answers.items()} == {i: greedy(decoder, [i], 8)[0] for i in range(4)}


def test_a_model_that_was_handed_in_keeps_its_weights(decoder):
    LLM(loaded(decoder), kv_blocks=4, backend="torch")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == decoder.config.parameters()


def test_the_pool_is_settled_within_memory_and_use():
    model = tiny().config  # 512 bytes a token, context 256
    default = EngineConfig(max_running=8)
    assert settle(default, model, 10**9).kv_blocks == 8 * 256 // 16  # no more than could ever be filled
    assert settle(default, model, None).kv_blocks == 8 * 256 // 16
    assert settle(default, model, 4 * 512 * 16 * 10).kv_blocks == 10  # a quarter of the free memory
    assert settle(EngineConfig(kv_memory=512 * 16 * 5), model, 10**9).kv_blocks == 5
    assert settle(EngineConfig(kv_blocks=7), model, 10**9).kv_blocks == 7
    assert settle(default, model, 10**9).context == 256
    assert settle(EngineConfig(context=100), model, 10**9).context == 100
    with pytest.raises(InputError, match="context 257"):
        settle(EngineConfig(context=257), model, 10**9)
    with pytest.raises(CapacityError, match="KV pool would take"):
        settle(EngineConfig(kv_blocks=1000), model, 10**6)


def test_memory_is_what_the_container_may_still_take(tmp_path):
    for folder in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/statm").write_text("9000 1000 500 1 0 400 0\n")
    assert available_memory(tmp_path) == 32_000_000 * 1024
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.write_text("2000000000\n")
    assert available_memory(tmp_path) == 2_000_000_000 - 1000 * os.sysconf("SC_PAGE_SIZE")
    limit.write_text("1000000\n")
    assert available_memory(tmp_path) == 0
