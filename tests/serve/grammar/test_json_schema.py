"""What is refused is refused by place; what is accepted gives JSON that is valid, whatever the model draws."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from reference_automaton import bits

from armillary.core.errors import InputError
from armillary.serve.grammar import grammar as grammars
from armillary.serve.grammar.json_schema import followed

S = {"type": "string"}
REFUSED = [
    ({"type": "array", "items": S, "uniqueItems": True}, "s.uniqueItems"),
    ({"type": "object", "properties": {"a": {"not": S}}}, "s.properties.a.not"),
    ({"type": "object", "properties": {"a": {"type": "array", "contains": S}}}, "s.properties.a.contains"),
    ({"type": "number", "multipleOf": 0.5}, "s.multipleOf"),
    ({"type": "string", "pattern": "^a", "minLength": 3}, "s"),
    ({"type": "string", "format": "colour"}, "s.format"),
    ({"type": "string", "pattern": 'a"b'}, "s.pattern"),
    ({"type": "string", "pattern": r"a\nb"}, "s.pattern"),
    ({"type": "string", "pattern": r"a\\b"}, "s.pattern"),
    ({"type": "strang"}, "s.type"),
    ({"tipe": "string"}, "s.tipe"),
    ({"type": "string", "minimum": 3}, "s.minimum"),
    ({"allOf": [S, {"maxLength": 3}]}, "s.allOf"),
    ({"oneOf": [S, {"enum": ["a"]}]}, "s.oneOf[1]"),
    ({"oneOf": [{"$ref": "#"}, S]}, "s.oneOf[1]"),
    ({"oneOf": [{"$ref": "#/$defs/a"}, S], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}, "s.oneOf[1]"),
    ({"anyOf": [S], "minLength": 2}, "s.minLength"),
    ({"$ref": "other.json"}, "s.$ref"),
    ({"$ref": "#/$defs/missing"}, "s.$ref"),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, "s.minimum"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "s"),
    ({"type": "array", "minItems": 3, "maxItems": 2, "items": S}, "s.maxItems"),
    ({"type": "object", "required": ["a"], "properties": {}, "additionalProperties": False}, "s.required"),
    ({"type": "object", "propertyNames": {"pattern": "a"}}, "s.propertyNames"),
    ({"type": "object", "minProperties": 2}, "s.minProperties"),
    ({"enum": []}, "s.enum"),
    ({"type": "string", "enum": [1]}, "s.enum"),
    (False, "s"),
    (3, "s"),
    ({"type": "object", "properties": {"a": False}}, "s.properties.a"),
    ({"minimum": 3, "pattern": "a"}, "s"),
    ({"type": "string", "pattern": "(a{1,100}){1,100}"}, "s.pattern"),
]


@pytest.mark.parametrize(("schema", "place"), REFUSED)
def test_what_would_not_be_followed_is_refused_by_place(schema, place):
    with pytest.raises(InputError) as caught:
        followed(schema, "s")
    assert caught.value.field == place
    assert str(caught.value).startswith(place)


def test_alternatives_may_lead_back_to_one_another():
    linked = {"oneOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/list"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"next": linked}}
    nodes = {"type": "array", "items": {"oneOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}
    rewritten = followed({"$ref": "#/$defs/node", "$defs": {"node": node, "list": nodes}}, "s")
    assert rewritten["$defs"]["node"]["properties"]["next"] == {"anyOf": linked["oneOf"]}
    nodes["items"]["oneOf"].append({"type": "object"})  # further in, where only a reference leads
    with pytest.raises(InputError, match="earlier alternative"):
        followed({"$ref": "#/$defs/node", "$defs": {"node": node, "list": nodes}}, "s")


def test_depth_size_and_counts_are_bounded():
    deep, wide = S, {"type": "object", "properties": {f"p{number}": S for number in range(300)}}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    for schema in (deep, wide, {"enum": list(range(2000))}, {"anyOf": [S] * 3000}, {"type": "string", "maxLength": 10**6}):
        with pytest.raises(InputError):
            followed(schema, "s")


# Each is what a library such as pydantic writes, or a corner where xgrammar alone would let invalid JSON through.
FOLLOWED = [
    {"type": "object"},
    {"type": "array"},
    {"type": "object", "required": ["a"]},
    {"properties": {"a": {"type": "integer"}}, "required": ["b"]},
    {"type": "string", "maxLength": 6},
    {"type": ["string", "integer"], "minLength": 2, "maxLength": 3, "minimum": 7},
    {"type": "string", "enum": ["a", 1, None]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}, "required": ["a", "z"]},
    {"type": "array", "prefixItems": [S, {"type": "integer"}], "minItems": 1},
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "maxItems": 4},
    {"type": "integer", "exclusiveMinimum": 3.5, "maximum": 40},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "exclusiveMinimum": 0},
    {"oneOf": [{"type": "integer"}, {"type": "null"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "v": of}, "required": ["kind", "v"]}
            for kind, of in (("a", S), ("b", {"type": "integer"}))
        ],
        "discriminator": {"propertyName": "kind"},
    },
    {"$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"]}}, "$ref": "#/$defs/node"},
    {"allOf": [{"type": "string", "format": "date"}], "title": "When", "description": "d", "examples": ["x"]},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "uri"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "pattern": "^[^a-c]{0,4}$"},
    {"type": "string", "pattern": "^.{2}$"},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FOLLOWED)))
def test_every_walk_under_the_mask_ends_in_valid_json(tokenizer, compiler, number):
    schema = FOLLOWED[number]
    compiled = compiler.compile(grammars.json_schema(schema, spaces=[8, None][number % 2]))
    random = np.random.default_rng(number)
    closers = [tokenizer.encode(text, special=False)[0] for text in ('"', "}", "]", "0", "7", ":", "null", ".", "a", "-")]
    for _ in range(3):
        matcher, tokens = compiled.matcher(), []
        while not matcher.finished:
            allowed = np.flatnonzero(bits(matcher.mask().numpy()[0], tokenizer.vocab_size))
            # After a while whatever ends strings, lists and objects soonest is drawn, else a walk may not end.
            if matcher.complete and len(tokens) > 5:
                break
            closing = np.intersect1d(allowed, closers) if len(tokens) > 12 else []
            token = int(random.choice(closing if len(closing) else allowed))
            if token in tokenizer.stop_ids:
                break
            matcher.accept(token)
            tokens.append(token)
            if len(tokens) > 150:
                break
        if matcher.complete or matcher.finished:
            raw = b"".join(map(tokenizer.token_bytes, tokens))
            jsonschema.validate(json.loads(raw.decode("utf-8", "replace")), schema)


def test_at_most_so_many_spaces(tokenizer, compiler):
    matcher = compiler.compile(grammars.json_schema({"type": "object", "properties": {"a": S}, "required": ["a"]})).matcher()
    (space,) = tokenizer.encode(" ", special=False)
    for token in tokenizer.encode("{", special=False) + [space] * grammars.MAX_WHITESPACE:
        matcher.accept(token)
    allowed = bits(matcher.mask().numpy()[0], tokenizer.vocab_size)
    assert not any(tokenizer.token_bytes(int(token)).isspace() for token in np.flatnonzero(allowed))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": 5}, "json.type: 5 is no type"),
        ({"type": "txt"}, 'json.type: "txt" is no type'),
        (5, "json: 5 is no schema"),
        ({"type": "array", "items": None}, "json.items: null is no schema"),
        ({"type": "string", "minLength": "5"}, 'json.minLength: "5" is no count'),
    ],
)
def test_what_is_wrong_is_shown_as_json_writes_it(schema, words):
    with pytest.raises(InputError) as caught:
        followed(schema, "json")
    assert caught.value.problem.startswith(words)
