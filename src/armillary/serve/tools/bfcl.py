"""How well a model calls functions, as the Berkeley Function Calling Leaderboard scores it (Patil et al., ICML 2025): its AST check.

Per call: the name; every required parameter; none that is unknown; each value's type, and the value among the accepted ones, where ""
stands for "may be left out". An int will do for a float, but a bool is no int. Strings are compared without ` ,./-_*^`, without
case, and with ' for ". Parallel calls may come in any order. Where no function fits, calling none is right.

Only Python's categories: Java's and JavaScript's values are written in those languages.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from armillary.core.errors import FormatError
from armillary.serve.tools.reading import python_calls

TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict, "any": str}
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_DROPPED = re.compile(r"[ ,./\-_*^]")

Calls = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `answers` are the accepted calls, `[{name: {parameter: [accepted values]}}]`; none where no function fits.

    `kind`: `simple` (one function, one call), `multiple` (one call of several functions), `parallel` (several calls),
    `irrelevance` (no call), `relevance` (some call).
    """

    id: str
    kind: Literal["simple", "multiple", "parallel", "irrelevance", "relevance"]
    messages: tuple[Mapping[str, Any], ...]
    functions: tuple[Mapping[str, Any], ...]
    answers: tuple[Mapping[str, Any], ...] = ()

    def tools(self) -> list[dict[str, Any]]:
        """The functions as the API takes them: types by JSON Schema's names, and no dots in names."""
        return [
            {
                "type": "function",
                "function": {
                    "name": _api_name(function["name"]),
                    "description": function.get("description", ""),
                    "parameters": _as_schema(function["parameters"]),
                },
            }
            for function in self.functions
        ]


@dataclass(frozen=True, slots=True)
class Score:
    """`errors` has what is wrong by case id; cases that are right are not in it."""

    total: int
    errors: Mapping[str, str]

    @property
    def accuracy(self) -> float:
        return 1.0 - len(self.errors) / self.total if self.total else 0.0


