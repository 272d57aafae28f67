"""What a token costs beside the model: microseconds of CPU time, from the engine's iteration to the bytes that a client reads.

    python bench/token_path.py [--sequences 256 8] [--tokens 64]

The executor draws tokens of a real text and sleeps meanwhile, so what is left is everything else, added stage by stage: the engine
alone, text streams, events read on an event loop, server-sent events of chat completions, and those over sockets (the client is a
process of its own and not counted). CPU time of this process while every answer is in mid-stream, the least of several rounds, so the
machine need not be quiet. With few answers at once the cost of an iteration is shared by few tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import TEXT

from armillary.models.load import LoadedModel, load
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.http.app import create_app
from armillary.serve.http.server import Server
from armillary.serve.request import Request, SamplingParams, TokenLogprob
from armillary.serve.schedule import Outcome, Plan
from armillary.serve.service import Service
from armillary.serve.text import TextStream

MODEL = "smollm2"
PROMPT = 8
PAUSE = 200e-6  # seconds that an iteration sleeps for each of its tokens
READERS = Path(__file__).parent / "token_readers.py"


class Dictated:
    """An executor that draws the tokens of a text, one after another."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._drawn = [(TokenLogprob(token),) for token in tokens]

    def run(self, plan: Plan) -> Outcome:
        drawn, now = self._drawn, time.perf_counter_ns()
        time.sleep(PAUSE * len(plan.requests))
        sampled = tuple(drawn[entry.start % len(drawn)] if entry.sample else () for entry in plan.schedule.entries)
        return Outcome(sampled, ((),) * len(sampled), now, now)


class Meter(threading.Thread):
    """CPU seconds a token, from when every answer has had two tokens until the first is about to end."""

    def __init__(self, engine: Engine, sequences: int, tokens: int) -> None:
        super().__init__(daemon=True)
        self._engine, self._first, self._last = engine, 2 * sequences, sequences * (tokens - 2)
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        cpu, count = self._when(self._first)
        later, end = self._when(self._last)
        self.seconds = (later - cpu) / (end - count)

    def _when(self, tokens: int) -> tuple[float, int]:
        while self._engine.stats.generated_tokens < tokens:
            time.sleep(0.002)
        return time.process_time(), self._engine.stats.generated_tokens


def engine_of(loaded: LoadedModel, sequences: int) -> Engine:
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    config = EngineConfig(max_running=sequences, max_batch_tokens=max(2048, sequences), kv_blocks=64 * sequences)
    return Engine(Dictated(tokens), config, eos_ids=loaded.tokenizer.stop_ids)


def alone(engine: Engine, loaded: LoadedModel, sequences: int, tokens: int, *, text: bool) -> None:
    sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
    for index in range(sequences):
        engine.submit(Request(f"{index}", (index,) * PROMPT, sampling, text=TextStream(loaded.tokenizer) if text else None))
    engine.run_until_idle()


def on_a_loop(engine: Engine, loaded: LoadedModel, sequences: int, tokens: int) -> None:
    service = Service(engine, loaded)
    sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)

    async def read(index: int) -> None:
        async for _ in service.start(f"{index}", [(index,) * PROMPT], [sampling]).batches():
            pass

    async def everybody() -> None:
        await asyncio.gather(*(read(index) for index in range(sequences)))

    engine.start()
    asyncio.run(everybody())


def body_of(tokens: int) -> bytes:
    messages = [{"role": "user", "content": "Go on."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps(body).encode()


def as_chunks(engine: Engine, loaded: LoadedModel, sequences: int, tokens: int) -> None:
    """The application is called without a server; its bytes are counted and thrown away."""
    app, body, path = create_app(Service(engine, loaded)), body_of(tokens), "/v1/chat/completions"
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"root_path": "", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}

    async def ask() -> int:
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        received = 0

        async def send(message: Any) -> None:
            nonlocal received
            received += len(message.get("body", b""))

        await app(dict(scope), inbox.get, send)
        return received

    async def everybody() -> None:
        assert min(await asyncio.gather(*(ask() for _ in range(sequences)))) > 40 * tokens, "an answer is too short"

    engine.start()
    asyncio.run(everybody())


def over_sockets(engine: Engine, loaded: LoadedModel, sequences: int, tokens: int) -> None:
    engine.start()
    with Server(create_app(Service(engine, loaded)), port=0, end_answers=engine.stop) as server:
        arguments = [sys.executable, str(READERS), str(server.port), str(sequences), str(40 * tokens)]
        subprocess.run(arguments, input=body_of(tokens), check=True)


STAGES: tuple[tuple[str, Callable[[Engine, LoadedModel, int, int], None]], ...] = (
    ("the engine", lambda *size: alone(*size, text=False)),
    ("... with text", lambda *size: alone(*size, text=True)),
    ("... read on an event loop", on_a_loop),
    ("... as chunks of chat completions", as_chunks),
    ("... over sockets", over_sockets),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[256, 8], help="answers at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    loaded = load(MODEL)
    print("| answers at once | stage | µs of CPU time a token, in all | more than the stage before |\n|---:|---|---:|---:|")
    for sequences in options.sequences:
        before = 0.0
        for name, run in STAGES:
            found = []
            for _ in range(options.rounds):
                engine = engine_of(loaded, sequences)
                meter = Meter(engine, sequences, options.tokens)
                run(engine, loaded, sequences, options.tokens)
                meter.join()
                engine.stop()
                found.append(1e6 * meter.seconds)
            print(f"| {sequences} | {name} | {min(found):.1f} | {min(found) - before:+.1f} |", flush=True)
            before = min(found)


if __name__ == "__main__":
    main()
