"""Events of the engine as a Response object, whole or as its named stream events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from armillary.serve.http.errors import APIError
from armillary.serve.http.logprobs import chat_entry
from armillary.serve.http.schemas.responses import ResponsesBody
from armillary.serve.http.sse import named_frame
from armillary.serve.request import Event, Request

if TYPE_CHECKING:
    from armillary.serve.service import Service

Json = dict[str, Any]
ENDED = ("completed", "incomplete", "failed", "cancelled")


class ResponseAnswer:
    """One response from its creation to its end; `response` is its state at every moment, `on_end` is called once.

    The stream's events, numbered from 0: created, in_progress, output_item.added, content_part.added, output_text.delta ...,
    output_text.done, content_part.done, output_item.done, and completed, incomplete or failed.
    """

    def __init__(self, service: Service, response_id: str, body: ResponsesBody, prompt_tokens: int, on_end: Callable[[], object]) -> None:
        self._service = service
        self._logprobs: list[Json] | None = [] if body.include else None
        self._texts: list[str] = []
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._number = 0
        self._begun = False
        self._on_end = on_end
        self._item_id = service.new_id("msg")
        self.request: Request | None = None
        self._told = False  # whether the stream has had its last event
        self.response: Json = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": body.background,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": service.model_name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    @property
    def ended(self) -> bool:
        return self.response["status"] in ENDED

    @property
    def text(self) -> str:
        return "".join(self._texts)

    # The whole answer

    def add(self, choice: int, event: Event) -> None:
        if self.ended:  # cancelled while this was under way
            return
        self._output_tokens += event.token is not None
        self._texts.append(event.text)
        if self._logprobs is not None:
            self._logprobs += self._scored(event)
        if event.finish_reason is not None:
            incomplete = event.finish_reason == "length"
            self._end("incomplete" if incomplete else "completed", {"reason": "max_output_tokens"} if incomplete else None)

    def result(self) -> Json:
        return self.response

    def stop(self, error: APIError | None = None) -> None:
        """It ends without an answer: by an error, or cancelled (None), keeping the text that there is. Nothing happens to one that has ended."""
        if self.ended:
            return
        cancelled = error is None or error.body["error"]["code"] == "cancelled"
        if not cancelled and error is not None:
            kind = "rate_limit_exceeded" if error.status in (429, 503) else "server_error"
            self.response["error"] = {"code": kind, "message": error.body["error"]["message"]}
        self._end("cancelled" if cancelled else "failed", None)

    def _end(self, status: str, incomplete: Json | None) -> None:
        done = status in ("completed", "incomplete")
        self.response |= {
            "status": status,
            "incomplete_details": incomplete,
            "output": [self._item("completed" if status == "completed" else "incomplete")] if done or self._texts else [],
            "usage": self._usage(),
            "completed_at": int(time.time()) if status == "completed" else None,
        }
        self._on_end()

    def _usage(self) -> Json:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.request.reused if self.request is not None else 0, "cache_write_tokens": 0},
            "output_tokens": self._output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + self._output_tokens,
        }

    def _item(self, status: str) -> Json:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": [self._part()]}

    def _part(self) -> Json:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs or []}

    def _scored(self, event: Event) -> list[Json]:
        assert self.request is not None
        sampling, token = self.request.sampling, event.token
        ends = token in sampling.stop_token_ids or (token in self._service.engine.eos_ids and not sampling.ignore_eos)
        if event.logprob is None or ends:  # the token that ended the answer is not part of it
            return []
        return [chat_entry(self._service.tokenizer, event.logprob)]

    # The stream

    def begin(self) -> bytes:
        return self._frame("response.created", response=self.response) + self._frame("response.in_progress", response=self.response)

    def event(self, choice: int, event: Event) -> bytes:
        if self.ended:
            return b""
        scored = self._scored(event) if self._logprobs is not None else []
        frames = []
        if not self._begun:
            self._begun = True
            opened = {"id": self._item_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            frames.append(self._frame("response.output_item.added", output_index=0, item=opened))
            frames.append(self._in_part("response.content_part.added", part=self._part()))
        self.add(choice, event)
        if event.text or scored:
            frames.append(self._in_part("response.output_text.delta", delta=event.text, logprobs=scored))
        if event.finish_reason is not None:
            frames.append(self._in_part("response.output_text.done", text=self.text, logprobs=self._logprobs or []))
            frames.append(self._in_part("response.content_part.done", part=self._part()))
            frames.append(self._frame("response.output_item.done", output_index=0, item=self.response["output"][0]))
            frames.append(self._frame(f"response.{self.response['status']}", response=self.response))
            self._told = True
        return b"".join(frames)

    def end(self) -> bytes:
        return b"" if self._told else self._failure()

    def failed(self, error: APIError) -> bytes:
        self.stop(error)
        return self._failure()

    def _failure(self) -> bytes:
        return self._frame("response.failed", response=self.response)

    def _in_part(self, kind: str, **fields: Any) -> bytes:
        return self._frame(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _frame(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_frame({"type": kind, "sequence_number": number, **fields})
