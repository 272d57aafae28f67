"""Real models behind the server: what comes over the wire is what the plainest loop computes."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import openai
import pytest
import torch
from http_world import TEMPLATE, World, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention import CausalAttend
from armillary.models.chat_template import ChatTemplate
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.load import LoadedModel, load
from armillary.models.stored import DecoderWeights

PROMPTS = ["The stars", "né 👋", "a", "Count: 1 2 3 4", "x" * 40, "\n\n", "Rings within rings", "0"]


def plain_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab] in one pass, without cache or batch."""
    with torch.inference_mode():
        return decoder(torch.tensor(tokens), torch.arange(len(tokens)), CausalAttend([len(tokens)])).float()


def plain_greedy(decoder: Decoder, prompt: list[int], count: int, stop: frozenset[int]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(plain_logits(decoder, tokens)[-1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def tiny(folder: Path, max_context: int = 256) -> LoadedModel:
    """Two layers of random weights over single bytes."""
    tokenizer = byte_tokenizer(folder)
    torch.manual_seed(5)
    config = ModelConfig("llama", tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, max_context=max_context)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return LoadedModel("tiny", config, DecoderWeights(decoder), tokenizer, ChatTemplate(TEMPLATE, tokenizer), folder, "a tiny random model")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def real(request, tmp_path_factory):
    """(server, the decoder that nobody touched)."""
    folder = tmp_path_factory.mktemp("real")
    loaded = load("smollm2") if request.param == "smollm2" else tiny(folder)
    decoder = copy.deepcopy(loaded.decoder)
    world = World(folder, loaded=loaded, config={"max_batch_tokens": 64, "kv_blocks": 512})
    yield world, decoder
    world.close()


@pytest.fixture
def client(real):
    world, _ = real
    with openai.OpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client
    world.wait_idle()


def spoken(tokenizer, tokens: list[int]) -> str:
    """The text of an answer: without the token that ended it."""
    return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in tokenizer.stop_ids else tokens)


def test_greedy_answers_are_the_plain_loops_streamed_or_whole_alone_or_together(real):
    world, decoder = real
    tokenizer, count = world.tokenizer, 12
    wanted = [spoken(tokenizer, plain_greedy(decoder, tokenizer.encode(prompt), count, tokenizer.stop_ids)) for prompt in PROMPTS]

    async def whole(client, prompt):
        answer = await client.completions.create(model=world.service.model_name, prompt=prompt, max_tokens=count, temperature=0)
        return answer.choices[0].text

    async def streamed(client, prompt):
        chunks = await client.completions.create(
            model=world.service.model_name, prompt=prompt, max_tokens=count, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def together():
        async with openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(way(client, prompt) for way in (whole, streamed) for prompt in PROMPTS))

    assert asyncio.run(together()) == wanted * 2


def test_chat_is_the_template_continued(real, client):
    world, decoder = real
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hello."}]
    prompt = world.tokenizer.encode(world.service.loaded.chat_template.render(messages), special=False)
    answer = client.chat.completions.create(model=world.service.model_name, messages=messages, max_tokens=16, temperature=0)
    tokens = plain_greedy(decoder, prompt, 16, world.tokenizer.stop_ids)
    assert answer.choices[0].message.content == spoken(world.tokenizer, tokens)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.choices[0].finish_reason == ("stop" if tokens[-1] in world.tokenizer.stop_ids else "length")


def test_echoed_logprobs_are_the_models_own(real, client):
    world, decoder = real
    text = "The rings of the sphere turn, né?" + " again" * 20  # over one chunk of the prompt
    tokens = world.tokenizer.encode(text)
    answer = client.completions.create(model=world.service.model_name, prompt=text, max_tokens=4, temperature=0, echo=True, logprobs=3)
    columns = answer.choices[0].logprobs
    everything = tokens + plain_greedy(decoder, tokens, 4, world.tokenizer.stop_ids)
    logprobs = plain_logits(decoder, everything).log_softmax(-1)
    wanted = [logprobs[i - 1, everything[i]].item() for i in range(1, len(columns.tokens))]
    assert columns.token_logprobs[0] is None
    assert columns.token_logprobs[1:] == pytest.approx(wanted, abs=1e-3)
    for position, top in list(enumerate(columns.top_logprobs))[1:]:
        assert max(top.values()) == pytest.approx(logprobs[position - 1].max().item(), abs=1e-3)
    for offset, name in zip(columns.text_offset, columns.tokens, strict=True):
        assert name.startswith("bytes:") or answer.choices[0].text.startswith(name, offset)


def test_a_seed_gives_the_same_answer_and_each_choice_its_own(real, client):
    def ask(**fields):
        answer = client.completions.create(model=real[0].service.model_name, prompt="Once", max_tokens=12, temperature=1.0, **fields)
        return [choice.text for choice in answer.choices]

    first = ask(seed=11, n=3)
    assert ask(seed=11, n=3) == first
    assert len(set(first)) == 3
    assert ask(seed=12) == first[1:2]  # choice 1 of seed 11 draws from seed 12


def test_a_seeded_answer_does_not_depend_on_what_else_is_served(real):
    world, _ = real
    fields = {"model": world.service.model_name, "max_tokens": 12, "temperature": 1.0, "logprobs": 2}

    async def ask(client, prompt, seed):
        choice = (await client.completions.create(prompt=prompt, seed=seed, **fields)).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    async def among(others):
        async with openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=120) as client:
            company = [ask(client, "x" * (3 + 5 * number), None) for number in range(others)]
            return (await asyncio.gather(*company, ask(client, "The stars", 7)))[-1]

    text, logprobs = asyncio.run(among(0))
    for others in (1, 6):
        again, scores = asyncio.run(among(others))
        assert again == text
        assert scores == pytest.approx(logprobs, abs=1e-4)


def test_a_banned_token_is_never_said(real, client):
    world, decoder = real
    prompt = world.tokenizer.encode("The stars")
    best = plain_greedy(decoder, prompt, 1, frozenset())[0]
    answer = client.completions.create(
        model=world.service.model_name, prompt=prompt, max_tokens=8, temperature=0, logit_bias={str(best): -100}, logprobs=0
    )
    from armillary.serve.http.logprobs import token_name

    assert token_name(world.tokenizer, best) not in answer.choices[0].logprobs.tokens


def test_hanging_up_frees_the_cache(real, client):
    world, _ = real
    cancelled = world.engine.stats.finished["cancelled"]
    fields = {"model": world.service.model_name, "prompt": "Go on", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**fields, n=2, stream=True) as stream:
        next(iter(stream))
        assert world.engine.snapshot()["blocks"]["used"] > 0
    world.wait_idle(60)
    assert world.engine.stats.finished["cancelled"] == cancelled + 2


extremes = {
    "temperature": st.sampled_from([0, 1e-300, 1e-6, 1e-4, 0.7, 2]) | st.floats(0, 2),
    "top_p": st.sampled_from([1e-300, 1e-9, 0.5, 1]) | st.floats(0, 1, exclude_min=True),
    "top_k": st.sampled_from([-1, 0, 1, 2, 10**9]),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.sampled_from([0.01, 10]) | st.floats(0.01, 10),
    "seed": st.sampled_from([0, 2**63 - 1]),
    "n": st.integers(1, 3),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "ignore_eos": st.booleans(),
    "stop": st.sampled_from(["a", ["\n", "é"], "zz"]),
    "logit_bias": st.dictionaries(st.integers(0, 255).map(str), st.floats(-100, 100), max_size=5),
    "max_tokens": st.integers(1, 6),
}


def test_every_setting_within_its_range_is_carried_out(tmp_path):
    world = World(tmp_path, loaded=tiny(tmp_path))

    @settings(max_examples=150, deadline=None)
    @given(st.fixed_dictionaries({}, optional=extremes))
    def ask(fields):
        response = world.http.post("/v1/completions", json={"prompt": "The stars", **fields})
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            assert choice["finish_reason"] in ("stop", "length")
            for logprob in (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]:
                assert logprob is None or -9999 <= logprob <= 0

    ask()
    world.wait_idle()
    world.close()
