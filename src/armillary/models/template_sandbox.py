"""Where templates from strangers run: Hugging Face's Jinja environment, unable to reach Python, allocate without bound or run without end.

Jinja's own sandbox keeps a template away from Python objects. What it leaves open is closed here: every loop and call looks at the clock,
every expression that can build a long value (`*`, `+`, `~`, `%`, padding, joining, replacing) is bounded before it is evaluated.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

MAX_OUTPUT_CHARACTERS = 16_000_000
MAX_SECONDS = 5.0
_MAX_INTEGER = 100_000  # any integer argument of a filter or a string method: widths, counts, indents
_MAX_POWER = 4096
_WIDE_FORMAT = re.compile(r"[0-9]{4}|\*")


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Trimmed blocks, loop controls, `raise_exception`, `strftime_now`, plain `tojson`: what chat templates are written for."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._clock = threading.local()  # the deadline of the rendering that this thread is at
        self.filters = {name: self._bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def start(self) -> None:
        """Begins a rendering on this thread: it may take `MAX_SECONDS`."""
        self._clock.deadline = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        if time.monotonic() > getattr(self._clock, "deadline", float("inf")):
            raise jinja2.TemplateRuntimeError(f"the template ran for more than {MAX_SECONDS:g} s")

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Rewrite().visit(super()._parse(source, name, filename))
        return tree

    # -- what templates evaluate ------------------------------------------------------------------------------

    def ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        """A loop's values, with a look at the clock before each."""
        self.check()
        for value in values:
            self.check()
            yield value

    def concatenate(self, *values: Any) -> str:
        """The operator `~`."""
        texts = [str(value) for value in values]
        _bound("joins a text", sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check()
        if operator == "**" and not (_small(left) and _small(right)):
            raise jinja2.TemplateRuntimeError("the template raises a number beyond bounds to a power")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int):
                    _bound("repeats a value", len(many) * times)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _bound("joins a value", len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left, ())
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _check_text_call(getattr(obj, "__name__", ""), owner, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """What `'...'.format` becomes in a template."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = str(getattr(value, "__self__", ""))

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(form, (*args, *kwargs.values()))
            text: str = wrapped(*args, **kwargs)
            return text

        return bounded

    def _bounded_filter(self, name: str, function: Any) -> Any:
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.check()
            # Some filters take the environment or a context first; the piped value is the first plain one.
            plain = [a for a in args if not isinstance(a, jinja2.Environment | jinja2.runtime.Context | jinja2.nodes.EvalContext)]
            if name == "join" and plain:
                plain[0] = list(plain[0])
                _bound("joins a list", _joined_length(plain[0], (*plain[1:], kwargs.get("d", ""))[0]))
                args = (*args[: len(args) - len(plain)], *plain)
            elif plain:
                _check_text_call(name, str(plain[0]) if name in ("replace", "format") else "", tuple(plain[1:]), kwargs)
            return function(*args, **kwargs)

        if hasattr(function, "jinja_pass_arg"):  # how Jinja knows what a filter takes first
            bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return bounded


class _Rewrite(jinja2.visitor.NodeTransformer):
    """Loops go through `ticking`, `~` through `concatenate`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.iter = _environment_call("ticking", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Call:
        self.generic_visit(node)
        return _environment_call("concatenate", node.nodes, node.lineno)


def _environment_call(name: str, arguments: list[Any], line: int) -> jinja2.nodes.Call:
    call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(line)
    return call


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# -- bounds -----------------------------------------------------------------------------------------------------


def _bound(what: str, characters: int) -> None:
    if characters > MAX_OUTPUT_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"the template {what} beyond {MAX_OUTPUT_CHARACTERS:,} characters")


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MAX_POWER


def _check_text_call(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bounds what a string method or a filter of this name would build."""
    if any(isinstance(value, int) and abs(value) > _MAX_INTEGER for value in (*args, *kwargs.values())):
        raise jinja2.TemplateRuntimeError(f"the template calls {name!r} with a number beyond {_MAX_INTEGER:,}")
    if name in ("format", "format_map"):
        _check_format(text, args)
    if name == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        _bound("replaces", len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    if name == "join" and args:
        values = list(args[0]) if isinstance(args[0], list | tuple | str) else []
        _bound("joins a list", _joined_length(values, text))


def _check_format(form: str, args: tuple[Any, ...]) -> None:
    if _WIDE_FORMAT.search(form) or any(isinstance(value, int) and abs(value) > _MAX_INTEGER for value in args):
        raise jinja2.TemplateRuntimeError("the template formats a text with a width beyond bounds")


def _joined_length(values: list[Any], separator: Any) -> int:
    return sum(len(value) if isinstance(value, str) else 32 for value in values) + len(values) * len(str(separator))


# -- what chat templates call -----------------------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Not Jinja's own filter: that one escapes HTML characters, which no model was trained on.
    if indent is not None and not 0 <= indent <= 16:
        raise jinja2.TemplateRuntimeError("the template indents JSON beyond bounds")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    if _WIDE_FORMAT.search(form):
        raise jinja2.TemplateRuntimeError("the template formats a date with a width beyond bounds")
    return datetime.datetime.now().strftime(form)
