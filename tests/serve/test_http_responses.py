"""The official openai client against /v1/responses."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from http_world import GREETING, World

from armillary.core.errors import NotFoundError
from armillary.serve.http.response_store import ResponseStore, StoredResponse


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


def respond(client, **fields):
    return client.responses.create(model="typist", **{"input": "Hi", **fields})


def prompts(world):
    """From now on the typist writes down what it was asked."""
    seen = []
    world.typist.reply = lambda request: (
        GREETING if request.output else seen.append(world.tokenizer.decode(request.prompt, skip_special=False)) or GREETING
    )
    return seen


def turns(*pairs):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs) + "<|im_start|>assistant\n"


def test_a_response_is_complete_counted_and_kept(client, world):
    answer = respond(client, instructions="Be kind.", metadata={"a": "b"}, temperature=0.5)
    assert (answer.object, answer.status, answer.output_text) == ("response", "completed", GREETING)
    assert [(item.type, item.role, item.status) for item in answer.output] == [("message", "assistant", "completed")]
    length = len(world.tokenizer.encode(turns(("system", "Be kind."), ("user", "Hi")), special=False))
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (length, len(GREETING.encode()) + 1)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be kind.", {"a": "b"}, 0.5)
    assert client.responses.retrieve(answer.id) == answer
    again = respond(client, instructions="Be kind.")
    assert again.usage.input_tokens_details.cached_tokens == (length - 1) // 16 * 16


def test_the_streams_events_come_in_order_and_numbered(client):
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == GREETING == events[-4].text
    assert events[-3].part == events[-2].item.content[0] == events[-1].response.output[0].content[0]
    assert client.responses.retrieve(events[0].response.id) == events[-1].response
    assert events[0].response.status == "in_progress"


def test_the_clients_own_stream_helper_understands_it(client):
    with client.responses.stream(model="typist", input="Hi") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == GREETING


def test_the_wire_names_events_and_has_no_done(world):
    text = world.http.post("/v1/responses", json={"input": "Hi", "stream": True, "max_output_tokens": 3}).text
    frames = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in text.strip().split("\n\n")]
    assert all(json.loads(frame["data"])["type"] == frame["event"] for frame in frames)
    assert frames[-1]["event"] == "response.incomplete"


def test_a_bound_makes_it_incomplete_and_says_why(client):
    answer = respond(client, max_output_tokens=5)
    assert (answer.status, answer.incomplete_details.reason, answer.output_text) == ("incomplete", "max_output_tokens", "Hello")
    assert answer.output[0].status == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_spell_the_answer(client, stream):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    if stream:
        events = list(respond(client, stream=True, **fields))
        entries = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
        assert "".join(entry.token for entry in entries[:5]) == "Hello"
        assert [entry.model_dump() for entry in events[-4].logprobs] == [entry.model_dump() for entry in entries]
        final = events[-1].response
    else:
        final = respond(client, **fields)
    entries = final.output[0].content[0].logprobs
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == GREETING
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 2 for entry in entries)


def test_a_conversation_goes_on_with_calls_and_their_outputs(client, world):
    seen = prompts(world)
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Ulm"}'}
    first = respond(
        client, input=[{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}, call], instructions="Be kind."
    )
    second = respond(client, previous_response_id=first.id, input=[{"type": "function_call_output", "call_id": "c1", "output": "rain"}])
    respond(client, previous_response_id=second.id, input="Thanks", instructions="Be brief.")
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    talk = [("user", "Weather?"), ("assistant", called)]
    assert seen[0] == turns(("system", "Be kind."), *talk)
    talk += [("assistant", GREETING), ("user", "<tool_response>\nrain\n</tool_response>")]
    assert seen[1] == turns(*talk)  # instructions are not carried over
    assert seen[2] == turns(("system", "Be brief."), *talk, ("assistant", GREETING), ("user", "Thanks"))


def test_output_items_can_be_sent_back_as_input(client, world):
    seen = prompts(world)
    first = respond(client)
    respond(
        client,
        input=[{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output], {"role": "user", "content": "go on"}],
    )
    respond(client, previous_response_id=first.id, input="go on")
    assert seen[1] == seen[2] == turns(("user", "Hi"), ("assistant", GREETING), ("user", "go on"))


def test_what_is_not_stored_or_was_deleted_is_not_there(client):
    forgotten = respond(client, store=False)
    deleted = respond(client)
    client.responses.delete(deleted.id)
    for name in (forgotten.id, deleted.id, "resp-nonsense"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError) as error:
            respond(client, previous_response_id=name)
        assert (error.value.code, error.value.param) == ("previous_response_not_found", "previous_response_id")


def test_input_items_are_listed_in_pages(client):
    answer = respond(client, input=[{"role": "user", "content": str(number)} for number in range(5)])
    listed = [item.content[0].text for item in client.responses.input_items.list(answer.id, limit=2, order="asc")]
    assert listed == list("01234")
    assert [item.content[0].text for item in client.responses.input_items.list(answer.id)] == list("43210")


def test_a_response_in_the_background_is_asked_for_and_cancelled(client, world):
    with world.typist.hold():
        kept, dropped = (respond(client, background=True) for _ in range(2))
        assert client.responses.retrieve(kept.id).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="still being written"):
            respond(client, previous_response_id=kept.id)
        assert client.responses.cancel(dropped.id).status == "cancelled"
    world.wait_idle()
    while (answer := client.responses.retrieve(kept.id)).status == "in_progress":
        pass
    assert (answer.status, answer.output_text) == ("completed", GREETING)
    assert client.responses.cancel(dropped.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.responses.cancel(kept.id)


def test_a_stream_that_is_cancelled_says_so_and_one_that_is_left_is_cancelled(client, world):
    world.typist.delay = 0.01
    world.typist.reply = lambda request: "z" * 10_000
    stream = respond(client, stream=True)
    name = next(iter(stream)).response.id
    client.responses.cancel(name)
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    left = respond(client, stream=True)
    name = next(iter(left)).response.id
    left.close()
    world.wait_idle()
    while client.responses.retrieve(name).status == "in_progress":
        pass
    assert client.responses.retrieve(name).status == "cancelled"


def test_hanging_up_cancels_a_whole_response(world):
    world.typist.delay = 0.01
    world.typist.reply = lambda request: "z" * 10_000
    cancelled = world.engine.stats.finished["cancelled"]

    async def hang_up():
        async with openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0) as impatient:
            call = asyncio.create_task(impatient.responses.create(model="typist", input="Hi"))
            while not world.engine.snapshot()["running"]:
                await asyncio.sleep(0.005)
            call.cancel()
            await asyncio.wait([call])

    asyncio.run(hang_up())
    world.wait_idle()
    assert world.engine.stats.finished["cancelled"] == cancelled + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_an_error_or_the_last_event(client, world, stream):
    world.typist.failure = RuntimeError("a secret of the server")
    if stream:
        last = list(respond(client, stream=True))[-1]
        assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
        assert "secret" not in last.to_json()
    else:
        with pytest.raises(openai.InternalServerError):
            respond(client)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "judge", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "extra": 1}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 3}, "body"),
        ({"background": True, "stream": True}, "body"),
        ({"background": True, "store": False}, "body"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"extra_body": {"max_tokens": 5}}, "max_tokens"),
        ({"extra_body": {"inptu": "x"}}, "inptu"),
        ({"max_output_tokens": 10_000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"previous_response_id": "x" * 129}, "previous_response_id"),
    ],
)
def test_bad_fields_are_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, **fields)
    assert error.value.param == (None if param == "body" else param)


def test_queries_that_are_not_carried_out_are_refused(client):
    answer = respond(client)
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(client.responses.retrieve(answer.id, stream=True))


def test_the_store_keeps_the_latest_within_both_bounds():
    def stored(name, size=0):
        return StoredResponse({"id": name}, [], ({"content": "x" * size},), lambda: None)

    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name in "abc":
        store.keep(stored(name))
    store.get("a")
    store.keep(stored("d"))
    assert [name for name in "abcd" if _has(store, name)] == ["a", "c", "d"]
    store.keep(stored("e", 950))
    assert [name for name in "acde" if _has(store, name)] == ["e"]
    store.keep(stored("f", 2000))
    assert len(store) == 0
    for name in "abc":
        store.keep(stored(name))
        store.delete(name)
    assert (len(store), store._bytes) == (0, 0)


def _has(store, name):
    try:
        return bool(store.get(name))
    except NotFoundError:
        return False


def test_an_answer_follows_the_format_that_was_asked_for(tmp_path):
    from test_http_models import tiny

    world = World(tmp_path, loaded=tiny(tmp_path))
    try:
        with openai.OpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
            schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
            text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
            answer = client.responses.create(model="tiny", input="Hi", text=text, temperature=0)
            assert json.loads(answer.output_text)["a"] in (1, 2)
            assert answer.text.format.schema_ == schema
    finally:
        world.close()
