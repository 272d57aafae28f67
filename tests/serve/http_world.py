"""A small world for tests of the server: a real engine and tokenizer, and an executor that types out what it is told to say."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from armillary.core.clock import RealClock
from armillary.core.trace import Trace
from armillary.models.chat_template import ChatTemplate
from armillary.models.config import ModelConfig
from armillary.models.load import LoadedModel
from armillary.models.tokenizer import Tokenizer
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.http.app import create_app
from armillary.serve.http.server import Server
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, TokenLogprob
from armillary.serve.schedule import Outcome, Plan
from armillary.serve.service import Service

SPECIALS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREETING = "Hello, wörld! 👋 The sphere turns."


def byte_tokenizer(folder: Path) -> Tokenizer:
    """One token a byte (ids 0..255 in the order of GPT-2's alphabet), then the chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    path = folder / "tokenizer.json"
    backend.save(str(path))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}')
    return Tokenizer.from_json(path)


class Typist:
    """Says `reply(request)` byte by byte, then the end-of-text token. `delay` seconds an iteration; `hold()` stops it between iterations."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[Request], str] = lambda request: GREETING, delay: float = 0.0) -> None:
        self.tokenizer = tokenizer
        self.reply = reply
        self.delay = delay
        self.failure: Exception | None = None
        self._go = threading.Event()
        self._go.set()
        self._clock = RealClock()
        self.busy = False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def run(self, plan: Plan) -> Outcome:
        self.busy = True
        try:
            return self._run(plan)
        finally:
            self.busy = False

    def _run(self, plan: Plan) -> Outcome:
        start = self._clock.now()
        self._go.wait(timeout=60)
        if self.delay:
            time.sleep(self.delay)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        sampled: list[tuple[TokenLogprob, ...]] = []
        scores: list[tuple[TokenLogprob, ...]] = []
        for entry, request in zip(plan.schedule.entries, plan.requests, strict=True):
            sampled.append((self._next(request),) if entry.sample else ())
            tops = request.sampling.prompt_logprobs
            positions = range(entry.start + 1, min(entry.start + entry.count + 1, len(request.prompt)))
            scores.append(() if tops is None else tuple(scored(request.prompt[position], tops) for position in positions))
        return Outcome(tuple(sampled), tuple(scores), start, self._clock.now())

    def _next(self, request: Request) -> TokenLogprob:
        reply = self.tokenizer.encode(self.reply(request), special=False)
        done = len(request.output)
        assert self.tokenizer.eos is not None
        token = reply[done] if done < len(reply) else self.tokenizer.eos
        if request.constraint is not None:  # what comes closest within the grammar
            words = request.constraint.mask(())[0].tolist()
            allowed = [one for one in range(self.tokenizer.vocab_size) if words[one // 32] >> one % 32 & 1]
            token = min(allowed, key=lambda one: abs(one - token))
        return scored(token, request.sampling.logprobs) if request.sampling.logprobs is not None else TokenLogprob(token)


def scored(token: int, tops: int) -> TokenLogprob:
    """The made-up distribution: the token itself at -0.25, then its neighbours, the last of them impossible."""
    others = tuple(((token + step) % 256, -1.0 - step) for step in range(1, tops))
    return TokenLogprob(token, -0.25, ((token, -0.25), *others)[:tops])


class World:
    """A server on a free loopback port, its engine and its executor: the typist, or whatever runs `loaded`."""

    def __init__(
        self,
        folder: Path,
        *,
        app: Callable[..., Any] = create_app,
        config: dict[str, Any] | None = None,
        loaded: LoadedModel | None = None,
        trace: Trace | None = None,
        max_context: int = 512,
        **options: Any,
    ) -> None:
        settings = EngineConfig(**{"kv_blocks": 256, "block_size": 16, "max_batch_tokens": 256, **(config or {})})
        if loaded is None:
            self.tokenizer = byte_tokenizer(folder)
            self.typist = Typist(self.tokenizer)
            model = ModelConfig("llama", self.tokenizer.vocab_size, 8, 8, 1, 1, 1, 8, max_context=max_context)
            template = ChatTemplate(TEMPLATE, self.tokenizer)
            loaded = SimpleNamespace(name="typist", config=model, tokenizer=self.tokenizer, chat_template=template, description="a typist")  # type: ignore[assignment]
            self.engine = Engine(self.typist, settings, eos_ids=self.tokenizer.stop_ids, trace=trace)
        else:
            self.tokenizer = loaded.tokenizer
            self.engine = build_engine(loaded, settings, keep_weights=True, trace=trace)
        self.service = Service(self.engine, loaded)
        self.engine.start()
        self.server = Server(app(self.service, **options), port=0, grace_seconds=1)
        self.server.start()
        self.url = self.server.url
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.http.close()
        self.engine.stop()
        self.server.stop()
        self.engine.check()

    def wait_idle(self, seconds: float = 20.0) -> dict[str, Any]:
        """Until the engine holds no request and no block, and the typist has ended the iteration of the last that hung up."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.engine.snapshot()
            if (
                not state["running"]
                and not state["waiting"]
                and not state["blocks"]["used"]
                and not getattr(self.engine.executor, "busy", False)
            ):
                self.engine.check()
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.01)

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 20.0) -> dict[str, Any]:
        """Until the engine's snapshot satisfies `condition`."""
        deadline = time.monotonic() + seconds
        while not condition(state := self.engine.snapshot()):
            assert time.monotonic() < deadline, state
            time.sleep(0.005)
        return state
