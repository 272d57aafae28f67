"""xgrammar's masks are those of the plainest automaton, bit for bit, on a real vocabulary of 49,152 tokens."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
import reference_automaton as reference

from armillary.serve.grammar import grammar as grammars

REGEXES = [
    (r"\d{3}-[a-z]+", "123-abc"),
    (r"(yes|no|maybe)", "maybe"),
    (r"[A-Z][a-z]{2,5}( [A-Z][a-z]{2,5})*", "Anna Maria Berg"),
    (r".{0,20}", "héllo\nworld"),
    (r"[^x]*", "no such letter"),
    (r"\w+@\w+\.(com|org)", "ann_1@example.org"),
    (r"é+ü?", "éééü"),
    (r"[α-ω]{2,}", "λόγος".replace("ό", "ο")),
    (r"(\+\d{1,3} )?\d{2,4}/\d{3,8}", "+49 731/123456"),
    (r"(19|20)\d{2}-(0[1-9]|1[0-2])", "1999-12"),
    (r"#[0-9a-fA-F]{6}", "#00fFa9"),
    (r"(a|ab)(c|bcd)", "abcd"),
    (r"(0|[1-9]\d*)(\.\d+)?", "10.25"),
    (r"[^\n]{3}\n[👋-👍]", "abc\n👌"),
]
STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "number", "boolean", "null"))


def objects(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


SCHEMAS = [
    (STRING, "a \"quoted\" é\n\t\\ \u2028 👋"),
    (INTEGER, -120),
    (NUMBER, -1.5e-7),
    (BOOLEAN, True),
    (NULL, None),
    ({"enum": ["red", "green", 3, None, {"b": [1, 2]}, 'é"']}, {"b": [1, 2]}),
    ({"const": "exactly this"}, "exactly this"),
    ({"type": ["string", "null"]}, None),
    ({"anyOf": [INTEGER, STRING]}, "7"),
    ({"anyOf": [BOOLEAN, {"type": "array", "items": NULL}]}, [None, None]),
    ({"type": "integer", "minimum": -12, "maximum": 205}, 107),
    ({"type": "integer", "minimum": 0, "maximum": 9}, 0),
    ({"type": "string", "minLength": 1, "maxLength": 4}, "éa b"),
    ({"type": "string", "maxLength": 2}, ""),
    ({"type": "string", "minLength": 3}, "long enough"),
    ({"type": "string", "pattern": "^[a-z]+[^x]$"}, "abc-"),
    ({"type": "string", "pattern": r"^\d{3}-.$"}, "123-é"),
    ({"type": "array", "items": INTEGER}, [1, 22, 333]),
    ({"type": "array", "items": BOOLEAN, "minItems": 2, "maxItems": 3}, [True, False, True]),
    ({"type": "array", "items": STRING, "minItems": 1}, ["a", ""]),
    ({"type": "array", "items": {"type": "array", "items": NUMBER}}, [[1.0, 2], [], [-3e5]]),
    ({"type": "array", "items": STRING, "maxItems": 1}, []),
    (objects(), {}) if False else (objects(a=NULL), {"a": None}),
    (objects(["name"], name=STRING), {"name": "Ann Lee"}),
    (objects(["name", "age"], name=STRING, age=INTEGER), {"name": "Bo", "age": 31}),
    (objects(["b"], a=STRING, b=INTEGER, c=BOOLEAN), {"b": 2, "c": False}),
    (objects(["b"], a=STRING, b=INTEGER, c=BOOLEAN), {"a": "", "b": 2}),
    (objects((), a=STRING, b=INTEGER, c=BOOLEAN), {"c": True}),
    (objects((), a=STRING, b=INTEGER, c=BOOLEAN), {"a": "x", "c": True}),
    (objects(["a", "c"], a=STRING, b=INTEGER, c=BOOLEAN, d=NULL), {"a": "x", "b": 5, "c": True, "d": None}),
    (objects(["point"], point=objects(["x", "y"], x=NUMBER, y=NUMBER)), {"point": {"x": 0.5, "y": -1}}),
    (objects(["tags"], tags={"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}), {"tags": ["a", "b", "a"]}),
    (objects(["kind"], kind={"const": "circle"}, radius=NUMBER), {"kind": "circle", "radius": 2}),
    ({"anyOf": [objects(["kind"], kind={"const": "a"}), objects(["kind", "n"], kind={"const": "b"}, n=INTEGER)]}, {"kind": "b", "n": 1}),
    ({"type": "array", "items": objects(["id"], id=INTEGER, name=STRING)}, [{"id": 1, "name": "x"}, {"id": 2}]),
    (objects(["größe", 'q"x'], **{"größe": INTEGER, 'q"x': NULL}), {"größe": 3, 'q"x': None}),
]  # fmt: skip
STYLES = [8, None, 1]  # characters of whitespace in a row; None is json.dumps' own


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    pieces = [b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    return reference.Vocabulary(pieces, tokenizer.stop_ids)


def compare(tokenizer, compiler, vocabulary, piece, grammar, text, most=5):
    """Along the tokens of `text`, at up to `most` places and at its end: equal masks, and one that lets the text go on."""
    automaton, matcher = reference.Automaton(piece), compiler.compile(grammar).matcher()
    tokens = tokenizer.encode(text, special=False)
    looked = {0, len(tokens), *random.Random(text).sample(range(len(tokens) + 1), min(most, len(tokens) + 1))}
    state = automaton.start
    for index in range(len(tokens) + 1):
        if index in looked:
            ours = vocabulary.mask(automaton, state)
            theirs = reference.bits(matcher.mask().numpy()[0], tokenizer.vocab_size)
            different = [(tokenizer.token_bytes(token), bool(ours[token])) for token in np.flatnonzero(ours != theirs)[:5]]
            assert not different, f"{grammar.source[:80]} after {tokenizer.decode(tokens[:index])!r}"
            assert index == len(tokens) or ours[tokens[index]]
            assert theirs[tokenizer.eos] == matcher.complete
        if index < len(tokens):
            matcher.accept(tokens[index])
            for byte in tokenizer.token_bytes(tokens[index]):
                state = automaton.step(state, byte)
    assert matcher.complete
    assert automaton.complete(state)


@pytest.mark.parametrize(("pattern", "text"), REGEXES)
def test_regular_expressions(tokenizer, compiler, vocabulary, pattern, text):
    compare(tokenizer, compiler, vocabulary, reference.regex(pattern), grammars.regex(pattern), text)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_schemas(tokenizer, compiler, vocabulary, number):
    schema, value = SCHEMAS[number]
    jsonschema.validate(value, schema)
    spaces = STYLES[number % 3]
    loose = {8: {"indent": 2}, None: {}, 1: {"separators": (" ,", ":")}}[spaces]
    text = json.dumps(value, ensure_ascii=False, **loose)
    if "enum" in schema or "const" in schema:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # listed values are written in one way only
    compare(tokenizer, compiler, vocabulary, reference.schema(schema, spaces), grammars.json_schema(schema, spaces=spaces), text)


def test_there_are_fifty_of_them():
    assert len(REGEXES) + len(SCHEMAS) >= 50
