"""Clients that behave like the world: they come at random, stream or wait, leave in the middle, and some send nonsense.

`soak` sends them to a server over real HTTP, a connection each, and holds every answer to what a server owes: a whole answer has a finish
reason for each choice, a stream has one too or an error event and then its last line, nonsense gets a 4xx with an error body, and
the same question gets the same answer whatever else is going on.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PATIENCE_SECONDS = 120.0
TEXT, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
WORDS = [
    "the",
    "sphere",
    "turns",
    "slowly",
    "and",
    "every",
    "ring",
    "of",
    "brass",
    "follows",
    "its",
    "own",
    "star",
    "until",
    "the",
    "night",
    "is",
    "over",
]
KINDS = {  # how often, in a hundred
    "whole": 26,
    "stream": 30,
    "choices": 8,
    "responses": 6,
    "messages": 6,
    "leaves in the middle": 10,
    "leaves at once": 4,
    "half a body": 3,
    "nonsense": 7,
}
NONSENSE = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 1000000}',
    b'{"prompt": "a", "mystery": 1}',
    b'{"prompt": [-1]}',
    b'{"prompt": ""}',
    b'{"prompt": "a", "model": "another"}',
    b'{"prompt": "a", "n": 1000}',
    b'{"a":' * 2_000,
)


@dataclass(slots=True)
class Report:
    """`outcomes` counts how requests ended, by kind and end; `violations` is what a server owes and did not give."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)  # seconds, of streams
    tokens: int = 0  # of answers that came to their end
    repeats: int = 0  # answers that were compared with an earlier one to the same question
    answers: dict[str, Any] = field(default_factory=dict)

    def ended(self, how: str) -> int:
        return sum(count for (_, end), count in self.outcomes.items() if end == how)


async def soak(port: int, model: str, *, seconds: float, rate: float, seed: int = 0, host: str = "127.0.0.1") -> Report:
    """Poisson arrivals, `rate` a second, for `seconds`; returns when all that came have ended."""
    draw, report = random.Random(seed), Report()
    started, due, tasks = time.monotonic(), 0.0, set()
    while True:
        due += draw.expovariate(rate)
        if due >= seconds:
            break
        await asyncio.sleep(max(0.0, started + due - time.monotonic()))
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        task = asyncio.create_task(_client(report, model, kind, host, port, random.Random(draw.random())))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return report


