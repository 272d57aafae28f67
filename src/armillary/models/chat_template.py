"""Chat messages to the prompt text that a model was trained on: its own Jinja template, rendered in a sandbox.

A template comes with the weights, from somebody else: it may not reach Python objects, allocate without bound or run without end.
The environment is the one that Hugging Face templates are written for (trimmed blocks, `raise_exception`, `strftime_now`, `tojson`).
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from armillary.core.errors import InputError
from armillary.models.tokenizer import Tokenizer

MAX_SOURCE_CHARACTERS = 1_000_000
MAX_OUTPUT_CHARACTERS = 16_000_000
MAX_SECONDS = 5.0
_MAX_POWER = 4096
_MARK = "armillary-turn"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds on what one expression may build and on the time that a rendering may take."""

    intercepted_binops = frozenset({"*", "**", "%"})
    deadline = float("inf")

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"the template ran for more than {MAX_SECONDS:g} s")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check()
        if operator == "**" and not (_small(left) and _small(right)):
            raise jinja2.TemplateRuntimeError("the template raises a number beyond bounds to a power")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > MAX_OUTPUT_CHARACTERS:
                    raise jinja2.TemplateRuntimeError("the template repeats a value beyond bounds")
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("the template formats with %, which is not supported; use ~ and filters")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check()
        name = getattr(obj, "__name__", "")
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs") and args and not (isinstance(args[0], int) and args[0] < 1000):
            raise jinja2.TemplateRuntimeError(f"the template pads a string beyond bounds with {name}")
        return super().call(context, obj, *args, **kwargs)


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MAX_POWER


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Not Jinja's own filter: that one escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    for padding in ("center", "format", "indent"):
        environment.filters[padding] = _bounded(padding, environment.filters[padding])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _bounded(name: str, inner: Any) -> Any:
    def outer(value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "format" or any(isinstance(a, int) and a > 1000 for a in (*args, *kwargs.values())):
            raise jinja2.TemplateRuntimeError(f"the template uses the filter {name!r} beyond bounds")
        return inner(value, *args, **kwargs)

    return outer


class ChatTemplate:
    """A compiled template. Raises `InputError` when the source is not valid Jinja."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise InputError(
                f"the chat template has {len(source):,} characters; at most {MAX_SOURCE_CHARACTERS:,} are read", "use the model's own"
            )
        self.source = source
        self._tokenizer = tokenizer
        try:
            _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise InputError(f"the chat template is not valid Jinja ({_first_line(error)})", "use the model's own template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text; encode it with `special=False`, for the template writes bos itself.

        Raises `InputError` for messages that the template refuses, with its own words, and for a template that exceeds its bounds.
        """
        # An environment a rendering: the deadline belongs to this call alone, whatever other threads render.
        environment = _environment()
        environment.deadline = time.monotonic() + MAX_SECONDS
        names = {"bos_token": self._tokenizer.bos, "eos_token": self._tokenizer.eos}
        written = {name: "" if token is None else self._tokenizer.token_text(token) for name, token in names.items()}
        checked = [_message(index, message) for index, message in enumerate(messages)]
        if not checked:
            raise InputError("the conversation has no message", "send at least one", field="messages")
        parts, length = [], 0
        try:
            template = environment.from_string(self.source)
            stream = template.generate(
                **{**written, **variables}, messages=checked, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            )
            for part in stream:
                environment.check()
                length += len(part)
                if length > MAX_OUTPUT_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"the prompt exceeds {MAX_OUTPUT_CHARACTERS:,} characters")
                parts.append(part)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template refuses these messages: {_first_line(error)}", "change the roles or their order", field="messages"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(
                f"the chat template fails on these messages ({type(error).__name__}: {_first_line(error)})",
                "give every message a role and a text content",
                field="messages",
            ) from error
        return "".join(parts)

    def end_of_turn(self) -> int | None:
        """The control token that the template writes right after an assistant's text, None when it writes none (or fails)."""
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}], add_generation_prompt=False)
        except InputError:
            return None
        _, found, rest = text.rpartition(_MARK)
        ids = self._tokenizer.encode(rest.lstrip()[:200], special=False) if found else []
        return ids[0] if ids and ids[0] in self._tokenizer.special_ids else None


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message with its content as text: OpenAI's list of text parts is joined."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {index} has no role", "give each message a role and a content", field=f"messages[{index}].role")
    out = dict(message)
    content = out.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise InputError(
                    f"message {index} has a part of type {str(kind)[:40]!r}",
                    "this model reads text only",
                    field=f"messages[{index}].content",
                )
            texts.append(part["text"])
        content = out["content"] = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise InputError(
            f"the content of message {index} is of type {type(content).__name__}", "give a string", field=f"messages[{index}].content"
        )
    return out


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
