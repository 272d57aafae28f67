"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's words for a conversation."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from armillary.core.errors import InputError
from armillary.serve.http.schemas.message_tools import MessageToolFields
from armillary.serve.http.schemas.sampling import MAX_STOP_LENGTH, MAX_TOKENS
from armillary.serve.http.schemas.turn import TurnBody
from armillary.serve.http.schemas.written import TEXT, either, some, typed
from armillary.serve.request import SamplingParams

Json = dict[str, Any]

MAX_MESSAGES = 4096
MAX_STOP_SEQUENCES = 16
HARMLESS = ("cache_control", "citations")  # of a block: they cannot change an answer here


class Turn(BaseModel):
    """One message; `content` is a string or blocks, which are kept as checked blocks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    role: Literal["user", "assistant"]
    content: Annotated[list[Json], either(TEXT, some(typed("text", "tool_use", "tool_result"), MAX_MESSAGES, 0))]

    @field_validator("content", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        return _blocks(value, ("text", "tool_use", "tool_result"))


def _blocks(value: Any, kinds: tuple[str, ...]) -> list[Json]:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("send a string or a list of content blocks")
    return [_block(index, given, kinds) for index, given in enumerate(value)]


def _block(index: int, given: Any, kinds: tuple[str, ...]) -> Json:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in kinds:
        raise ValueError(f"block {index} is of type {str(kind)[:40]!r}, which is not supported here: send {' or '.join(kinds)}")
    fields = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id", "content", "is_error")}[kind]
    block = {name: value for name, value in given.items() if name not in HARMLESS and value is not None}
    for name in block.keys() - {"type", *fields}:
        raise ValueError(f"block {index}: unknown field {str(name)[:100]!r}")
    wanted: dict[str, type] = {"text": str, "id": str, "name": str, "input": dict, "tool_use_id": str}
    for name in fields:
        if name in wanted and not isinstance(block.get(name), wanted[name]):
            raise ValueError(f"block {index}: {name} must be {'an object' if wanted[name] is dict else 'a string'}")
    if kind == "tool_result":
        if not isinstance(block.get("is_error", False), bool):
            raise ValueError(f"block {index}: is_error must be true or false")
        block["content"] = "\n".join(part["text"] for part in _blocks(block.get("content", ""), ("text",)))
    return block


class CountBody(MessageToolFields):
    """A conversation as it would be sent; only its tokens are counted."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "thinking": ({"type": "disabled"},),
        "mcp_servers": ([],),
        "output_config": ({},),
        "context_management": (),
        "speed": ("standard",),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"metadata", "cache_control", "user_profile_id", "workspace_id"})

    model: str = Field(max_length=512)
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[list[Json], either(TEXT, some(typed("text"), MAX_MESSAGES, 0))] = Field(default_factory=list)

    @field_validator("system", mode="before")
    @classmethod
    def _system(cls, value: Any) -> Any:
        return _blocks(value, ("text",))

    def conversation(self) -> tuple[list[Json], str]:
        """As chat messages, and what the answer begins with: the text of a last turn that is the assistant's.

        Turns of the same role that follow each other are one turn, as Anthropic has it. Raises InputError for a result of a
        tool use that is not there.
        """
        messages: list[Json] = []
        used: set[str] = set()
        if self.system:
            messages.append({"role": "system", "content": _text(self.system)})
        for turn in self.messages:
            for block in turn.content:
                if block["type"] == "tool_use":
                    used.add(block["id"])
                elif block["type"] == "tool_result" and block["tool_use_id"] not in used:
                    raise InputError(
                        f"messages: there is a result of the tool use {block['tool_use_id'][:128]!r}, which no turn before it has made",
                        "send the assistant's tool_use first",
                        field="messages",
                    )
                _add(messages, turn.role, block)
        if not messages or messages[-1]["role"] == "system":
            raise InputError("messages: no turn says anything", "send a user message with a text", field="messages")
        if messages[-1]["role"] != "assistant":
            return messages, ""
        last = messages.pop()
        if last.get("tool_calls"):
            raise InputError("messages: the last turn calls a tool", "send the tool_result in a user message after it", field="messages")
        if last["content"] != last["content"].rstrip():
            raise InputError(
                "messages: the last assistant text ends with white space, which no model continues well", "strip it", field="messages"
            )
        if self.tools and self.tool_choice.type in ("any", "tool"):
            raise InputError(
                "messages: the last turn is the assistant's, whose text would be continued, and tool_choice asks for a call",
                "leave one of them out",
                field="tool_choice",
            )
        return messages, last["content"]


def _text(blocks: list[Json]) -> str:
    return "\n".join(block["text"] for block in blocks)


def _add(messages: list[Json], role: str, block: Json) -> None:
    if block["type"] == "tool_result":
        content = f"Error: {block['content']}" if block.get("is_error") else block["content"]
        messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content})
        return
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": ""})
    last = messages[-1]
    if block["type"] == "text":
        last["content"] += ("\n" if last["content"] else "") + block["text"]
    else:
        function = {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)}
        last.setdefault("tool_calls", []).append({"id": block["id"], "type": "function", "function": function})


class MessagesBody(TurnBody, CountBody):
    """`max_tokens` has no default in Anthropic's API, and none here."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **CountBody.UNSUPPORTED,
        "service_tier": ("auto", "standard_only"),
        "container": (),
        "inference_geo": (),
        "diagnostics": (),
    }

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: list[str] = Field(default_factory=list, max_length=MAX_STOP_SEQUENCES)
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_TOKENS)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)  # this and the next are not Anthropic's
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @field_validator("stop_sequences")
    @classmethod
    def _stops(cls, value: list[str]) -> list[str]:
        for stop in value:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH or not stop.strip():
                raise ValueError(f"a stop sequence must have 1 to {MAX_STOP_LENGTH} characters, and more than white space")
        return value

    def sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop_sequences),
        )