async def _client(report: Report, model: str, kind: str, host: str, port: int, draw: random.Random) -> None:
    path, body = _question(kind, model, draw)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            if kind.startswith("leaves"):
                end = await _leave(host, port, path, body, draw.uniform(0.05, 1.5) if kind == "leaves in the middle" else 0.0)
            elif kind == "half a body":
                end = await _leave(host, port, path, body[: len(body) // 2], 0.0, declared=len(body))
            else:
                begun = time.monotonic()
                status, content, first = await _ask(host, port, path, body)
                end = _judge(report, kind, path, body, status, content)
                if b'"stream":true' in body and end == "finished":
                    report.first_tokens.append(first - begun)
    except TimeoutError:
        end = "never ended"
        report.violations.append(f"{kind}: no end within {PATIENCE_SECONDS:g} s")
    except OSError as error:
        end = "connection lost"
        report.violations.append(f"{kind}: the connection broke: {error!r}")
    report.outcomes[kind, end] += 1


def _question(kind: str, model: str, draw: random.Random) -> tuple[str, bytes]:
    """One of a bounded number of questions, many of which begin alike."""
    if kind == "nonsense":
        return TEXT, draw.choice(NONSENSE)
    topic = draw.randrange(8)
    long = " ".join(WORDS[(topic * 5 + step * (topic + 1)) % len(WORDS)] for step in range(8 + 6 * topic))
    prompt = f"{long}. {WORDS[draw.randrange(2)]}?"
    limit = 4 << topic % 4
    sampling: dict[str, Any] = {"temperature": 0} if draw.random() < 0.5 else {"temperature": 0.8}
    if kind == "messages":
        said = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": limit}
        return MESSAGES, _json({**said, "temperature": 0.0, "stream": draw.random() < 0.5})
    if kind == "responses":
        return RESPONSES, _json(
            {"input": prompt, "max_output_tokens": limit, "store": False, "temperature": 0, "stream": draw.random() < 0.5}
        )
    if sampling["temperature"]:
        sampling["seed"] = draw.randrange(2)
    body: dict[str, Any] = {"max_tokens": limit, "ignore_eos": topic % 2 == 1, **sampling}
    if kind == "choices":
        body["n"] = draw.randrange(2, 5)
    if kind != "whole":
        body["stream"] = True
    if draw.random() < 0.5:
        return CHAT, _json({**body, "messages": [{"role": "user", "content": prompt}]})
    return TEXT, _json({**body, "prompt": prompt})


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _judge(report: Report, kind: str, path: str, body: bytes, status: int, content: bytes) -> str:
    """How it ended; what should not be goes into the report."""

    def wrong(what: str) -> str:
        report.violations.append(f"{kind}, {path}: {what}; asked {body[:200]!r}, got {status} {content[-300:]!r}")
        return "wrong"

    if status in (429, 503):
        code = json.loads(content)["error"].get("code") or json.loads(content)["error"]["type"]
        return f"refused ({code})" if code != "cancelled" else wrong("an admitted request was lost")
    if kind == "nonsense":
        return "rejected" if 400 <= status < 500 and "message" in json.loads(content)["error"] else wrong("nonsense was not rejected")
    if status != 200:
        return wrong("a good request failed")
    if b'"stream":true' not in body:
        answer = json.loads(content)
        said, ends = _whole(path, answer)
    else:
        frames = [line[6:] for line in content.decode().split("\n") if line.startswith("data: ")]
        if path in (TEXT, CHAT) and (not frames or frames.pop() != "[DONE]"):
            return wrong("a stream did not come to its last line")
        events = [json.loads(frame) for frame in frames]
        if any("error" in event and event["error"] for event in events):
            return wrong("an admitted request ended with an error event")
        said, ends = _streamed(path, events)
    asked = json.loads(body)
    if len(ends) != asked.get("n", 1) or not all(ends):
        return wrong("a choice has no finish reason")
    # Whether it was streamed is no part of the question.
    question = json.dumps({**asked, "path": path, "stream": None}, sort_keys=True)
    known = report.answers.setdefault(question, said)
    if known is not said:
        report.repeats += 1
        if known != said:
            return wrong(f"another answer than before: {known!r}")
    return "finished"


def _whole(path: str, answer: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The texts of an answer and why each ended."""
    if path == MESSAGES:
        return [block.get("text") for block in answer["content"]], [answer["stop_reason"]]
    if path == RESPONSES:
        texts = [part.get("text") for item in answer["output"] for part in item.get("content", ())]
        return texts, [answer["status"] in ("completed", "incomplete")]
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["text"] if path == TEXT else choice["message"]["content"] for choice in choices], [
        choice["finish_reason"] for choice in choices
    ]


def _streamed(path: str, events: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    """The same of a stream's events."""
    if path == MESSAGES:
        text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
        ends = [event["delta"].get("stop_reason") for event in events if event["type"] == "message_delta"]
        return [text], ends if events and events[-1]["type"] == "message_stop" else []
    if path == RESPONSES:
        last = events[-1] if events else {"type": ""}
        return _whole(path, last["response"]) if last["type"] in ("response.completed", "response.incomplete") else ([], [])
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if path == TEXT else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + (piece or "")
            ends[choice["index"]] = ends.get(choice["index"]) or choice["finish_reason"]
    order = sorted(texts)
    return [texts[index] for index in order], [ends[index] for index in order]


# -- HTTP, as plainly as it goes


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def _ask(host: str, port: int, path: str, body: bytes) -> tuple[int, bytes, float]:
    """Status, content, and when its first byte came."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_head(path, len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        first = await reader.read(1)
        at = time.monotonic()
        content = first + await reader.read()
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("closed before an answer") from error
    finally:
        writer.close()
    chunked = b"transfer-encoding: chunked" in head.lower()
    return int(head.split(b" ", 2)[1]), _unchunked(content) if chunked else content, at


def _unchunked(content: bytes) -> bytes:
    pieces, at = [], 0
    while True:
        end = content.index(b"\r\n", at)
        size = int(content[at:end], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(content[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


async def _leave(host: str, port: int, path: str, body: bytes, after: float, declared: int | None = None) -> str:
    """Ask and go away `after` seconds, without a word."""
    _, writer = await asyncio.open_connection(host, port)
    writer.write(_head(path, len(body) if declared is None else declared) + body)
    await writer.drain()
    await asyncio.sleep(after)
    writer.transport.abort()
    return "left"


def run(port: int, model: str, **options: Any) -> Report:
    """`soak` from a program without an event loop."""
    return asyncio.run(soak(port, model, **options))
