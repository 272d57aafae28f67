"""Conversations into tokens, with a flag a token: is it the assistant's, to be learnt?

The model's own template renders the conversation, as it will when it is served, and the text is encoded once, so the tokens are those of
`transformers.apply_chat_template`. Which of them count comes from the template's `{% generation %}` marks where it has them, else from
rendering prefixes: an assistant's turn begins where the conversation before it, with the generation prompt, ends, and goes to its
end-of-turn token, which counts too: a model that never learns it does not stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import ArmillaryError, FormatError, InputError
from armillary.data.readers import Record
from armillary.data.shard_writer import TokenDocument
from armillary.models.chat_template import ChatTemplate
from armillary.models.tokenizer import Tokenizer

MAX_MESSAGES: Final = 10_000
_BEGIN, _END = "\ufdd0", "\ufdd1"  # Unicode's noncharacters: no text has them
_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_GENERATION: Final = re.compile(r"\{%[-+]?\s*generation\b")
Span = tuple[int, int]  # characters of the rendered text


class _Marks(jinja2.ext.Extension):
    """`{% generation %}` with a mark at either end of its body."""

    tags = {"generation"}  # noqa: RUF012
    priority = 200  # after the sandbox's own reading of the tag, which it replaces

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)]
        return [marks[0], *body, marks[1]]


class ChatEncoder(ChatTemplate):
    """A chat template that says which part of what it writes is the assistant's."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        super().__init__(source, tokenizer)
        self._marked = _GENERATION.search(source) is not None
        self._end = self.end_of_turn()
        if self._marked:
            self._environment.add_extension(_Marks)
            self._template = self._environment.from_string(source)

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenDocument:
        """The conversation's tokens, and which are scored: those that lie wholly in the assistant's text or end its turn.

        Raises `InputError` when a message holds the model's control tokens or when no token is the assistant's, and what `render` raises.
        """
        self._check(messages, tools)
        text = self.render(messages, add_generation_prompt=False, tools=tools)
        text, spans = _unmarked(text) if self._marked else (text, self._diffed(text, messages, tools))
        ids = self._tokenizer.encode(text, special=False)
        scored = np.zeros(len(ids), dtype=bool)
        begin, end = self._characters(text, ids)
        for first, last in spans:
            scored |= (begin >= first) & (end <= last) & (end > begin)
        if not scored.any():
            raise InputError(
                "no token of the conversation is the assistant's", "give it an assistant's message with a text", field="messages"
            )
        return TokenDocument(np.array(ids, dtype=np.int64), scored)

    def _check(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> None:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not 1 <= len(messages) <= MAX_MESSAGES:
            raise InputError(
                f"the conversation is not a list of 1 to {MAX_MESSAGES:,} messages", "give role and content of each", field="messages"
            )
        control = [*(self._tokenizer.token_text(token) for token in sorted(self._tokenizer.special_ids)), _BEGIN, _END]
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            # Most templates write any role: a misspelt assistant would be learnt as nobody's text.
            if isinstance(role, str) and role not in _ROLES and role not in self.source:
                raise InputError(
                    f"message {index} has the role {role[:40]!r}, which the chat template does not name",
                    f"use one of {', '.join(_ROLES)}",
                    field=f"messages[{index}].role",
                )
        told = [(f"message {index}", f"messages[{index}]", message) for index, message in enumerate(messages)]
        for what, field, value in [*told, ("the list of tools", "tools", tools)]:
            for found in (token for text in _strings(value) for token in control if token in text):
                raise InputError(
                    f"{what} holds the control token {found!r}",
                    "take it out: it would end or begin a turn in the middle of a text",
                    field=field,
                )

    def _diffed(self, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[Span]:
        """The assistant's turns in the rendered text, by rendering what comes before each."""
        mark = None if self._end is None else self._tokenizer.token_text(self._end)
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self.render(messages[:index], tools=tools) if index else self._opening(message, tools)
            upto = self.render(messages[: index + 1], add_generation_prompt=False, tools=tools)
            if not text.startswith(before) or (mark is None and not text.startswith(upto)):
                raise InputError(
                    f"the chat template writes what precedes message {index} otherwise once it has been answered",
                    "mark the assistant's text in the template with {% generation %} ... {% endgeneration %}",
                )
            # No text holds a control token, so the first one after the beginning is the turn's own, unless the turn ends with another.
            found = text.find(mark, len(before)) if mark else -1
            end = found + len(mark) if mark and found >= 0 else len(text)
            spans.append((len(before), min(end, len(upto)) if text.startswith(upto) else end))
        return spans

    def _opening(self, message: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """What the template writes before the text of a conversation's first message: often a system message of its own."""
        before, found, _ = self.render([{**message, "content": _BEGIN}], add_generation_prompt=False, tools=tools).partition(_BEGIN)
        if not found:
            raise InputError(
                "the conversation begins with the assistant, and the chat template leaves its text out",
                "begin with the user's message",
                field="messages",
            )
        return before

    def _characters(self, text: str, ids: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each token begins and ends in the text, in characters; a token that ends within a character counts that one whole."""
        ends = np.cumsum([len(self._tokenizer.token_bytes(token)) for token in ids], dtype=np.int64)
        joined = b"".join(map(self._tokenizer.token_bytes, ids))
        raw = text.encode()
        lead = 1 if self._tokenizer.space_prefix and joined == b" " + raw else 0
        if joined[lead:] != raw:  # a normaliser changed the text: the library kept account of it
            offsets = np.array(self._tokenizer.backend.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)
            return offsets[:, 0], offsets[:, 1]
        # The character at every byte, and one past the last: [bytes + 1].
        leading = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80
        number = np.append(np.cumsum(leading) - 1, len(text))
        begins = np.maximum(np.concatenate([[0], ends[:-1]]) - lead, 0)
        last = np.maximum(ends - lead, 1) - 1
        return number[begins], np.where(ends - lead > begins, number[last] + 1, number[begins])


def chat_documents(
    records: Iterable[Record], template: ChatEncoder, field: str = "messages", tools: str = "tools"
) -> Iterator[TokenDocument]:
    """The documents of records that hold a conversation each. Errors name the record."""
    for record in records:
        messages = record.values.get(field)
        if messages is None:
            names = ", ".join(sorted(map(str, record.values)))[:200]
            raise FormatError(f"{record.where} has no field {field!r}", f"name the field that holds the messages; the record has: {names}")
        try:
            yield template.encode(messages, record.values.get(tools) or None)
        except ArmillaryError as error:
            raise FormatError(f"{record.where}: {error.problem}", error.fix) from error


def _strings(value: Any) -> Iterator[str]:
    """Every text in JSON data, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for part in item for text in _strings(part))
    elif isinstance(value, Sequence):
        yield from (text for part in value for text in _strings(part))


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without its marks, and what lay between them."""
    parts, spans, length, begun = [], [], 0, None
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN:
            begun = length
        elif part == _END:
            if begun is None:
                raise InputError("the chat template nests {% generation %} blocks", "let none lie within another")
            spans.append((begun, length))
            begun = None
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans
