"""The official anthropic client against /v1/messages."""

from __future__ import annotations

import anthropic
import pytest
from http_world import GREETING, World

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"), api_key="s3cret")
    yield world
    world.close()


@pytest.fixture
def client(world):
    world.typist.delay = 0.0
    world.typist.reply = lambda request: GREETING
    with anthropic.Anthropic(base_url=world.url, api_key="s3cret", max_retries=0, timeout=30) as client:
        yield client
    world.wait_idle()


def ask(client, **fields):
    return client.messages.create(**{"model": "typist", "max_tokens": 100, "messages": HELLO, **fields})


def prompted(client, world, **fields):
    """What the model was given."""
    seen = []
    world.typist.reply = lambda request: seen.append(world.tokenizer.decode(request.prompt, skip_special=False)) or ""
    ask(client, **fields)
    return seen[0]


def turns(*pairs):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs) + "<|im_start|>assistant\n"


def test_a_message_is_complete_and_counted(client, world):
    answer = ask(client, extra_body={"temperature": 0.5, "top_k": 3, "seed": 1}, metadata={"user_id": "me"})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "typist")
    assert [(block.type, block.text) for block in answer.content] == [("text", GREETING)]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    length = len(world.tokenizer.encode(turns(("user", "Hi")), special=False))
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == length
    assert answer.usage.output_tokens == len(GREETING.encode()) + 1
    again = ask(client)
    assert again.usage.cache_read_input_tokens == (length - 1) // 16 * 16
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == length


def test_how_an_answer_ends(client):
    bounded = ask(client, max_tokens=5)
    assert (bounded.content[0].text, bounded.stop_reason) == ("Hello", "max_tokens")
    stopped = ask(client, stop_sequences=["never", "wörld"])
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("Hello, ", "stop_sequence", "wörld")


def test_the_streams_events_come_in_order(client):
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == GREETING
    assert (events[0].message.content, events[0].message.stop_reason) == ([], None)
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == len(GREETING.encode()) + 1


def test_the_clients_own_stream_helper_understands_it(client):
    with client.messages.stream(model="typist", max_tokens=100, messages=HELLO, stop_sequences=["!"]) as stream:
        assert "".join(stream.text_stream) == "Hello, wörld"
        assert stream.get_final_message().stop_sequence == "!"


def test_system_and_blocks_and_turns_become_the_templates_conversation(client, world):
    text = prompted(
        client,
        world,
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "c"}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}, {"type": "text", "text": "d"}],
            },
        ],
    )
    called = 'c\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
    result = "<tool_response>\nError: no\n</tool_response>"
    assert text == turns(("system", "Be kind.\nBe brief."), ("user", "a\nb"), ("assistant", called), ("user", result), ("user", "d"))


def test_a_last_assistant_turn_is_continued(client, world):
    messages = [*HELLO, {"role": "assistant", "content": "Hello, w"}]
    assert prompted(client, world, messages=messages) == turns(("user", "Hi")) + "Hello, w"


def test_tokens_are_counted_as_they_would_be_sent(client, world):
    counted = client.messages.count_tokens(model="typist", messages=HELLO, system="Be kind.").input_tokens
    assert counted == len(world.tokenizer.encode(turns(("system", "Be kind."), ("user", "Hi")), special=False))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "context is 512"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "surprise": 1}]}]}, "surprise"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x "}]}, "white space"),
        ({"messages": [{"role": "user", "content": []}]}, "no turn says anything"),
        ({"stop_sequences": [" "]}, "white space"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"extra_body": {"max_tokns": 1}}, "did you mean 'max_tokens'"),
    ],
)
def test_bad_fields_are_refused_by_name_in_anthropics_shape(client, fields, named):
    with pytest.raises(anthropic.BadRequestError, match=named) as error:
        ask(client, **fields)
    assert (error.value.body["type"], error.value.body["error"]["type"]) == ("error", "invalid_request_error")


def test_other_errors_have_anthropics_shape_too(client, world):
    with pytest.raises(anthropic.NotFoundError) as error:
        ask(client, model="claude")
    assert error.value.body["error"]["type"] == "not_found_error"
    with (
        anthropic.Anthropic(base_url=world.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as error,
    ):
        ask(stranger)
    assert error.value.body["error"]["type"] == "authentication_error"
    assert "wrong" not in str(error.value).replace("is wrong", "")
    world.typist.failure = RuntimeError("a secret of the server")
    with pytest.raises(anthropic.InternalServerError) as error:
        ask(client)
    assert error.value.body["error"]["type"] == "api_error"
    world.typist.failure = RuntimeError("a secret of the server")
    with pytest.raises(anthropic.APIError) as error:
        list(ask(client, stream=True))
    assert "secret" not in str(error.value)


def test_ignored_fields_are_named(client):
    raw = client.messages.with_raw_response.create(model="typist", max_tokens=5, messages=HELLO, metadata={"user_id": "me"})
    assert raw.headers["x-armillary-ignored"] == "metadata"


def test_leaving_a_stream_frees_its_request(client, world):
    world.typist.delay = 0.01
    world.typist.reply = lambda request: "z" * 10_000
    cancelled = world.engine.stats.finished["cancelled"]
    with ask(client, stream=True, max_tokens=400) as stream:
        next(iter(stream))
    world.wait_idle()
    assert world.engine.stats.finished["cancelled"] == cancelled + 1
