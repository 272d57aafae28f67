"""From what a user asks for to requests of the engine: chat or text to tokens, bounds checked, choices fanned out.

Knows the model, its tokenizer and the engine; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import secrets
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.serve.adapters import unknown
from armillary.serve.admission import known_tokens
from armillary.serve.grammar.compiler import Compiled, GrammarCompiler
from armillary.serve.request import Event, Request, SamplingParams
from armillary.serve.streams import AsyncStream, BlockingStream, LoopBridge, Observer
from armillary.serve.text import TextStream
from armillary.serve.tools import formats, prompt
from armillary.serve.tools.definitions import Toolbox

if TYPE_CHECKING:
    from armillary.models.chat_template import ChatTemplate
    from armillary.models.load import LoadedModel
    from armillary.serve.surface import Adapters, Serving

Message = Mapping[str, Any]


class ContextError(InputError):
    """A prompt, or a prompt with the answer it asks for, does not fit the context."""


class Service:
    """One model behind one engine.

    `model_name` is what clients call the model (default: the loaded model's own name). `gate`, when there is one, raises
    when a group of requests is not to be taken now.
    """

    def __init__(self, engine: Serving, loaded: LoadedModel, model_name: str | None = None, *, observer: Observer | None = None) -> None:
        self.engine = engine
        self.loaded = loaded
        self.model_name = model_name or loaded.name
        self.adapter = ""  # that requests run with, see `named`
        self.tokenizer = loaded.tokenizer
        self.observer = observer
        self.gate: Callable[[Sequence[Request]], None] | None = None
        self.started_at = time.time()
        self._count = itertools.count()
        if self.model_name in self.adapters:
            raise InputError(f"an adapter has the model's own name {self.model_name!r}", "give it another", field="lora")
        self._bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopBridge] = weakref.WeakKeyDictionary()
        self.grammars = GrammarCompiler(loaded.tokenizer, loaded.config.vocab_size)
        template = loaded.chat_template
        self._template_reads_tools = template is not None and prompt.reads_tools(template)
        wanted = engine.config.tool_format
        self.call_format = formats.of_template(template.source if template is not None else "") if wanted == "auto" else formats.get(wanted)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests on its own thread."""
        return self.engine.alive

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together: the model's bound, the engine's, and what the KV pool holds."""
        return min(bound for bound, _ in self._context_bounds())

    @property
    def longer(self) -> str:
        """What would make the context longer, in words that end a sentence."""
        return min(self._context_bounds())[1]

    def _context_bounds(self) -> list[tuple[int, str]]:
        """Each bound of the context in tokens, with what raises it."""
        config, limits, model = self.engine.config, self.engine.limits, self.loaded.config.max_context
        context = model if config.context is None else config.context
        if config.kv.unbounded:  # it forgets, so the model's own bound is none
            larger = "serve with a larger --context"
        elif context < model:
            larger = f"serve with a larger --context: the model was made for {model}"
        else:
            larger = "serve a model with a longer context"
        bounds = [(context, larger)]
        if not config.kv.unbounded or config.kv.most_blocks is None:  # else it gives back blocks as it goes on
            bounds.append((limits.total_blocks * limits.block_size, "serve with more --kv-memory"))
        return bounds

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.loaded.config.vocab_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, each a model to clients."""
        return self.engine.adapters.names if self.engine.adapters is not None else ()

    def load_adapter(self, name: str, path: Path) -> None:
        """Serve the peft folder at `path` under `name` from now on; running requests keep the weights they have. Takes its time."""
        if name == self.model_name:
            raise InputError(f"{name!r} is the model itself", "give the adapter another name", field="lora_name")
        self._adapter_store().load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Raises NotFoundError with the closest name, InputError for the model itself."""
        if name == self.model_name:
            raise InputError(
                f"{name!r} is the model itself, which cannot be unloaded", "name an adapter, or stop the server", field="lora_name"
            )
        self._adapter_store().unload(name)

    def _adapter_store(self) -> Adapters:
        if self.engine.adapters is None:
            raise InputError("this engine takes no adapters", "use the native or the torch backend", field="lora_name")
        return self.engine.adapters

    def check_model(self, name: str | None) -> None:
        """A request may leave its model's name out, but not name one that is not served: NotFoundError with the closest."""
        if name is not None and name != self.model_name and name not in self.adapters:
            raise unknown(name, (self.model_name, *self.adapters))

    def named(self, name: str | None) -> Service:
        """The same service under the name that a request gives: with an adapter's, requests run with it. Raises as `check_model`."""
        self.check_model(name)
        if name is None or name == self.model_name:
            return self
        service = copy.copy(self)
        service.model_name = service.adapter = name
        return service

    @property
    def ready(self) -> bool:
        """Whether `start` would find its adapter in memory; where not, `prepare` brings it there and takes its time."""
        return not self.adapter or (self.engine.adapters is not None and self.engine.adapters.is_ready(self.adapter))

    def prepare(self) -> None:
        if self.adapter and self.engine.adapters is not None:
            self.engine.adapters.prepare(self.adapter)

    # Text to tokens

    def chat_tokens(self, messages: Sequence[Message], *, prefill: str = "", toolbox: Toolbox | None = None) -> tuple[int, ...]:
        """The prompt that the model's chat template makes of `messages`, ready for the assistant's turn, which begins with `prefill`.

        Tools, calls and their results are told in the template's own words where it has them, in ours (`tools.prompt`) where not.
        """
        template = self._chat_template()
        plain = [dict(message) for message in messages]
        tools = toolbox.tools if toolbox is not None else ()
        if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in plain):
            text = template.render(plain)
        elif self._template_reads_tools:
            text = template.render(prompt.for_template(plain), tools=[tool.as_openai() for tool in tools] or None)
        else:
            text = template.render(prompt.for_plain_template(plain, tools, self.call_format))
        # The template writes the model's special tokens itself, so the tokenizer must not add another BOS.
        return tuple(self.tokenizer.encode(text + prefill, special=False))

    def _chat_template(self) -> ChatTemplate:
        template = self.loaded.chat_template
        if template is None:
            raise InputError(
                f"model {self.model_name!r} has no chat template", "use /v1/completions, or a model tuned for chat", field="messages"
            )
        return template

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The tokens of plain text, with the model's BOS where it wants one."""
        return tuple(self.tokenizer.encode(text, special=add_special_tokens))

    def check_tokens(self, tokens: Sequence[int], field: str = "prompt") -> tuple[int, ...]:
        """Token ids given by the user, which must exist."""
        self._check_ids(tokens, field)
        return tuple(tokens)

    def check_sampling(self, sampling: SamplingParams) -> SamplingParams:
        """Token ids inside the sampling fields must exist."""
        self._check_ids([token for token, _ in sampling.logit_bias], "logit_bias")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        return sampling

    def _check_ids(self, tokens: Sequence[int], field: str) -> None:
        known_tokens(tokens, self.vocab_size, field)

    def room(self, prompt_tokens: int, max_tokens: int | None, field: str = "prompt") -> int:
        """How many tokens may be generated: `max_tokens`, or all that remains of the context when it is None.

        Nothing is ever cut: what does not fit is a `ContextError` with both numbers.
        """
        if prompt_tokens == 0:
            raise InputError("the prompt has no tokens", "send at least one", field=field)
        left = self.context - prompt_tokens
        fewest = 1 if max_tokens is None else min(max_tokens, 1)
        if left < fewest:
            raise ContextError(
                f"the prompt has {prompt_tokens} tokens; the context is {self.context}"
                + (", and the answer needs at least 1" if fewest else ""),
                f"shorten the prompt, or {self.longer}",
                field=field,
            )
        if max_tokens is not None and max_tokens > left:
            raise ContextError(
                f"the prompt has {prompt_tokens} tokens and max_tokens asks for {max_tokens} more, {prompt_tokens + max_tokens} together; "
                f"the context is {self.context}",
                f"ask for at most {left} tokens, shorten the prompt, or {self.longer}",
                field="max_tokens",
            )
        return left if max_tokens is None else max_tokens

    # Requests

    def new_id(self, prefix: str) -> str:
        """An id for an answer; unique among this process's, and not to be guessed."""
        return f"{prefix}-{next(self._count):x}{secrets.token_hex(10)}"

    def start(
        self,
        answer_id: str,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        n: int = 1,
        arrival: int | None = None,
        cache_salt: str = "",
        priority: int = 0,
        deadline: int | None = None,
        grammar: Compiled | None = None,
        pooling: bool = False,
    ) -> AsyncStream:
        """Submit `n` choices for each prompt (`sampling[i]` goes with `prompts[i]`) and return their stream.

        Choice `i` of prompt `p` has index `p * n + i`; with a seed, each index draws from its own (`seed + index`). Every choice
        follows `grammar` by itself.
        All are admitted or none: `CapacityError` when the queue is full, the gate shut or the engine not running. Call it on the loop that will read the stream.
        """
        self._check_alive()
        bridge = self._bridge(asyncio.get_running_loop())
        stream = AsyncStream(self.engine.cancel, self.observer)

        def sink(choice: int) -> Callable[[Event], None]:
            return lambda event: bridge.post(stream, choice, event)

        requests = [
            self._request(
                f"{answer_id}/{index}" if n * len(prompts) > 1 else answer_id,
                prompts[index // n],
                sampling[index // n],
                index,
                arrival,
                sink(index),
                cache_salt,
                grammar,
            )
            for index in range(n * len(prompts))
        ]
        adapter = self.engine.adapters.key(self.adapter) if self.adapter and self.engine.adapters is not None else ""
        for index, request in enumerate(requests):
            request.priority, request.deadline, request.pooling = priority, deadline, pooling
            request.adapter = adapter
            if index % n:
                request.parent = requests[index - index % n]
        if self.gate is not None:
            self.gate(requests)
        stream.begin(requests)
        admitted: list[Request] = []
        try:
            for request in requests:
                self.engine.submit(request)
                admitted.append(request)
        except ArmillaryError:
            for request in admitted:
                self.engine.cancel(request.id)
            raise
        if self.observer is not None:
            for request in requests:
                self.observer.submitted(request)
        return stream

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""
        return self.loaded.config.hidden_size

    @property
    def max_input_tokens(self) -> int:
        """The most tokens that are embedded as one."""
        return self.context

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden state of each input's last token after the final norm, scaled to length 1: [hidden] each.

        They are computed as prompts are, in everybody's batches and with the prefix cache. Being cancelled withdraws them.
        """
        if not hasattr(self.engine, "executor"):
            raise InputError("replicas give no embeddings", "serve the model with one engine, or an encoder", field="model")
        nothing = [SamplingParams(max_tokens=0)] * len(inputs)
        stream = self.start(self.new_id("embd"), inputs, nothing, pooling=True)
        async with aclosing(stream.batches()) as batches:
            async for batch in batches:
                for _, event in batch:
                    if event.finish_reason == "error":
                        raise event.error or ArmillaryError("the engine ended the request")
                    if event.finish_reason == "cancelled":
                        raise CapacityError("the request was cancelled before it was complete", "send it again")
        vectors = [request.pooled for request in stream.requests if request.pooled is not None]
        if len(vectors) < len(inputs):
            raise InputError("this engine gives no hidden states", "serve an encoder", field="model")
        return [functional.normalize(vector, dim=0) for vector in vectors]

    def stream(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None, *, whole_context: bool = True
    ) -> Generator[Event]:
        """Chat from a program without an event loop: yields the answer's events; close the iterator to cancel.

        `whole_context`: let the answer run to the end of the context, whatever `sampling.max_tokens` says.
        """
        self._check_alive()
        prompt = self.chat_tokens(messages)
        sampling = sampling or SamplingParams()
        sampling = replace(sampling, max_tokens=self.room(len(prompt), None if whole_context else sampling.max_tokens, "messages"))
        inbox = BlockingStream(self.engine.cancel)
        request = self._request(self.new_id("chat"), prompt, sampling, 0, None, inbox.put)
        self.engine.submit(request)
        return inbox.events(request)

    def _check_alive(self) -> None:
        """Without its thread the engine would queue a request and never answer it."""
        if not self.alive:
            raise CapacityError("the engine does not run", "start it (Engine.start), or come back when the server has restarted")

    def _request(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        index: int,
        arrival: int | None,
        on_event: Callable[[Event], None],
        cache_salt: str = "",
        grammar: Compiled | None = None,
    ) -> Request:
        if sampling.seed is None and self.engine.config.deterministic:
            sampling = replace(sampling, seed=self.engine.config.seed)  # and not from an id, which no second request has
        if sampling.seed is not None and index:
            sampling = replace(sampling, seed=(sampling.seed + index) % 2**63)
        text = TextStream(self.tokenizer, stop=sampling.stop)
        constraint = grammar.matcher() if grammar is not None else None
        return Request(
            request_id, tuple(prompt), sampling, arrival, cache_salt=cache_salt, constraint=constraint, text=text, on_event=on_event
        )

    def _bridge(self, loop: asyncio.AbstractEventLoop) -> LoopBridge:
        bridge = self._bridges.get(loop)
        if bridge is None:
            bridge = self._bridges[loop] = LoopBridge(loop)
        return bridge
