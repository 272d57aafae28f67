"""JSON schemas as xgrammar follows them exactly: what it would drop in silence is refused by place, what it would misread is rewritten.

An answer under the rewritten schema is always valid under the given one; it may be narrower. Objects are closed unless the schema
opens them; properties come in the schema's order; a string with bounds on its length, a pattern or a format is written without escapes;
a pattern stands for the whole string; numbers within bounds have no exponent.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from armillary.core.errors import InputError
from armillary.serve.grammar.anchors import unanchored
from armillary.serve.grammar.repeats import MAX_REPEAT, check_repeats

MAX_DEPTH = 32
MAX_NODES = 2_000
MAX_PROPERTIES = 256  # of one object
MAX_ENUM = 1_024
MAX_BOUND = 10**15  # of numbers

ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
        "discriminator",
    ]
)
BY_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
KNOWN = ANNOTATIONS.union(*BY_TYPE.values(), COMBINED, ("type",))
REFUSED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "propertyNames",
        "patternProperties",
        "unevaluatedItems",
        "unevaluatedProperties",
        "additionalItems",
        "$dynamicRef",
        "$recursiveRef",
        "$anchor",
        "$dynamicAnchor",
        "contentSchema",
    ]
)
FORMATS = ("date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "hostname", "email", "uri")
_LOCAL = re.compile(r"#(/(\$defs|definitions)/[^/]+)?\Z")
_PATTERN_ESCAPES = frozenset("dDwWsS.^$|?*+()[]{}-/")


def followed(schema: Any, field: str) -> Any:
    """`schema` rewritten for xgrammar. Raises InputError whose field is the place, such as `json.properties.age`."""
    reader = _Reader(schema, field)
    result = reader.node(schema, field, 0)
    for name in ("$defs", "definitions"):
        if isinstance(schema, Mapping) and name in schema:
            if not isinstance(schema[name], Mapping):
                raise _wrong(f"{field}.{name}", "it is no object", "map names to schemas")
            result = {**result, name: {key: reader.node(value, f"{field}.{name}.{key}", 1) for key, value in schema[name].items()}}
    return result


class _Reader:
    def __init__(self, root: Any, field: str) -> None:
        self._root = root
        self._field = field
        self._nodes = 0
        self._following: set[str] = set()  # references whose targets are being looked at for `_signature`

    def node(self, schema: Any, at: str, depth: int) -> Any:
        """One schema within the whole."""
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise _wrong(at, f"the schema is nested deeper than {MAX_DEPTH}", "make it flatter")
        if self._nodes > MAX_NODES:
            raise _wrong(at, f"the schema has more than {MAX_NODES:,} parts", "make it smaller")
        if schema is True:
            return {}
        if schema is False:
            raise _wrong(at, "the schema false allows nothing", "leave it out, or say what is allowed")
        if not isinstance(schema, Mapping):
            raise _wrong(at, f"{_shown(schema)} is no schema", 'a schema is an object such as {"type": "string"}')
        _check_words(schema, at)
        used = [word for word in COMBINED if word in schema]
        if used:
            return self._combined(used[0], schema, at, depth)
        types = _types(schema, at)
        if types is None:
            return {}
        alternatives = [self._typed(kind, schema, at, depth) for kind in types]
        return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}

    def _combined(self, word: str, schema: Mapping[str, Any], at: str, depth: int) -> Any:
        """References, alternatives and listed values, which stand alone but for a `type` that they keep to."""
        beside = [key for key in schema if key not in ANNOTATIONS and key != word and not (key == "type" and word in ("const", "enum"))]
        if beside:
            raise _wrong(
                f"{at}.{beside[0]}",
                f"it stands beside {word}, and only one of them would be followed",
                f"move it into {word}, or leave it out",
            )
        value = schema[word]
        if word == "$ref":
            return {"$ref": self._reference(value, f"{at}.$ref")}
        if word in ("const", "enum"):
            values = [value] if word == "const" else value
            if not isinstance(values, list) or not 1 <= len(values) <= MAX_ENUM:
                raise _wrong(
                    f"{at}.{word}",
                    "it lists no values" if not values else f"it is no list of at most {MAX_ENUM:,} values",
                    "list what is allowed",
                )
            kept = [one for one in values if _is_of(one, _types(schema, at))]
            if not kept:
                raise _wrong(f"{at}.{word}", "none of its values is of the type", "change type, or the values")
            return {"enum": kept}
        if not isinstance(value, list) or not value:
            raise _wrong(f"{at}.{word}", "it is no list of schemas", "give at least one")
        if word == "allOf" and len(value) > 1:
            raise _wrong(f"{at}.allOf", f"{len(value)} schemas together are not followed", "merge them into one")
        parts = [self.node(one, f"{at}.{word}[{index}]", depth + 1) for index, one in enumerate(value)]
        if word == "oneOf" and not self._following:  # a reference's target is checked where it stands
            self._check_apart(parts, f"{at}.oneOf")
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _reference(self, value: Any, at: str) -> str:
        match = _LOCAL.match(value) if isinstance(value, str) else None
        if match is None:
            raise _wrong(at, f"{_shown(value)} is followed nowhere", 'refer to "#" or to "#/$defs/NAME"')
        target = self._root
        for part in value[2:].split("/") if match[1] else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or part not in target:
                raise _wrong(at, f"the schema has no {value[:80]!r}", "define it")
            target = target[part]
        return str(value)

    def _check_apart(self, parts: list[Any], at: str) -> None:
        """No value may be valid under two of the alternatives: they differ in type, or in a required property's only values."""
        seen = [self._signature(part) for part in parts]
        for index, one in enumerate(seen):
            for other in seen[:index]:
                if one.keys() & other.keys() and not _apart(one, other):
                    raise _wrong(
                        f"{at}[{index}]", "a value may be valid under this and an earlier alternative", "use anyOf if that is right"
                    )

    def _signature(self, part: Any) -> dict[str, dict[str, frozenset[str]]]:
        """By type that a value may have: the listed values of its required properties (and of itself, under "")."""
        if "$ref" in part:
            name = part["$ref"]
            if name in self._following:  # it leads to itself: it may be anything
                return {kind: {} for kind in BY_TYPE}
            target = self._root
            for step in name[2:].split("/") if len(name) > 1 else ():
                target = target[step.replace("~1", "/").replace("~0", "~")]
            self._following.add(name)
            try:
                return self._signature(self.node(target, self._field, 0))
            finally:
                self._following.remove(name)
        if "enum" in part:
            return {kind: {"": frozenset(map(_text, part["enum"]))} for value in part["enum"] for kind in _types_of(value)}
        if "anyOf" in part:
            return {kind: {} for one in part["anyOf"] for kind in self._signature(one)}
        if "type" not in part:
            return {kind: {} for kind in BY_TYPE}
        fixed = {}
        for name in part.get("required", ()):
            inner = part["properties"][name]
            if "enum" in inner:
                fixed[name] = frozenset(map(_text, inner["enum"]))
        return dict.fromkeys(("number", "integer") if part["type"] in ("number", "integer") else (part["type"],), fixed)

    def _typed(self, kind: str, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        if kind == "string":
            return _string(schema, at)
        if kind in ("integer", "number"):
            return _number(kind, schema, at)
        if kind == "array":
            return self._array(schema, at, depth)
        if kind == "object":
            return self._object(schema, at, depth)
        return {"type": kind}

    def _array(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        if schema.get("uniqueItems"):
            raise _wrong(f"{at}.uniqueItems", "that items differ is not followed", "leave it out")
        low, high = _counts(schema, "minItems", "maxItems", at)
        result: dict[str, Any] = {"type": "array"}
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise _wrong(f"{at}.prefixItems", "it is no list of schemas", "give a list")
        if first:
            result["prefixItems"] = [self.node(one, f"{at}.prefixItems[{index}]", depth + 1) for index, one in enumerate(first)]
        items = schema.get("items", not first)
        if items is False:
            result["items"] = False
            if low > len(first):
                raise _wrong(f"{at}.minItems", f"{low} items are wanted and {len(first)} are allowed", "allow more items")
        else:
            result["items"] = self.node(items, f"{at}.items", depth + 1)
        return {**result, **({"minItems": low} if low else {}), **({"maxItems": high} if high is not None else {})}

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise _wrong(f"{at}.properties", "it is no object", "map names to schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _wrong(f"{at}.required", "it is no list of names", "list property names")
        if len(properties) + len(required) > MAX_PROPERTIES:
            raise _wrong(f"{at}.properties", f"it has more than {MAX_PROPERTIES} properties", "make it smaller")
        more = schema.get("additionalProperties", "properties" not in schema and not required)
        opened = None if more is False else self.node(more, f"{at}.additionalProperties", depth + 1)
        result = {name: self.node(one, f"{at}.properties.{name}", depth + 1) for name, one in properties.items()}
        for name in required:  # one that is only required is as the others that have no name
            if name not in result:
                if opened is None and "additionalProperties" in schema:
                    raise _wrong(f"{at}.required", f"{name[:80]!r} is required and not allowed", "add it to properties")
                result[name] = {} if opened is None else opened
        low, high = _counts(schema, "minProperties", "maxProperties", at)
        if low > 1 and opened is not None:
            raise _wrong(
                f"{at}.minProperties", "names may repeat, so that many are not promised", "ask for at most 1, or name the properties"
            )
        if high is not None and high < len(set(required)):
            raise _wrong(f"{at}.maxProperties", f"{len(set(required))} properties are required", "allow as many")
        if opened is None and low > len(result):
            raise _wrong(f"{at}.minProperties", f"{low} are wanted and {len(result)} are allowed", "allow more properties")
        return {
            "type": "object",
            **({"properties": result} if result else {}),
            **({"required": list(dict.fromkeys(required))} if required else {}),
            "additionalProperties": False if opened is None else opened,
            **({"minProperties": low} if low else {}),
            **({"maxProperties": high} if high is not None else {}),
        }


def _string(schema: Mapping[str, Any], at: str) -> dict[str, Any]:
    low, high = _counts(schema, "minLength", "maxLength", at)
    bounded = low > 0 or high is not None
    if sum((bounded, "pattern" in schema, "format" in schema)) > 1:
        raise _wrong(at, "only one of pattern, format and bounds on the length would be followed", "keep one of them")
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise _wrong(f"{at}.format", f"format {_shown(schema['format'])} is not followed", f"known are {', '.join(FORMATS)}")
        return {"type": "string", "format": schema["format"]}
    if "pattern" in schema:
        return {"type": "string", "pattern": _pattern(schema["pattern"], f"{at}.pattern")}
    if bounded:  # xgrammar's own bounds let control characters in, which JSON does not
        return {"type": "string", "pattern": rf"^[\s\S]{{{low},{'' if high is None else high}}}$"}
    return {"type": "string"}


def _pattern(pattern: Any, at: str) -> str:
    """xgrammar writes what a pattern spells out as it is, so nothing may be in it that JSON would escape."""
    if not isinstance(pattern, str) or not pattern:
        raise _wrong(at, "it is no regular expression", "give a string")
    check_repeats(pattern, at)
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == '"' or character < " ":
            raise _wrong(at, f"{character!r} within a pattern would be written as it is, which is not JSON", "leave it out of the pattern")
        if character == "\\":
            position += 1
            if pattern[position : position + 1] not in _PATTERN_ESCAPES:
                raise _wrong(
                    at,
                    f"the escape {pattern[position - 1 : position + 1]!r} is not followed within a pattern",
                    "write the character itself",
                )
        position += 1
    return f"^{unanchored(pattern, at)}$"


def _number(kind: str, schema: Mapping[str, Any], at: str) -> dict[str, Any]:
    bounds = {word: schema[word] for word in BY_TYPE["number"] if word in schema}
    for word, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_BOUND:
            raise _wrong(f"{at}.{word}", f"{_shown(value)} is no number between -1e15 and 1e15", "give one")
        if round(value, 6) != value:
            raise _wrong(f"{at}.{word}", f"{value} has more than 6 decimals", "round it")
    if "multipleOf" in schema:
        step = schema["multipleOf"]
        if bounds or kind != "integer" or not isinstance(step, int) or isinstance(step, bool) or not 1 <= step <= 100:
            raise _wrong(f"{at}.multipleOf", "it is followed for integers without bounds, from 1 to 100", "leave it out")
        return {"type": kind, "multipleOf": step}
    if kind == "integer":  # in whole numbers
        low = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
        low += [math.floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
        high = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
        high += [math.ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
        if low and high and max(low) > min(high):
            raise _wrong(at, f"no integer is from {max(low)} to {min(high)}", "widen the bounds")
        return {"type": kind, **({"minimum": max(low)} if low else {}), **({"maximum": min(high)} if high else {})}
    return {"type": kind, **bounds}


def _counts(schema: Mapping[str, Any], least: str, most: str, at: str) -> tuple[int, int | None]:
    for word in (least, most):
        value = schema.get(word, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
            raise _wrong(f"{at}.{word}", f"{_shown(value)} is no count from 0 to {MAX_REPEAT:,}", "give one")
    low, high = schema.get(least, 0), schema.get(most)
    if high is not None and low > high:
        raise _wrong(f"{at}.{most}", f"it is {high}, and {least} is {low}", "give a larger one")
    return low, high


def _check_words(schema: Mapping[str, Any], at: str) -> None:
    for word in schema:
        if word in KNOWN or word.startswith("x-"):
            continue
        if word in REFUSED:
            raise _wrong(f"{at}.{word}", f"{word} is not followed", "leave it out, or say it otherwise")
        near = difflib.get_close_matches(word[:80], KNOWN, n=1)
        raise _wrong(f"{at}.{word[:80]}", "it is no keyword of JSON Schema", f"did you mean {near[0]!r}?" if near else "leave it out")


def _types(schema: Mapping[str, Any], at: str) -> list[str] | None:
    """The types that are allowed; by the keywords where none is named; None for any."""
    named = schema.get("type")
    if named is None:
        found = {kind for kind, words in BY_TYPE.items() if words & schema.keys()} - (
            {"integer"} if "multipleOf" not in schema else {"number"}
        )
        if len(found) > 1:
            raise _wrong(at, "its keywords belong to several types", "say which type")
        return sorted(found) or None
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list) or not types or not all(isinstance(kind, str) and kind in BY_TYPE for kind in types):
        raise _wrong(f"{at}.type", f"{_shown(named)} is no type", f"types are {', '.join(BY_TYPE)}")
    for word in schema.keys() - ANNOTATIONS - {"type"} - set(COMBINED):
        if not word.startswith("x-") and not any(word in BY_TYPE[kind] for kind in types):
            raise _wrong(f"{at}.{word}", f"it says nothing about a {' or '.join(types)}", "leave it out, or change type")
    return list(dict.fromkeys(types))


def _types_of(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("boolean",)
    kinds = {str: "string", dict: "object", list: "array", type(None): "null"}
    return ("number", "integer") if isinstance(value, int | float) else (kinds[type(value)],)


def _is_of(value: Any, types: list[str] | None) -> bool:
    if types is None:
        return True
    if isinstance(value, float) and not value.is_integer():
        return "number" in types
    return any(kind in types for kind in _types_of(value))


def _apart(one: Mapping[str, Mapping[str, frozenset[str]]], other: Mapping[str, Mapping[str, frozenset[str]]]) -> bool:
    """Whether in every type that both have, some required property (or the value itself) cannot be the same."""
    return all(
        any(not one[kind][name] & other[kind][name] for name in one[kind].keys() & other[kind].keys()) for kind in one.keys() & other.keys()
    )


def _text(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value, sort_keys=True)


def _shown(value: Any) -> str:
    """A value as JSON writes it, of bounded length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "..."


def _wrong(at: str, problem: str, fix: str) -> InputError:
    return InputError(f"{at}: {problem}", fix, field=at)
