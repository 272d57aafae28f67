"""Structured output and tools through OpenAI's own client: a typist for what is read, real models for what is guaranteed."""

from __future__ import annotations

import json
import re

import anthropic
import jsonschema
import openai
import pytest
from http_world import World
from test_http_models import tiny

from armillary.models.load import load

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
HELLO = [{"role": "user", "content": "Tell me about a pet, or the weather in Ulm."}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def typing(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("typist"), config={"kv_blocks": 1024, "context": 4096}, max_context=4096)
    yield world
    world.close()


@pytest.fixture
def typist(typing):
    with openai.OpenAI(base_url=typing.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
    typing.wait_idle()


def ask(client, **fields):
    return client.chat.completions.create(**{"model": client.models.list().data[0].id, "messages": HELLO, "max_tokens": 300, **fields})


def streamed(client, **fields):
    """The message and the finish reason that the chunks of a stream add up to, by the client's own accumulator."""
    with client.chat.completions.stream(model=client.models.list().data[0].id, messages=HELLO, max_tokens=300, **fields) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0]


# -- what a model says, read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Well, ", ""])
def test_calls_are_taken_out_of_the_text(typing, typist, text):
    typing.typist.reply = lambda request: text + CALL + "\n" + CALL
    whole = ask(typist, tools=[WEATHER]).choices[0]
    for choice in (whole, streamed(typist, tools=[WEATHER])):
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "") == text
        calls = choice.message.tool_calls
        assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("function", "weather", {"city": "Ulm", "days": 2})
        ] * 2
        assert calls[0].id != calls[1].id


@pytest.mark.parametrize("text", [CALL[:-20], CALL.replace("weather", "whether"), CALL.replace('"days"', "days"), "No call."])
def test_what_is_no_valid_call_is_returned_as_text(typing, typist, text):
    typing.typist.reply = lambda request: text
    for choice in (ask(typist, tools=[WEATHER]).choices[0], streamed(typist, tools=[WEATHER])):
        assert (choice.message.content, choice.message.tool_calls or None, choice.finish_reason) == (text, None, "stop")


def test_without_tools_or_with_none_a_call_is_text(typing, typist):
    typing.typist.reply = lambda request: CALL
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = ask(typist, **fields).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (CALL, None)


def test_several_choices_and_log_probabilities(typing, typist):
    typing.typist.reply = lambda request: "x" if request.id.endswith("/1") else CALL
    first, second = ask(typist, tools=[WEATHER], n=2, logprobs=True).choices
    assert (first.finish_reason, second.finish_reason, second.message.content) == ("tool_calls", "stop", "x")
    assert len(first.logprobs.content) == len(CALL)
    chunks = list(ask(typist, tools=[WEATHER], logprobs=True, stream=True))
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == len(CALL)


def test_the_prompt_tells_of_tools_calls_and_results(typing, typist):
    seen = []
    typing.typist.reply = lambda request: seen.append(typing.tokenizer.decode(request.prompt, skip_special=False)) or CALL
    message = ask(typist, tools=[WEATHER]).choices[0].message
    assert json.dumps(WEATHER["function"]["parameters"]) in seen[0]
    history = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    typing.typist.reply = lambda request: seen.append(typing.tokenizer.decode(request.prompt, skip_special=False)) or "It rains."
    assert ask(typist, tools=[WEATHER], messages=history).choices[0].message.content == "It rains."
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in seen[-1]
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in seen[-1]


REFUSED = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}},
        "response_format.json_schema.schema.uniqueItems",
    ),
    ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
    ({"extra_body": {"guided_choice": []}}, "guided_choice"),
    ({"extra_body": {"guided_grammar": "root ::= x"}}, "guided_grammar"),
    ({"extra_body": {"guided_regex": "a^b"}}, "guided_regex"),
    ({"extra_body": {"guided_json": ""}}, "guided_json"),
    ({"extra_body": {"guided_json": '{"items":' * 5000 + "5" + "}" * 5000}}, "guided_json"),
    ({"extra_body": {"tool_choice": {"type": "function", "function": {"name": 5}}}, "tools": [PING]}, "tool_choice.function.name"),
    ({"extra_body": {"guided_json": 3}}, "guided_json"),
    ({"extra_body": {"guided_json": "{"}}, "guided_json"),
    ({"extra_body": {"structured_outputs": {}}}, "structured_outputs"),
    ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}}, "structured_outputs.choice"),
    ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, "guided_choice"),
    ({"extra_body": {"guided_regex": "a", "ignore_eos": True}}, "ignore_eos"),
    ({"extra_body": {"guided_regex": "a"}, "tools": [PING]}, "guided_regex"),
    ({"tools": [PING, PING]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [PING], "tool_choice": {"type": "function", "function": {"name": "pong"}}}, "tool_choice"),
    ({"tools": [PING], "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], "tool_choice": "required"},
        "tools[0].function.parameters",
    ),
    ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}}]}]}, "messages[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_followed_is_refused_by_place(typist, fields, param):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): grammars are NOT tested")
    with pytest.raises(openai.BadRequestError) as error:
        ask(typist, **fields)
    assert (error.value.param, error.value.code) == (param, "invalid_value")


# -- what a model is held to ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def real(request, tmp_path_factory):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): grammars are NOT tested")
    folder = tmp_path_factory.mktemp("real")
    loaded = load("smollm2") if request.param == "smollm2" else tiny(folder, max_context=4096)
    world = World(folder, loaded=loaded, config={"kv_blocks": 1024})
    yield world
    world.close()


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.url + "/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client
    real.wait_idle()


def test_json_of_a_schema_streamed_or_whole(client):
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    whole = ask(client, response_format=form, temperature=0).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    chunks = ask(client, response_format=form, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    drawn = ask(client, response_format=form, temperature=1.5, n=4, seed=1).choices
    for choice in drawn:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert len({choice.message.content for choice in drawn}) > 1
    compact = ask(client, temperature=1.5, seed=2, extra_body={"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}})
    content = compact.choices[0].message.content
    assert list(json.loads(content)) == ["name", "age", "kind"]
    assert json.dumps(json.loads(content), ensure_ascii=False) == content


def test_regex_choice_and_grammar_in_chat_and_completions(client):
    ways = [
        ({"guided_regex": "[A-Z]{3}-[0-9]{2}"}, "[A-Z]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "(ab|cd){2}"}}, "(ab|cd){2}"),
        ({"guided_choice": ["positive", "negative"]}, "positive|negative"),
        ({"structured_outputs": {"choice": ["é", "ü"]}}, "é|ü"),
        ({"guided_grammar": 'root ::= "<" [a-c]{2,4} ">"'}, "<[a-c]{2,4}>"),
    ]
    for fields, pattern in ways:
        answer = ask(client, temperature=1.2, extra_body=fields).choices[0]
        assert re.fullmatch(pattern, answer.message.content)
        assert answer.finish_reason == "stop"
        name = client.models.list().data[0].id
        text = client.completions.create(model=name, prompt="It is", max_tokens=40, temperature=1.2, extra_body=fields).choices[0].text
        assert re.fullmatch(pattern, text)


def test_an_object_that_is_cut_off_ends_with_length(client):
    answer = ask(client, response_format={"type": "json_object"}, temperature=0, max_tokens=5).choices[0]
    assert (answer.finish_reason, answer.message.content[0]) == ("length", "{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_is_made_and_valid(client, choice):
    for temperature in (0, 1.5):
        fields = {"tools": [PING, WEATHER], "tool_choice": choice, "temperature": temperature, "seed": 3, "parallel_tool_calls": False}
        whole, stream = ask(client, **fields).choices[0], streamed(client, **fields)
        for one in (whole, stream):
            (call,) = one.message.tool_calls
            assert (one.finish_reason, one.message.content or None) == ("tool_calls", None)
            if choice != "required":
                assert call.function.name == "weather"
            if call.function.name == "weather":
                jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
        assert whole.message.tool_calls[0].function.arguments == stream.message.tool_calls[0].function.arguments


def test_a_grammar_that_is_slow_ends_its_request_alone_and_says_why(typing, typist, monkeypatch):
    typing.typist.reply = lambda request: "abcabcabc"
    name = typist.models.list().data[0].id
    fields = {"model": name, "prompt": "x", "max_tokens": 9, "extra_body": {"guided_regex": "[a-c]*"}}
    assert typist.completions.create(**fields).choices[0].text == "abcabcabc"
    with monkeypatch.context() as patched:
        patched.setattr("armillary.serve.grammar.matcher.MASK_SECONDS", -1.0)  # however fast it is
        with pytest.raises(openai.BadRequestError, match="many ways") as error:
            typist.completions.create(**fields)
    assert error.value.param == "guided_regex"
    assert typist.completions.create(**fields).choices[0].text == "abcabcabc"
    (request_id,) = [row["id"] for row in typing.http.get("/requests?limit=1").json()["data"]]
    events = typing.http.get(f"/requests/{request_id}").json()["requests"][0]["events"]
    assert "until its grammar was compiled and it reached the engine" in events[-1]


def test_all_three_apis_make_the_same_call(real, client):
    function, fields = WEATHER["function"], {"temperature": 0, "model": client.models.list().data[0].id}
    call = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0).choices[0].message.tool_calls[0]
    item = client.responses.create(
        input=HELLO, tools=[{"type": "function", **function}], tool_choice="required", parallel_tool_calls=False, **fields
    ).output[0]
    with anthropic.Anthropic(base_url=real.url, api_key="any", max_retries=0, timeout=120) as claude:
        tool = {"name": "weather", "description": function["description"], "input_schema": function["parameters"]}
        message = claude.messages.create(
            model=fields["model"],
            messages=HELLO,
            tools=[tool],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            max_tokens=300,
            extra_body={"temperature": 0},
        )
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, function["parameters"])
    assert (item.name, item.arguments) == (call.function.name, call.function.arguments)
    assert (message.stop_reason, message.content[0].name, message.content[0].input) == ("tool_use", call.function.name, arguments)


def test_arguments_are_streamed_while_they_are_written(client):
    chunks = list(ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (deltas[0].id is not None, deltas[0].function.name, deltas[0].function.arguments) == (True, "weather", "")
    assert all(delta.id is None for delta in deltas[1:])
    assert len(deltas) > 3
    jsonschema.validate(json.loads("".join(delta.function.arguments for delta in deltas)), WEATHER["function"]["parameters"])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_strict_tools_under_auto_make_valid_calls_or_none(client):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    message = ask(client, tools=[strict], temperature=0, max_tokens=40).choices[0].message
    for call in message.tool_calls or ():
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
