"""Tools through the Responses API and Messages, with the clients' own accumulators: a typist says what is read, and a grammar what is held."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from http_world import World

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'
PING = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): calls are NOT tested")
    world = World(tmp_path_factory.mktemp("typist"), config={"kv_blocks": 1024, "context": 4096}, max_context=4096)
    yield world
    world.close()


def says(world, text):
    """From now on the typist says `text`, and writes down what it was asked."""
    seen = []
    world.typist.reply = lambda request: (
        text if request.output else seen.append(world.tokenizer.decode(request.prompt, skip_special=False)) or text
    )
    return seen


# -- Responses -----------------------------------------------------------------------------------------------------------

WEATHER = {"type": "function", "name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS, "strict": None}
FUNCTIONS = [WEATHER, {"type": "function", "name": "ping", "parameters": None, "strict": None}]


@pytest.fixture
def client(world):
    with openai.OpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
    world.wait_idle()


def respond(client, **fields):
    return client.responses.create(**{"model": "typist", "input": "Weather in Ulm?", "tools": FUNCTIONS, **fields})


def streamed(client, **fields):
    """The last response, and the events that led to it."""
    with client.responses.stream(**{"model": "typist", "input": "Weather in Ulm?", "tools": FUNCTIONS, **fields}) as stream:
        events = list(stream)
    return stream.get_final_response(), events


def written(response):
    """The output as (text) and (name, arguments)."""
    return [(item.name, json.loads(item.arguments)) if item.type == "function_call" else item.content[0].text for item in response.output]


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "required"}, {"tool_choice": "required", "parallel_tool_calls": False}])
def test_calls_are_items_whole_or_streamed(world, client, fields):
    both = fields.get("parallel_tool_calls", True)
    says(world, ("" if fields else "Well, ") + CALL + ("\n" + PING if both else ""))
    expected = [*([] if fields else ["Well, "]), ("weather", {"city": "Ulm", "days": 2}), *([("ping", {})] if both else [])]
    whole, (last, events) = respond(client, **fields), streamed(client, **fields)
    for answer in (whole, last):
        assert (answer.status, written(answer)) == ("completed", expected)
        assert [item.status for item in answer.output] == ["completed"] * len(expected)
        assert len({item.id for item in answer.output}) == len(expected)
        assert [(tool.name, tool.strict) for tool in answer.tools] == [("weather", False), ("ping", False)]
        assert (answer.tool_choice, answer.parallel_tool_calls) == (fields.get("tool_choice", "auto"), both)
    assert client.responses.retrieve(whole.id) == whole
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    for event in done:
        item = last.output[event.output_index]
        assert (event.item_id, event.arguments) == (item.id, item.arguments)
        deltas = [one.delta for one in events if getattr(one, "delta", None) and one.item_id == item.id]
        assert "".join(deltas) == item.arguments
        assert (len(deltas) > 1) == bool(fields)  # held to calls, they are told as they are written
    items = [event for event in events if event.type in ("response.output_item.added", "response.output_item.done")]
    assert [event.output_index for event in items] == sorted([*range(len(expected))] * 2)
    assert [(event.item.id, event.item.status) for event in items[1::2]] == [(item.id, item.status) for item in last.output]
    assert all(event.item.status == "in_progress" and not getattr(event.item, "arguments", "") for event in items[::2])


def test_a_named_function_is_called_once_and_none_is_text(world, client):
    says(world, PING)
    assert written(respond(client, tool_choice={"type": "function", "name": "ping"})) == [("ping", {})]
    assert written(respond(client, tool_choice="none")) == [PING]
    assert written(respond(client, tools=[])) == [PING]


def test_a_conversation_goes_on_after_a_call(world, client):
    says(world, CALL)
    first = respond(client)
    seen = says(world, "It rains.")
    output = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "rain"}
    assert respond(client, previous_response_id=first.id, input=[output]).output_text == "It rains."
    assert respond(client, input=[{"role": "user", "content": "Weather in Ulm?"}, first.output[0].model_dump(), output])
    assert seen[0] == seen[1]
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in seen[0]
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in seen[0]
    with pytest.raises(openai.BadRequestError, match="nothing before it has made"):
        respond(client, input=[output])


def test_a_call_that_is_cut_off_is_incomplete_and_cannot_be_continued(world, client):
    says(world, CALL)
    cut = respond(client, tool_choice="required", max_output_tokens=len(CALL) - 30)
    assert (cut.status, cut.output[0].status, cut.output[0].name) == ("incomplete", "incomplete", "weather")
    with pytest.raises(openai.BadRequestError, match="within the arguments") as error:
        respond(client, previous_response_id=cut.id, input="Well?")
    assert error.value.param == "previous_response_id"
    end = respond(client, tool_choice="required", max_output_tokens=len(CALL) - 1)
    assert (end.status, written(end)) == ("incomplete", [("weather", {"city": "Ulm", "days": 2})])
    assert end.output[0].status == "completed"


def test_logprobs_are_those_of_the_text(world, client):
    says(world, "Well, <tool " + CALL + "!")
    fields = {"include": ["message.output_text.logprobs"]}
    whole, (last, events) = respond(client, **fields), streamed(client, **fields)
    for answer in (whole, last):
        spelled = ["".join(entry.token for entry in item.content[0].logprobs) for item in answer.output if item.type == "message"]
        assert spelled == ["Well, <tool ", "!"]
    entries = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert "".join(entries) == "Well, <tool !"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "pong"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array", "uniqueItems": True}}], "tool_choice": "required"}, "tools[0].parameters"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]}, "input"),
    ],
)
def test_what_responses_do_not_take_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, **fields)
    assert error.value.param.startswith(param)


# -- Messages ------------------------------------------------------------------------------------------------------------

TOOLS = [
    {"name": "weather", "description": "The weather of a city.", "input_schema": PARAMETERS},
    {"name": "ping", "input_schema": {"type": "object", "properties": {}}, "cache_control": {"type": "ephemeral"}},
]
HELLO = [{"role": "user", "content": "Weather in Ulm?"}]


@pytest.fixture
def claude(world):
    with anthropic.Anthropic(base_url=world.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client
    world.wait_idle()


def ask(client, **fields):
    return client.messages.create(**{"model": "typist", "max_tokens": 300, "messages": HELLO, "tools": TOOLS, **fields})


def blocks(message):
    return [(block.name, block.input) if block.type == "tool_use" else block.text for block in message.content]


@pytest.mark.parametrize("choice", [None, {"type": "any"}, {"type": "any", "disable_parallel_tool_use": True}])
def test_tool_uses_are_blocks_whole_or_streamed(world, claude, choice):
    both = choice is None or not choice.get("disable_parallel_tool_use")
    says(world, ("" if choice else "Well, ") + CALL + ("\n" + PING if both else ""))
    expected = [*([] if choice else ["Well, "]), ("weather", {"city": "Ulm", "days": 2}), *([("ping", {})] if both else [])]
    fields = {"tool_choice": choice} if choice else {}
    whole = ask(claude, **fields)
    with claude.messages.stream(model="typist", max_tokens=300, messages=HELLO, tools=TOOLS, **fields) as stream:
        events = list(stream)
    for message in (whole, stream.get_final_message()):
        assert (message.stop_reason, blocks(message)) == ("tool_use", expected)
        ids = [block.id for block in message.content if block.type == "tool_use"]
        assert len({*ids}) == len(ids)
        assert all(name.startswith("toolu_") for name in ids)
    framed = [(event.type, event.index) for event in events if event.type in ("content_block_start", "content_block_stop")]
    assert framed == [(kind, index) for index in range(len(expected)) for kind in ("content_block_start", "content_block_stop")]
    deltas = [event.partial_json for event in events if event.type == "input_json"]
    assert (len(deltas) > 2) == bool(choice)  # held to calls, they are told as they are written


def test_a_named_tool_is_used_once_and_none_is_text(world, claude):
    says(world, PING)
    assert blocks(ask(claude, tool_choice={"type": "tool", "name": "ping"})) == [("ping", {})]
    message = ask(claude, tool_choice={"type": "none"})
    assert (blocks(message), message.stop_reason) == ([PING], "end_turn")


def test_a_conversation_goes_on_after_a_result(world, claude):
    says(world, CALL)
    first = ask(claude)
    seen = says(world, "It rains.")
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": "rain"}]}
    history = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = ask(claude, messages=history)
    assert (blocks(second), second.stop_reason) == (["It rains."], "end_turn")
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in seen[0]
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in seen[0]
    counted = claude.messages.count_tokens(model="typist", messages=history, tools=TOOLS).input_tokens
    assert counted == len(world.tokenizer.encode(seen[0], special=False))
    with pytest.raises(anthropic.BadRequestError, match="no turn before it has made"):
        ask(claude, messages=[{"role": "user", "content": [result]}])


def test_an_input_that_is_cut_off_is_what_there_is_of_it(world, claude):
    says(world, CALL)
    message = ask(claude, tool_choice={"type": "any"}, max_tokens=CALL.index("2") - 1)
    assert (message.stop_reason, blocks(message)) == ("max_tokens", [("weather", {"city": "Ulm"})])


def test_half_a_character_in_an_input_is_a_replacement_and_a_number_out_of_range_an_error(world, claude):
    free = [{"name": "f", "input_schema": {"type": "object", "properties": {"x": {"anyOf": [{"type": "string"}, {"type": "number"}]}}}}]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": VALUE}}\n</tool_call>'
    says(world, call.replace("VALUE", '"\\ud83d \\ud83d\\ude00 \\\\ud83d"'))
    assert blocks(ask(claude, tools=free, tool_choice={"type": "any"})) == [("f", {"x": "\ufffd \U0001f600 \\ud83d"})]
    says(world, call.replace("VALUE", "1e999"))
    with pytest.raises(anthropic.InternalServerError, match="out of range"):
        ask(claude, tools=free, tool_choice={"type": "any"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "defer_loading"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two tools"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "no tools"),
        ({"tool_choice": {"type": "tool"}}, "needs the name"),
        ({"tool_choice": {"type": "tool", "name": "pong"}}, "pong"),
        ({"tools": [{"name": "f", "input_schema": {"uniqueItems": True}}], "tool_choice": {"type": "any"}}, "input_schema.uniqueItems"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "It"}], "tool_choice": {"type": "any"}}, "continued"),
    ],
)
def test_what_messages_do_not_take_is_refused_by_name(claude, fields, named):
    with pytest.raises(anthropic.BadRequestError, match=named):
        ask(claude, **fields)
