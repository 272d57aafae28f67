"""Text that a model wrote, read as tool calls: JSON or Python call syntax, with nothing evaluated."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Collection
from typing import Any

from armillary.serve.tools.definitions import Call
from armillary.serve.tools.formats import CallFormat

_NAMES = {"true": True, "false": False, "null": None}
MAX_CHARACTERS = 262_144


def read_calls(text: str, row: CallFormat, known: Collection[str]) -> list[Call] | None:
    """The calls that `text`, which stands between the row's tags, consists of; None when it is not whole and valid calls of known tools."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        found = python_calls(text, _literal) if row.syntax == "python" else _json(text, row)
        written = [(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)) for name, arguments in found]
        "".join(arguments for _, arguments in written).encode()  # a lone surrogate can be written in both, and sent in neither
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if not written or any(name not in known for name, _ in written):
        return None
    return [Call(name, arguments) for name, arguments in written]


def _json(text: str, row: CallFormat) -> list[tuple[str, dict[str, Any]]]:
    value = json.loads(text, parse_constant=_no_constant)
    found = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get(row.name_field), str):
            raise ValueError("not a call")
        arguments = call.get(row.arguments_field, {})
        if isinstance(arguments, str):  # some models quote them, as the API does
            arguments = json.loads(arguments, parse_constant=_no_constant)
        if not isinstance(arguments, dict) or call.keys() - {row.name_field, row.arguments_field, "id", "type"}:
            raise ValueError("not a call")
        found.append((call[row.name_field], arguments))
    return found


def python_calls(text: str, value: Callable[[ast.expr], Any]) -> list[tuple[str, dict[str, Any]]]:
    """`f(a=1)` or `[f(a=1), g(b=[2])]`; names may be dotted, `value` reads an argument. Raises ValueError or SyntaxError."""
    body = ast.parse(text.strip(), mode="eval").body
    calls = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
    return [_python_call(call, value) for call in calls]


def _python_call(node: ast.expr, value: Callable[[ast.expr], Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("not a call with named arguments")
        arguments[keyword.arg] = value(keyword.value)
    return _dotted(node.func), arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("not a name")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        if (
            isinstance(node.value, bytes | complex)
            or node.value is ...
            or (isinstance(node.value, float) and not math.isfinite(node.value))
        ):
            raise ValueError("not a JSON value")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("not a number")
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no string")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.Name) and node.id in _NAMES:  # JSON's words within a Python call
        return _NAMES[node.id]
    raise ValueError("not a literal")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