def read_output(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Calls in Python's syntax as the benchmark reads them from text: brackets may be missing; None for what is no list of calls."""
    text = text.strip("`\n ")
    text = (text if text.startswith("[") else "[" + text) + ("" if text.endswith("]") else "]")
    try:
        return python_calls(text.strip("'"), _value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def score(cases: Sequence[Case], outputs: Mapping[str, Calls | None]) -> Score:
    """`outputs` by case id: the calls that the model made, None for an answer that could not be read."""
    errors = {case.id: wrong for case in cases if (wrong := check(case, outputs.get(case.id))) is not None}
    return Score(len(cases), errors)


def check(case: Case, calls: Calls | None) -> str | None:
    """What is wrong with an answer; None when it is right."""
    if case.kind == "irrelevance":
        return "a function was called, and none fits" if calls else None
    if case.kind == "relevance":
        return None if calls else "no function was called"
    if calls is None:
        return "no calls could be read"
    if len(calls) != len(case.answers):
        return f"{len(calls)} calls instead of {len(case.answers)}"
    if case.kind != "parallel":
        return _check_call(case, case.answers[0], calls[0])
    left = list(calls)
    for answer in case.answers:
        found = next((index for index, call in enumerate(left) if _check_call(case, answer, call) is None), None)
        if found is None:
            return f"no call is {next(iter(answer))} as it should be"
        del left[found]
    return None


def _check_call(case: Case, answer: Mapping[str, Any], call: tuple[str, Mapping[str, Any]]) -> str | None:
    (name, accepted), (called, arguments) = next(iter(answer.items())), call
    function = next((one for one in case.functions if one["name"] == name), None)
    if function is None:
        raise FormatError(f"{case.id}: the accepted answer calls {name!r}, which is not among the functions", "check the files")
    if case.kind == "simple":
        function = case.functions[0]
    if called not in (function["name"], _api_name(function["name"])):
        return f"{called} is called instead of {function['name']}"
    properties = function["parameters"]["properties"]
    for parameter in function["parameters"].get("required", ()):
        if parameter not in arguments:
            return f"{parameter} is missing"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in accepted:
            return f"{parameter} is unexpected"
        wrong = _check_value(parameter, value, accepted[parameter], properties[parameter])
        if wrong is not None:
            return wrong
    for parameter, values in accepted.items():
        if parameter not in arguments and "" not in values:
            return f"{parameter} is left out"
    return None


def _check_value(parameter: str, value: Any, accepted: Sequence[Any], described: Mapping[str, Any]) -> str | None:
    kind = described["type"]
    expected = TYPES[kind]
    inner = TYPES[described["items"]["type"]] if kind in ("array", "tuple") else None
    if kind == "tuple" and isinstance(value, tuple):
        value = list(value)
    if kind == "float" and type(value) is int:
        value = float(value)
    fits, variable = _type_fits(value, accepted, expected, inner)
    if not fits:
        return f"{parameter} is a {type(value).__name__} instead of {kind}"
    if variable:  # the accepted values are of another type than declared: a variable's name, or ints for a float
        right = value in accepted
    elif expected is dict:
        right = any(_dict_matches(value, one) for one in accepted if one != "")
    elif expected is list and inner is dict:
        right = any(
            len(value) == len(one) and all(part != "" and _dict_matches(item, part) for item, part in zip(value, one, strict=True))
            for one in accepted
        )
    elif expected is str:
        right = _plain(value) in [_plain(one) for one in accepted if isinstance(one, str)]
    elif expected is list:
        right = list(map(_plain, value)) in [list(map(_plain, one)) for one in accepted]
    else:
        right = value in accepted
    return None if right else f"{parameter} is {value!r}"


def _type_fits(value: Any, accepted: Sequence[Any], expected: type, inner: type | None) -> tuple[bool, bool]:
    """Whether the type is right, and whether it is right as a variable: of the accepted values' type, which is not the declared one."""
    kind = next((type(one) for one in accepted if one != ""), None)
    variable = kind is not None and kind is not expected
    items: Any = value
    if type(value) is expected:
        if inner is None:
            return True, variable
        for one in accepted:  # items must fit those of one accepted list; "" says nothing about items
            if not isinstance(one, list) or all(_type_fits(item, one, inner, None)[0] for item in items):
                return True, variable
        return False, False
    return (True, True) if kind is not None and type(value) is kind else (False, False)


def _dict_matches(value: Any, accepted: Mapping[str, Sequence[Any]]) -> bool:
    return (
        isinstance(value, dict)
        and all(key in accepted and _plain(one) in list(map(_plain, accepted[key])) for key, one in value.items())
        and all(key in value or "" in values for key, values in accepted.items())
    )


def _plain(value: Any) -> Any:
    return _DROPPED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _api_name(name: str) -> str:
    return name.replace(".", "_")


def _as_schema(described: Any) -> Any:
    """BFCL's types are Python's; what else it writes beside a type is JSON Schema."""
    if isinstance(described, list):
        return [_as_schema(one) for one in described]
    if not isinstance(described, Mapping):
        return described
    result = {key: _as_schema(value) for key, value in described.items() if key not in ("default", "optional", "format", "properties")}
    if isinstance(described.get("properties"), Mapping):  # whose names may be any of those
        result["properties"] = {name: _as_schema(value) for name, value in described["properties"].items()}
    if isinstance(described.get("type"), str):
        result["type"] = _SCHEMA_TYPES.get(described["type"], described["type"])
    return result


def _value(node: ast.expr) -> Any:
    """An argument as the benchmark reads it: literals (tuples stay tuples), numbers added up, and anything else as its source text."""
    if isinstance(node, ast.Constant):
        return "..." if node.value is ... else node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.List):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(one) for one in node.elts)
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("not a literal")
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    if isinstance(node, ast.BinOp):
        return _sum(node)
    if isinstance(node, ast.Call) and node.keywords:
        ((name, arguments),) = python_calls(ast.unparse(node), _value)
        return {name: arguments}
    if isinstance(node, ast.Name | ast.Call | ast.Subscript):
        return ast.unparse(node)
    raise ValueError("not a literal")


def _sum(node: ast.BinOp) -> Any:
    left, right = _value(node.left), _value(node.right)
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (left, right)):
        raise ValueError("not numbers")
    try:
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    except ArithmeticError as error:
        raise ValueError("not a number") from error
    raise ValueError("not a literal")
