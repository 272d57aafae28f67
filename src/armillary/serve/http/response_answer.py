"""Events of the engine as a Response object, whole or as its named stream events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from armillary.serve.http.errors import APIError
from armillary.serve.http.logprobs import chat_entry
from armillary.serve.http.parts import Begun, Ended, Grown, Part, Parts, Step
from armillary.serve.http.schemas.responses import ResponsesBody
from armillary.serve.http.sse import named_frame
from armillary.serve.request import Event, Request
from armillary.serve.tools.definitions import Toolbox

if TYPE_CHECKING:
    from armillary.serve.service import Service

Json = dict[str, Any]
ENDED = ("completed", "incomplete", "failed", "cancelled")


class ResponseAnswer:
    """One response from its creation to its end; `response` is its state at every moment, `on_end` is called once.

    The stream's events, numbered from 0: created, in_progress; of each item output_item.added, content_part.added, output_text.delta ...,
    output_text.done, content_part.done, output_item.done, or for a call output_item.added, function_call_arguments.delta ...,
    function_call_arguments.done, output_item.done; and completed, incomplete or failed.
    """

    def __init__(
        self,
        service: Service,
        response_id: str,
        body: ResponsesBody,
        prompt_tokens: int,
        on_end: Callable[[], object],
        toolbox: Toolbox | None = None,
    ) -> None:
        self._service = service
        self._parts = Parts(service.call_format, toolbox)
        self._item_ids: list[str] = []
        self._wants_logprobs = bool(body.include)
        self._logprobs: dict[int, list[Json]] = {}  # of the part that is a text
        self._unsaid: deque[tuple[Json, int]] = deque()  # logprobs of tokens that may become text or a call, with how long their text is
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._number = 0
        self._on_end = on_end
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
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    @property
    def ended(self) -> bool:
        return self.response["status"] in ENDED

    # The whole answer

    def add(self, choice: int, event: Event) -> None:
        if not self.ended:  # not cancelled while this was under way
            self._advance(event)

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
        self.response |= {
            "status": status,
            "incomplete_details": incomplete,
            "output": [self._item(part) for part in self._parts.all],
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

    def _advance(self, event: Event) -> list[tuple[str, Json]]:
        """Take an event in; gives what the stream tells of the items."""
        self._output_tokens += event.token is not None
        if self._wants_logprobs:
            self._unsaid.extend((entry, len(event.text)) for entry in self._scored(event))
        told: list[tuple[str, Json]] = []
        for step in self._parts.add(event):
            if isinstance(step, Begun):
                self._item_ids.append(self._service.new_id("msg" if step.part.call is None else "fc"))
            told += self._call_step(step) if step.part.call is not None else self._text_step(step, over=event.finish_reason is not None)
        if event.finish_reason is not None:
            incomplete = event.finish_reason == "length"
            self._end("incomplete" if incomplete else "completed", {"reason": "max_output_tokens"} if incomplete else None)
        return told

    def _text_step(self, step: Step, *, over: bool) -> list[tuple[str, Json]]:
        """`over`: this is the answer's last event, so a text that ends last has all logprobs that are left."""
        part, place = step.part, self._place(step.part) | {"content_index": 0}
        if isinstance(step, Begun):
            self._logprobs[part.index] = []
            opened = self._item(part) | {"status": "in_progress", "content": []}
            return [
                ("response.output_item.added", {"output_index": part.index, "item": opened}),
                ("response.content_part.added", place | {"part": self._text(part) | {"text": ""}}),
            ]
        scored: list[Json] = []
        left = len(step.text) if isinstance(step, Grown) else 0
        while self._unsaid and (left > 0 or (over and isinstance(step, Ended) and part is self._parts.all[-1])):
            entry, length = self._unsaid.popleft()
            scored.append(entry)
            left -= length
        self._logprobs[part.index] += scored
        if isinstance(step, Grown):
            return [("response.output_text.delta", place | {"delta": step.text, "logprobs": scored})]
        return [
            *([("response.output_text.delta", place | {"delta": "", "logprobs": scored})] if scored else []),
            ("response.output_text.done", place | {"text": part.text, "logprobs": self._logprobs[part.index]}),
            ("response.content_part.done", place | {"part": self._text(part)}),
            ("response.output_item.done", {"output_index": part.index, "item": self._item(part)}),
        ]

    def _call_step(self, step: Step) -> list[tuple[str, Json]]:
        part, place = step.part, self._place(step.part)
        if not isinstance(step, Ended):
            self._unsaid.clear()
        if isinstance(step, Begun):
            opened = self._item(part) | {"status": "in_progress", "arguments": ""}
            return [("response.output_item.added", {"output_index": part.index, "item": opened})]
        if isinstance(step, Grown):
            return [("response.function_call_arguments.delta", place | {"delta": step.text})]
        assert part.call is not None
        return [
            ("response.function_call_arguments.done", place | {"name": part.call.name, "arguments": part.text}),
            ("response.output_item.done", {"output_index": part.index, "item": self._item(part)}),
        ]

    def _place(self, part: Part) -> Json:
        return {"item_id": self._item_ids[part.index], "output_index": part.index}

    def _item(self, part: Part) -> Json:
        item = {"id": self._item_ids[part.index], "status": "completed" if part.whole else "incomplete"}
        if part.call is None:
            return item | {"type": "message", "role": "assistant", "content": [self._text(part)]}
        return item | {"type": "function_call", "call_id": part.call.id, "name": part.call.name, "arguments": part.text}

    def _text(self, part: Part) -> Json:
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": list(self._logprobs[part.index])}

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
        frames = [self._frame(kind, **fields) for kind, fields in self._advance(event)]
        if event.finish_reason is not None:
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

    def _frame(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_frame({"type": kind, "sequence_number": number, **fields})
