"""Chat messages to the prompt text that a model was trained on: its own Jinja template, rendered in a sandbox.

A template comes with the weights, from somebody else; `template_sandbox` says what it may do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from armillary.core.errors import InputError
from armillary.models.template_sandbox import MAX_OUTPUT_CHARACTERS, TemplateEnvironment
from armillary.models.tokenizer import Tokenizer

MAX_SOURCE_CHARACTERS = 1_000_000
_MARK = "armillary-turn"
_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)


class ChatTemplate:
    """A compiled template. Raises `InputError` when the source is not valid Jinja."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise InputError(
                f"the chat template has {len(source):,} characters; at most {MAX_SOURCE_CHARACTERS:,} are read", "use the model's own"
            )
        self.source = source
        self._tokenizer = tokenizer
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, *_FAULTS) as error:
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
        Safe to call from several threads.
        """
        names = {"bos_token": self._tokenizer.bos, "eos_token": self._tokenizer.eos}
        written = {name: "" if token is None else self._tokenizer.token_text(token) for name, token in names.items()}
        checked = [_message(index, message) for index, message in enumerate(messages)]
        if not checked:
            raise InputError("the conversation has no message", "send at least one", field="messages")
        values = {**written, **variables, "messages": checked, "tools": tools, "documents": None}
        parts, length = [], 0
        try:
            self._environment.start()
            for part in self._template.generate(values, add_generation_prompt=add_generation_prompt):
                self._environment.check()
                length += len(part)
                if length > MAX_OUTPUT_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"the prompt exceeds {MAX_OUTPUT_CHARACTERS:,} characters")
                parts.append(part)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template refuses these messages: {_first_line(error)}", "change the roles or their order", field="messages"
            ) from error
        except _FAULTS as error:
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
