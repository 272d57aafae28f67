"""The official openai client against a running server."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
from http_world import GREETING, World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture
def client(world):
    world.typist.delay = 0.0
    world.typist.reply = lambda request: GREETING
    with openai.OpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client
    world.wait_idle()


HELLO = [{"role": "user", "content": "Hi"}]


def chat(client, **fields):
    return client.chat.completions.create(model="typist", messages=fields.pop("messages", HELLO), **fields)


def test_models(client, world):
    assert [model.id for model in client.models.list()] == ["typist"]
    assert client.models.retrieve("typist").max_model_len == 512
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"


def test_a_chat_answer_is_complete_and_counted(client, world):
    answer = chat(client)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == GREETING
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(world.tokenizer.encode(prompt, special=False))
    assert answer.usage.completion_tokens == len(GREETING.encode()) + 1  # and the token that ends it
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_what_an_earlier_request_computed_is_reused_within_a_salt_and_counted(client):
    def cached(salt, **more):
        usage = chat(client, messages=[{"role": "user", "content": "a" * 100}], extra_body={"cache_salt": salt}, **more).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    first, length = cached("one")
    assert first == 0
    assert cached("one") == ((length - 1) // 16 * 16, length)
    assert cached("two", n=3) == (0, length)
    assert cached("two", n=3) == ((length - 1) // 16 * 16, length)


def test_text_parts_are_joined(client, world):
    world.typist.reply = lambda request: world.tokenizer.decode(request.prompt)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb\n" in chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content


def test_the_stream_is_the_answer_in_pieces(client):
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert all("�" not in (chunk.choices[0].delta.content or "") for chunk in chunks)


def test_usage_comes_last_when_asked_for(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(GREETING.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_wire_format_of_a_stream(world):
    body = {"messages": HELLO, "stream": True, "max_tokens": 2}
    response = world.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-1] == ""
    assert lines[-2] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-2])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "said"), [("wörld", "Hello, "), (["zzz", "ld!"], "Hello, wör"), ("never said", GREETING)])
def test_stop_strings_end_the_answer_before_them(client, stream, stop, said):
    if stream:
        chunks = list(chat(client, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        answer = chat(client, stop=stop)
        assert answer.choices[0].message.content == said
        assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_bounds_the_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{name: 5})
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5


def test_without_a_bound_an_answer_may_fill_the_context(client, world):
    world.typist.reply = lambda request: "x" * 10_000
    answer = chat(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == world.service.context


def test_n_choices_each_with_its_own_seed(client, world):
    seeds = []
    world.typist.reply = lambda request: seeds.append(request.sampling.seed) or f"choice {request.sampling.seed}"
    answer = chat(client, n=3, seed=40)
    assert [choice.message.content for choice in answer.choices] == ["choice 40", "choice 41", "choice 42"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in chat(client, n=3, seed=40, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["choice 40", "choice 41", "choice 42"]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_spell_the_answer(client, stream):
    if stream:
        chunks = list(chat(client, logprobs=True, top_logprobs=3, stream=True))
        content = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    else:
        content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == GREETING
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)
    assert content[0].token == "H"
    assert content[8].token == "bytes:\\xc3"  # the first half of ö is no character


def test_logprobs_without_alternatives(client):
    content = chat(client, logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [(entry.token, entry.top_logprobs) for entry in content] == [("H", []), ("e", []), ("l", [])]


def test_completions_of_every_kind_of_prompt(client, world):
    world.typist.reply = lambda request: "<" + world.tokenizer.decode(request.prompt) + ">"
    ids = world.tokenizer.encode("abc", special=False)
    for prompt in ("abc", ["abc"], ids, [ids]):
        answer = client.completions.create(model="typist", prompt=prompt)
        assert [choice.text for choice in answer.choices] == ["<abc>"]
    answer = client.completions.create(model="typist", prompt=["a", "bc"], n=2)
    assert [choice.text for choice in answer.choices] == ["<a>", "<a>", "<bc>", "<bc>"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 3


def test_completions_default_to_sixteen_tokens(client):
    answer = client.completions.create(model="typist", prompt="x")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(client, stream):
    prompt = "né 1"
    answer = client.completions.create(model="typist", prompt=prompt, max_tokens=4, echo=True, logprobs=2, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        columns = {
            name: [value for part in parts for value in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    else:
        text, columns = answer.choices[0].text, answer.choices[0].logprobs.model_dump()
    assert text == prompt + "Hell"
    assert columns["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", " ", "1", "H", "e", "l", "l"]
    assert columns["token_logprobs"] == [None] + [-0.25] * 8
    assert columns["top_logprobs"][0] is None
    assert all(
        top[token] == -0.25 and len(top) == 2 for token, top in list(zip(columns["tokens"], columns["top_logprobs"], strict=True))[1:]
    )
    assert columns["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6, 7]


def test_scoring_alone_generates_nothing(client):
    answer = client.completions.create(model="typist", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.25, -0.25]
    assert answer.usage.completion_tokens == 0
    single = client.completions.create(model="typist", prompt="a", max_tokens=0, echo=True, logprobs=1)
    assert single.choices[0].logprobs.token_logprobs == [None]


def test_sampling_fields_reach_the_engine(client, world):
    seen = []
    world.typist.reply = lambda request: seen.append(request.sampling) or "ok"
    chat(
        client,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1.5,
        frequency_penalty=-1.0,
        seed=7,
        stop=["a", "bb"],
        logit_bias={"5": -100, "3": 2.5},
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": False, "stop_token_ids": [9]},
    )
    params = seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.05)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.5, -1.0, 1.1)
    assert (params.seed, params.stop, params.stop_token_ids) == (7, ("a", "bb"), (9,))
    assert params.logit_bias == ((3, 2.5), (5, -100.0))


def test_ignored_fields_are_named(client):
    raw = client.chat.completions.with_raw_response.create(model="typist", messages=HELLO, user="me", metadata={"a": "b"})
    assert raw.headers["x-armillary-ignored"] == "metadata, user"


def test_an_answer_can_be_sent_back_as_history(client):
    message = chat(client).choices[0].message
    chat(client, messages=[*HELLO, message.model_dump(), {"role": "user", "content": "again"}])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**9}, "n", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 5}, "stop", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "invalid_value"),
        ({"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_bad_fields_are_refused_by_name(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **fields)
    assert (error.value.param, error.value.code, error.value.type) == (param, code, "invalid_request_error")
    assert param.partition("[")[0] in error.value.message


def test_the_closest_field_is_named(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        chat(client, extra_body={"temprature": 1})


def test_a_prompt_over_the_context_is_refused_with_both_numbers(client, world):
    with pytest.raises(openai.BadRequestError, match=r"600 tokens.*512") as error:
        client.completions.create(model="typist", prompt="x" * 600)
    assert error.value.code == "context_length_exceeded"
    before = world.engine.stats.iterations
    with pytest.raises(openai.BadRequestError, match="512"):
        chat(client, messages=[{"role": "user", "content": "y" * 100_000}])
    assert world.engine.stats.iterations == before


def test_closing_a_stream_frees_its_request_and_blocks(client, world):
    world.typist.delay = 0.01
    world.typist.reply = lambda request: "z" * 10_000
    cancelled = world.engine.stats.finished["cancelled"]
    stream = chat(client, stream=True)
    for _, chunk in zip(range(5), stream, strict=False):
        assert chunk.choices
    assert world.engine.snapshot()["blocks"]["used"] > 0
    stream.close()
    world.wait_idle()
    assert world.engine.stats.finished["cancelled"] == cancelled + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_before_the_first_token_cancels_all_its_choices(world, stream):
    world.typist.delay = 0.02
    world.typist.reply = lambda request: "z" * 10_000  # longer than any cancelling takes
    cancelled = world.engine.stats.finished["cancelled"]

    async def ask(impatient):
        answer = await impatient.chat.completions.create(model="typist", messages=HELLO, n=3, stream=stream)
        if stream:
            async for _ in answer:
                pass

    async def hang_up():
        async with openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0) as impatient:
            call = asyncio.create_task(ask(impatient))
            # The choices wait for the first to have computed their prompt, which the typist holds up.
            while (state := world.engine.snapshot())["running"] + state["waiting"] < 3:
                await asyncio.sleep(0.005)
            call.cancel()
            await asyncio.wait([call])

    with world.typist.hold():
        asyncio.run(hang_up())
    world.wait_idle()
    assert world.engine.stats.finished["cancelled"] == cancelled + 3


def test_an_error_in_the_engine_reaches_the_client_and_only_it(client, world):
    for stream in (False, True):
        world.typist.failure = RuntimeError("a secret of the machine")
        with pytest.raises(openai.APIError) as error:
            list(chat(client, stream=stream))
        assert "secret" not in str(error.value)
    assert chat(client).choices[0].message.content == GREETING


def test_thirty_two_streams_at_once_each_get_their_own_text(client, world):
    world.typist.reply = lambda request: "echo " + world.tokenizer.decode(request.prompt)

    async def one(async_client, number):
        stream = await async_client.completions.create(model="typist", prompt=f"stream {number}", max_tokens=64, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0) as async_client:
            return await asyncio.gather(*(one(async_client, number) for number in range(32)))

    assert asyncio.run(all_of_them()) == [f"echo stream {number}" for number in range(32)]


def test_minus_infinity_is_written_as_a_number(world):
    from armillary.serve.http.logprobs import chat_entry
    from armillary.serve.request import TokenLogprob

    entry = chat_entry(world.tokenizer, TokenLogprob(1, -math.inf, ((2, -math.inf),)))
    assert entry["logprob"] == -9999.0
    assert entry["top_logprobs"][0]["logprob"] == -9999.0
