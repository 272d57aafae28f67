"""Events of the engine as OpenAI objects: whole answers, or chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from armillary import __version__
from armillary.serve.http.chat_message import ChatMessage
from armillary.serve.http.errors import APIError, as_api_error
from armillary.serve.http.logprobs import CompletionColumns, chat_entry, join
from armillary.serve.request import Event, Request
from armillary.serve.tools.definitions import Toolbox

if TYPE_CHECKING:
    from armillary.serve.service import Service

Json = dict[str, Any]
FINGERPRINT = f"armillary-{__version__}"


def failure(event: Event) -> APIError | None:
    """What to tell the client when a request ended without an answer."""
    if event.finish_reason == "error":
        return as_api_error(event.error or RuntimeError("the engine ended the request"))
    if event.finish_reason == "cancelled":
        return APIError(503, "the request was cancelled before it was complete: send it again", type="server_error", code="cancelled")
    return None


class WholeAnswer(Protocol):
    """An answer that is told when it is complete."""

    def add(self, choice: int, event: Event) -> None:
        """Keep an event for `result`."""
        ...

    def result(self) -> Json:
        """The whole answer."""
        ...


class Answer(WholeAnswer, Protocol):
    """One that may be told in chunks too: objects of `head`, one of `choices`, and, with `include_usage`, a usage that is null until the end."""

    head: Json
    include_usage: bool

    def choices(self, choice: int, event: Event) -> Iterator[Json]:
        """The choice of each of the stream's chunks for one event."""
        ...

    def usage_chunk(self) -> Json | None:
        """The stream's last object, when it was asked for."""
        ...


class _Answer:
    def __init__(
        self, service: Service, answer_id: str, kind: str, choices: int, prompt_tokens: int, *, n: int, include_usage: bool
    ) -> None:
        self.id = answer_id
        self.tokenizer = service.tokenizer
        self._eos = service.engine.eos_ids
        self.head = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        self.include_usage = include_usage
        self._prompt_tokens = prompt_tokens
        self._n = n
        self._output_tokens = 0
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices
        self.requests: Sequence[Request] = ()

    def _is_text(self, choice: int, event: Event) -> bool:
        """Whether the event's token is part of the answer's text: the token that ended it is not."""
        if event.token is None:
            return False
        sampling = self.requests[choice].sampling
        return event.token not in sampling.stop_token_ids and (sampling.ignore_eos or event.token not in self._eos)

    def _count(self, event: Event) -> None:
        self._output_tokens += event.token is not None

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._output_tokens,
            "total_tokens": self._prompt_tokens + self._output_tokens,
            # Of a prompt's n choices the first counts: what the others reuse may be what it has just computed.
            "prompt_tokens_details": {"cached_tokens": sum(request.reused for request in self.requests[:: self._n])},
        }

    def usage_chunk(self) -> Json | None:
        return {**self.head, "choices": [], "usage": self._usage()} if self.include_usage else None


class ChatAnswer(_Answer):
    """`chat.completion`, or a stream of `chat.completion.chunk`."""

    def __init__(
        self,
        service: Service,
        answer_id: str,
        choices: int,
        prompt_tokens: int,
        *,
        stream: bool,
        logprobs: bool,
        include_usage: bool = False,
        toolbox: Toolbox | None = None,
    ) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        super().__init__(service, answer_id, kind, choices, prompt_tokens, n=choices, include_usage=include_usage)
        self._messages = [ChatMessage(service.call_format, toolbox) for _ in range(choices)]
        self._logprobs: list[list[Json]] | None = [[] for _ in range(choices)] if logprobs else None
        self._greeted: set[int] = set()

    def choices(self, choice: int, event: Event) -> Iterator[Json]:
        self._count(event)
        if choice not in self._greeted:
            # Sent with the first token and not before, so that a client's time to first chunk is its time to first token.
            self._greeted.add(choice)
            yield self._piece(choice, {"role": "assistant", "content": ""})
        deltas = self._messages[choice].add(event)
        scored = self._scored(choice, event)
        if scored and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._piece(choice, delta, scored)
            scored = []
        if event.finish_reason is not None:
            yield self._piece(choice, {}, finish_reason=self._messages[choice].finish_reason)

    def add(self, choice: int, event: Event) -> None:
        self._count(event)
        self._messages[choice].add(event)
        if self._logprobs is not None:
            self._logprobs[choice] += self._scored(choice, event)

    def result(self) -> Json:
        choices = [
            {
                "index": index,
                "message": message.whole(),
                "logprobs": None if self._logprobs is None else {"content": self._logprobs[index], "refusal": None},
                "finish_reason": message.finish_reason,
            }
            for index, message in enumerate(self._messages)
        ]
        return {**self.head, "choices": choices, "usage": self._usage()}

    def _scored(self, choice: int, event: Event) -> list[Json]:
        if self._logprobs is None or event.logprob is None or not self._is_text(choice, event):
            return []
        return [chat_entry(self.tokenizer, event.logprob)]

    def _piece(self, choice: int, delta: Json, scored: list[Json] | None = None, finish_reason: str | None = None) -> Json:
        logprobs = {"content": scored, "refusal": None} if scored else None
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionAnswer(_Answer):
    """`text_completion`, whole or streamed. `echoes[choice]` is the prompt's text when it was asked for."""

    def __init__(
        self,
        service: Service,
        answer_id: str,
        prompt_tokens: int,
        *,
        choices: int,
        n: int,
        logprobs: bool,
        echoes: Sequence[str] | None,
        include_usage: bool = False,
    ) -> None:
        super().__init__(service, answer_id, "text_completion", choices, prompt_tokens, n=n, include_usage=include_usage)
        self._echoes = echoes
        self._begun: set[int] = set()
        self._columns = (
            [CompletionColumns(self.tokenizer, echoes[index] if echoes else "") for index in range(choices)] if logprobs else None
        )
        self._logprobs: list[Json | None] = [None] * choices

    def choices(self, choice: int, event: Event) -> Iterator[Json]:
        self._count(event)
        text, columns = self._piece(choice, event)
        if text or columns:
            yield {"index": choice, "text": text, "logprobs": columns, "finish_reason": None}
        if event.finish_reason is not None:
            yield {"index": choice, "text": "", "logprobs": None, "finish_reason": event.finish_reason}

    def add(self, choice: int, event: Event) -> None:
        self._count(event)
        text, columns = self._piece(choice, event)
        self._texts[choice].append(text)
        if columns is not None:
            self._logprobs[choice] = join(self._logprobs[choice], columns)
        self._finish[choice] = event.finish_reason

    def result(self) -> Json:
        empty: Json | None = None if self._columns is None else {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        choices = [
            {"index": index, "text": "".join(texts), "logprobs": self._logprobs[index] or empty, "finish_reason": self._finish[index]}
            for index, texts in enumerate(self._texts)
        ]
        return {**self.head, "choices": choices, "usage": self._usage()}

    def _piece(self, choice: int, event: Event) -> tuple[str, Json | None]:
        """The text and the columns that an event adds, the echo first."""
        text, columns = event.text, None
        request = self.requests[choice]
        if choice not in self._begun:
            self._begun.add(choice)
            if self._echoes is not None:
                text = self._echoes[choice] + text
                if self._columns is not None:
                    columns = self._columns[choice].prompt(request.prompt, request.prompt_logprobs or [None])
        if self._columns is not None and event.logprob is not None and self._is_text(choice, event):
            columns = join(columns, self._columns[choice].output([event.logprob]))
        return text, columns
