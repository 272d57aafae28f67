"""Calls are read from text however it is cut, nothing is lost, and what a grammar guarantees is read back as calls."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.tools import formats
from armillary.serve.tools.constraint import constraint
from armillary.serve.tools.definitions import Tool, Toolbox
from armillary.serve.tools.prompt import for_plain_template, for_template, written
from armillary.serve.tools.stream import Called, CallStream, More, Said, read_answer

WEATHER = Tool(
    "weather",
    "The weather of a city.",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
PING = Tool("ping", "", {"type": "object", "properties": {}})
BOX = Toolbox((WEATHER, PING))
CALLS = [("weather", {"city": 'Ulm "\\" } </tool_call> é', "days": 2}), ("ping", {})]


def streamed(text, row, cuts, guaranteed=False, box=BOX):
    stream, pieces = CallStream(row, box, guaranteed=guaranteed), []
    bounds = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(bounds):
        pieces += stream.push(text[start:end])
    return pieces + stream.finish()


def summed(pieces):
    """The text, and each call as (name, arguments)."""
    said, calls = "", []
    for piece in pieces:
        if isinstance(piece, Said):
            said += piece.text
        elif isinstance(piece, Called):
            assert piece.index == len(calls)
            calls.append([piece.call.name, piece.call.arguments])
        elif isinstance(piece, More):
            calls[piece.index][1] += piece.arguments
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("row", formats.FORMATS, ids=lambda row: row.name)
@given(data=st.data())
def test_every_format_reads_what_it_writes_however_the_text_is_cut(row, data):
    calls = data.draw(st.lists(st.sampled_from(CALLS), min_size=1, max_size=3))
    before = data.draw(st.sampled_from(["", "Let me see.\n", "1 < 2 <tool {"])) if row.start else ""
    text = before + written(calls, row)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    said, found = summed(streamed(text, row, cuts))
    assert (said.strip(), found) == (before.strip(), calls)


INVALID = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"\n</tool_call>',
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "ping", "arguments": []}\n</tool_call>',
    '<tool_call>\n{"name": "ping"',
    '<tool_call>\n{"name": "ping", "arguments": {"a": "\\ud800"}}\n</tool_call>',
    '<tool_call>\n{"name": "ping", "arguments": {"a": 1e999}}\n</tool_call>',
    "<tool_call>",
    "a <tool_cal b",
    "no call at all\n",
    '{"name": "ping", "arguments": {}}',
    "",
    "  \n",
]


@pytest.mark.parametrize("text", INVALID)
@given(data=st.data())
def test_what_is_no_valid_call_is_text_and_nothing_is_lost(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert summed(streamed(text, formats.DEFAULT, cuts)) == (text, [])


@given(st.text(alphabet='<tool_cal>/{}\n"ping: , name arguments', max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_any_text_comes_out_as_it_went_in(text, cuts):
    pieces = streamed(text, formats.DEFAULT, [min(cut, len(text)) for cut in cuts])
    assert all(isinstance(piece, Said) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text


def test_an_invalid_call_before_a_valid_one():
    text = '<tool_call>\n{"name": oops}\n</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    said, calls = read_answer(text, formats.DEFAULT, BOX)
    assert said + str([call.name for call in calls]) == text.split("\n<tool_call>")[0] + "['ping']" or (said, list(calls)) == (text, [])


def test_text_is_streamed_while_it_comes_and_a_possible_tag_is_held_back():
    stream = CallStream(formats.DEFAULT, BOX, guaranteed=False)
    assert stream.push("Hello <to") == [Said("Hello")] or stream.push("") == []
    assert "".join(piece.text for piece in stream.push("day>")) != ""


@given(data=st.data())
def test_guaranteed_calls_are_told_while_they_are_written(data):
    text = written(CALLS, formats.DEFAULT)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert summed(streamed(text, formats.DEFAULT, cuts, guaranteed=True)) == ("", CALLS)


def test_arguments_come_in_pieces_and_an_answer_that_is_cut_off_keeps_what_there_is():
    text = written(CALLS[:1], formats.DEFAULT)
    pieces = streamed(text, formats.DEFAULT, range(len(text)), guaranteed=True)
    assert len([piece for piece in pieces if isinstance(piece, More)]) > 10
    cut = streamed(text[:60], formats.DEFAULT, [], guaranteed=True)
    assert isinstance(cut[0], Called)
    assert isinstance(cut[1], More)
    assert text.startswith('<tool_call>\n{"name": "weather", "arguments": ' + cut[1].arguments)


# -- constraints ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def follows():
    """Whether a text follows a grammar, by xgrammar."""
    xgrammar = pytest.importorskip(
        "xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): grammars are NOT tested"
    )
    info = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + [b"<end>"], vocab_size=257, stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(info)

    def follow(grammar, text):
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(grammar.source))
        return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(256)

    return follow


@pytest.mark.parametrize("row", formats.FORMATS, ids=lambda row: row.name)
def test_required_calls_are_calls_and_nothing_else(row, follows):
    plain = [("weather", {"city": "Ulm é", "days": 2}), ("ping", {}), ("weather", {"city": ""})]
    python = row.syntax == "python"
    write = lambda calls: written(calls, row) if not python else written(calls, row).replace("'", '"')  # noqa: E731
    grammar = constraint(Toolbox((WEATHER, PING), "required"), row)
    for calls in (plain, plain[:1], plain[1:]):
        assert follows(grammar, write(calls))
        guaranteed = summed(streamed(write(calls), row, [], guaranteed=True))
        assert guaranteed == ("", calls)
    for text in ("", "hello", "hello " + write(plain[:1]), write([("weather", {"days": 2})]), write([("pong", {})]), write(plain)[:-1]):
        assert not follows(grammar, text)
    single = constraint(Toolbox((WEATHER, PING), "required", parallel=False), row)
    assert follows(single, write(plain[:1]))
    assert not follows(single, write(plain))
    named = constraint(Toolbox((WEATHER, PING), "required", named="ping"), row)
    assert follows(named, write([("ping", {})]))
    assert not follows(named, write(plain[:1]))


def test_a_strict_tool_is_constrained_where_it_is_called_and_text_is_free(follows):
    strict = Tool("weather", "", WEATHER.parameters, strict=True)
    assert constraint(BOX, formats.DEFAULT) is None
    grammar = constraint(Toolbox((strict, PING)), formats.DEFAULT)
    good, bad = written([("weather", {"city": "Ulm"})], formats.DEFAULT), written([("weather", {"town": "Ulm"})], formats.DEFAULT)
    assert follows(grammar, "Just text. {")
    assert follows(grammar, f"Well: {good} and {good}")
    assert not follows(grammar, bad)
    once = constraint(Toolbox((PING,), parallel=False), formats.DEFAULT)
    assert not follows(once, written([("ping", {}), ("ping", {})], formats.DEFAULT))
    with pytest.raises(InputError, match="no tag"):
        constraint(Toolbox((strict,)), formats.get("llama-json"))


def test_parameters_that_cannot_be_followed_are_named():
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})
    with pytest.raises(InputError) as caught:
        constraint(Toolbox((PING, tool), "required"), formats.DEFAULT)
    assert caught.value.field == "tools[1].function.parameters.properties.a.uniqueItems"
    with pytest.raises(InputError, match="no object"):
        constraint(Toolbox((Tool("f", "", {"type": "string"}),), "required"), formats.DEFAULT)
    with pytest.raises(InputError, match="identifier"):
        constraint(Toolbox((Tool("a-b"),), "required"), formats.get("pythonic"))


def test_a_toolbox_is_checked():
    for make in (lambda: Toolbox(()), lambda: Toolbox((PING, PING)), lambda: Toolbox((PING,), "required", named="pong")):
        with pytest.raises(InputError):
            make()
    with pytest.raises(NotFoundError, match="hermes"):
        formats.get("hermès")


# -- prompts -------------------------------------------------------------------------------------------------------------

HISTORY = [
    {"role": "user", "content": "Weather in Ulm?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c1", "content": "more rain"},
    {"role": "user", "content": "Thanks."},
]


def test_a_template_that_knows_tools_gets_arguments_as_objects():
    call = for_template(HISTORY)[1]
    assert (call["content"], call["tool_calls"][0]["function"]["arguments"]) == ("", {"city": "Ulm"})
    assert HISTORY[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Ulm"}'


def test_a_template_that_knows_none_is_told_in_words():
    told, user, assistant, results, thanks = for_plain_template(HISTORY, [WEATHER], formats.DEFAULT)
    assert told["role"] == "system"
    assert json.dumps(WEATHER.as_openai()) in told["content"]
    assert "<tool_call>" in told["content"]
    assert assistant == {"role": "assistant", "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'}
    assert results == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>\n<tool_response>\nmore rain\n</tool_response>"}
    assert (user, thanks) == (HISTORY[0], HISTORY[4])
    kept = for_plain_template([{"role": "system", "content": "Be kind."}, *HISTORY], [WEATHER], formats.DEFAULT)
    assert kept[0]["content"] == f"Be kind.\n\n{told['content']}"
    assert for_plain_template(HISTORY[:1], [], formats.DEFAULT) == HISTORY[:1]


def test_arguments_that_are_no_object_are_refused():
    broken = [{**HISTORY[1], "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]
    for render in (for_template, lambda messages: for_plain_template(messages, [], formats.DEFAULT)):
        with pytest.raises(InputError, match="no JSON object"):
            render(broken)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", "hermes"),
        ("{{ '<|tool_call|>' }}", "granite"),
        ("{{ '{\"name\": \"' + f + '\", ' + '\"parameters\": ' }}", "llama-json"),
        ("{{ message.content }}", "hermes"),
    ],
)
def test_the_way_of_writing_calls_is_found_in_the_template(source, name):
    assert formats.of_template(source).name == name
