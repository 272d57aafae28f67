"""How a field may be written, for /openapi.json, where that is more than what the server makes of it."""

from __future__ import annotations

from typing import Any

from pydantic import WithJsonSchema

Json = dict[str, Any]
TEXT: Json = {"type": "string"}
TOKENS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def either(*ways: Json) -> WithJsonSchema:
    """Any one of `ways`."""
    return WithJsonSchema({"anyOf": list(ways)})


def some(items: Json, most: int, least: int = 1) -> Json:
    """A list of `least` to `most` items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def typed(*kinds: str, required: bool = True) -> Json:
    """An object whose `type` says which of `kinds` it is."""
    return {"type": "object", "required": ["type"] if required else [], "properties": {"type": {"enum": list(kinds)}}}


PART: Json = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "additionalProperties": False,
}
TEXT_PARTS = either(TEXT, some(PART, 4096, 0))
BIASES = WithJsonSchema(
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
    }
)
