"""From a model's name to answers, without a server: `LLM("smollm2").chat("Hello")`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from armillary.core.clock import Clock
from armillary.core.errors import ArmillaryError, InputError
from armillary.core.paths import cache_dir
from armillary.core.trace import Trace
from armillary.core.units import format_bytes
from armillary.models.config import ModelConfig
from armillary.models.load import LoadedModel, load
from armillary.models.neuron_predictor import load_predictors
from armillary.serve.adapters import AdapterStore
from armillary.serve.admission import known_tokens
from armillary.serve.beam import Beam, BeamParams, BeamSearch
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.forward import Forward, TakesAdapters
from armillary.serve.executors.local import LocalExecutor
from armillary.serve.executors.native_forward import NativeForward, unsupported
from armillary.serve.executors.offload_forward import OffloadForward
from armillary.serve.executors.sparse_forward import SparseForward
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.grammar.grammar import Grammar
from armillary.serve.grammar.jump_forward import JumpForward
from armillary.serve.kv_pool import available_memory, settle
from armillary.serve.offload.layout import Bounds, fit
from armillary.serve.offload.policy import OffloadPolicy
from armillary.serve.request import Event, FinishReason, Request, SamplingParams, TokenLogprob
from armillary.serve.speculation.build import build_drafter, draft_bytes_per_token, load_draft
from armillary.serve.text import TextStream

log = logging.getLogger(__name__)

KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Progress = Callable[[int, int], None]
Lora = str | Sequence[str | None] | None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `logprobs` are empty unless asked for; `request` keeps its times and what else the engine noted."""

    prompt: str | None  # None when it was given as tokens
    prompt_tokens: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    request: Request


def build_engine(
    loaded: LoadedModel,
    config: EngineConfig | None = None,
    *,
    clock: Clock | None = None,
    trace: Trace | None = None,
    keep_weights: bool = False,
) -> Engine:
    """An engine that runs `loaded` on this machine; the pool's size and the context are settled and logged.

    `config.backend` "auto" takes the native kernels where they can run this model. Native kernels take the weights from the
    file, unless somebody has asked for `loaded.decoder`: its weights are then the model's, and are packed in place. It no
    longer trains or saves, and with the native kernels no longer computes; `keep_weights` packs a copy instead, for the
    memory of both. Raises InputError for a context that the model was not made for, CapacityError for a
    KV pool that does not fit the memory.
    """
    model = loaded.config
    config = config if config is not None else EngineConfig.model_validate({})
    draft = load_draft(config, loaded)
    config = settle(config, model, available_memory(), draft_bytes_per_token(config, loaded, draft))
    assert config.kv_blocks is not None
    threads = config.threads if config.threads is not None else torch.get_num_threads()
    forward = build_forward(loaded, config, threads, in_place=not keep_weights)
    beside = config.model_copy(update={"offload": None})  # a draft model is small: all of it stays in this machine's memory
    drafter = build_drafter(config, loaded, forward, draft, lambda model: build_forward(model, beside, threads, in_place=True), clock)
    adapters = _adapters(forward, model, config)
    packed = adapters.packed if adapters is not None else lambda key: None
    executor = LocalExecutor(forward, threads=threads, seed=config.seed, clock=clock, adapters=packed)
    log.info(
        "%s: %s, weights %s (%s), KV cache %s: %d blocks of %d tokens, context %d, %d threads",
        loaded.name,
        forward.name,
        format_bytes(forward.weight_bytes),
        forward.prepared,
        format_bytes(forward.cache_bytes),
        config.kv_blocks,
        config.block_size,
        config.context,
        threads,
    )
    if trace is not None:
        trace.meta["weights"] = forward.prepared
    # Schedules cannot be made ahead while drafts are proposed, and some KV policies take none: both go without the grammars' drafts.
    jump = JumpForward(loaded.tokenizer, drafter) if config.async_scheduling == "off" and config.kv.takes_drafts else None
    engine = Engine(
        executor, config, clock=clock, trace=trace, eos_ids=loaded.tokenizer.stop_ids, drafter=jump or drafter, adapters=adapters
    )
    if jump is not None:
        engine.features["grammar"] = jump.state
    if drafter is not None:
        engine.features["speculation"] = drafter.state
    return engine


def _adapters(forward: Forward, model: ModelConfig, config: EngineConfig) -> AdapterStore | None:
    """Those that `config` names, loaded; None where the forward pass takes none, which is an error when there are some."""
    if not isinstance(forward, TakesAdapters):
        if config.lora:
            raise InputError(f"{forward.name} takes no adapters", "leave --lora out, or merge the adapter into the model", field="lora")
        return None
    store = AdapterStore(forward, model, max_loaded=config.max_loras, max_bytes=config.lora_memory)
    for name, path in config.lora.items():
        store.load(name, path)
    return store


def build_forward(loaded: LoadedModel, config: EngineConfig, threads: int, *, in_place: bool = False) -> Forward:
    """Who computes batches: the native kernels when `config.backend` is "native", or "auto" and they can; else torch.

    Raises InputError when `config` asks for what only the native kernels have, and they cannot run here.
    """
    assert config.kv_blocks is not None
    if config.offload is not None:
        return _offloaded(loaded, config, config.offload, in_place)
    if config.sparsity is not None:
        predictors = load_predictors(Path(config.sparsity).expanduser(), loaded.config)
        return SparseForward(
            loaded.decoder, predictors, num_blocks=config.kv_blocks, block_size=config.block_size, share=config.sparsity_share
        )
    why = unsupported(loaded.config)
    backends = config.kv.backends
    if config.backend == "auto" and why is not None and "torch" not in backends:
        raise InputError(
            f"kv_policy {config.kv_policy} needs the native backend, but {why}", "serve with another --kv-policy", field="kv_policy"
        )
    if config.backend == "native" or (config.backend == "auto" and why is None and "native" in backends):
        return NativeForward(
            loaded.current_weights,
            num_blocks=config.kv_blocks,
            block_size=config.block_size,
            threads=threads,
            quantisation=config.quantize,
            kv_dtype=KV_DTYPES[config.kv_dtype],
            deterministic=config.deterministic,
            seen=config.kv.seen,
            release=in_place,
            keep=config.weight_cache == "on",
        )
    if wanted := config.native_only:
        raise InputError(f"{wanted[0]} needs the native backend, but {why}", f"leave {wanted[0]} out", field=wanted[0])
    return TorchForward(loaded.decoder, num_blocks=config.kv_blocks, block_size=config.block_size, in_place=in_place, kv=config.kv)


def _offloaded(loaded: LoadedModel, config: EngineConfig, policy: str, in_place: bool) -> OffloadForward:
    """FlexGen's way: part of the model in an arena of limited size, the rest streamed through it."""
    assert config.kv_blocks is not None
    bounds = Bounds(
        config.kv_blocks, config.block_size, config.max_running, config.max_batch_tokens, config.context or loaded.config.max_context
    )
    if policy == "auto":
        assert config.offload_memory is not None
        memory = available_memory()
        half = None if memory is None else memory // 2
        chosen = fit(loaded.config, bounds, config.offload_memory, memory=half, compress=config.offload_compress == "int4")
    else:
        chosen = replace(OffloadPolicy.parse(policy), compress=config.offload_compress == "int4")
    folder = Path(config.offload_folder).expanduser() if config.offload_folder is not None else cache_dir() / "offload"
    return OffloadForward(loaded.current_weights, chosen, bounds, folder=folder, memory=config.offload_memory, release=in_place)


class LLM:
    """A model and its engine in one object. Options are those of `EngineConfig`: `LLM("smollm2", block_size=32)`.

    Calls are synchronous; all prompts of a call share the engine's batches.
    """

    def __init__(self, model: str | Path | LoadedModel = "smollm2", *, trace: Trace | None = None, **options: Any) -> None:
        self.loaded = model if isinstance(model, LoadedModel) else load(model)
        # A model that was handed in may be used for something else too.
        self.engine = build_engine(self.loaded, EngineConfig(**options), trace=trace, keep_weights=isinstance(model, LoadedModel))
        self._grammars = GrammarCompiler(self.loaded.tokenizer, self.loaded.config.vocab_size)
        self._calls = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
        *,
        lora: Lora = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids); answers in the order of the prompts.

        `sampling` is one for all (default: `SamplingParams()`) or one each; so is `lora`, the name of an adapter. `progress(done, total)` is called as answers end. Every
        answer follows `grammar` (`grammar.json_schema(...)` and its neighbours), which needs the extra `grammar`.
        Raises what the engine found wrong with a request; the others of the call are cancelled.
        """
        given: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        encode = self.loaded.tokenizer.encode
        tokens = [tuple(encode(prompt)) if isinstance(prompt, str) else tuple(prompt) for prompt in given]
        texts = [prompt if isinstance(prompt, str) else None for prompt in given]
        return self._run(texts, tokens, sampling, progress, grammar, lora)

    def chat(
        self,
        messages: str | Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
        *,
        lora: Lora = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """Answer a conversation ([{"role": ..., "content": ...}, ...], or a str: one user message), or each of several."""
        template = self.loaded.chat_template
        if template is None:
            raise InputError(f"{self.loaded.name} has no chat template", "use generate(), or a chat model")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        texts = [template.render([dict(message) for message in conversation]) for conversation in conversations]  # type: ignore[arg-type]
        tokens = [tuple(self.loaded.tokenizer.encode(text, special=False)) for text in texts]
        return self._run(texts, tokens, sampling, progress, grammar, lora)

    def load_lora(self, name: str, path: str | Path) -> None:
        """Serve the peft folder at `path` under `name` from now on; a name that is taken gets new weights. Raises as `AdapterStore.load`."""
        self._store.load(name, path)

    def unload_lora(self, name: str) -> None:
        """Raises NotFoundError with the closest name."""
        self._store.unload(name)

    @property
    def _store(self) -> AdapterStore:
        if self.engine.adapters is None:
            raise InputError("this engine takes no adapters", "use the native or the torch backend", field="lora")
        return self.engine.adapters

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamParams | None = None) -> list[list[Beam]]:
        """The likeliest continuations of each prompt that beam search finds, best first. See `BeamParams`."""
        given: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        params = params or BeamParams()
        call = next(self._calls)
        searches: list[BeamSearch] = []
        for i, prompt in enumerate(given):
            tokens = tuple(self.loaded.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
            known_tokens(tokens, self.loaded.config.vocab_size, "prompt")
            searches.append(BeamSearch(f"beam-{call}-{i}", tokens, params, self.engine.eos_ids))
        open_requests: list[Request] = []
        try:
            while searching := [search for search in searches if not search.done]:
                rounds = [search.requests() for search in searching]
                open_requests = [request for requests in rounds for request in requests]
                for request in open_requests:
                    self.engine.submit(request)
                self.engine.run_until_idle()
                for request in open_requests:
                    if request.finish_reason != "length":
                        raise ArmillaryError(f"beam search stopped: request '{request.id}' ended with {request.finish_reason}")
                for search, requests in zip(searching, rounds, strict=True):
                    self.engine.let_go(search.advance(requests))
        finally:
            for request in open_requests:
                self.engine.cancel(request.id)
            self.engine.let_go(request for search in searches for _, request in search.live if request is not None)
            self.engine.let_go(open_requests)
        return [search.ended for search in searches]

    def _run(
        self,
        texts: Sequence[str | None],
        tokens: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        progress: Progress | None,
        grammar: Grammar | None,
        lora: Lora,
    ) -> list[Completion]:
        names = [lora] * len(tokens) if lora is None or isinstance(lora, str) else lora
        if len(names) != len(tokens):
            raise InputError(f"{len(names)} adapters for {len(tokens)} prompts", "give one for all or one each", field="lora")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(tokens)
        if len(sampling) != len(tokens):
            raise InputError(
                f"{len(sampling)} sampling parameters for {len(tokens)} prompts", "give one for all or one each", field="sampling"
            )
        for prompt, params in zip(tokens, sampling, strict=True):
            known_tokens(prompt, self.loaded.config.vocab_size, "prompt")
            known_tokens((token for token, _ in params.logit_bias), self.loaded.config.vocab_size, "logit_bias")
        compiled = self._grammars.compile(grammar) if grammar is not None else None
        call = next(self._calls)  # callers may be several threads
        run = _Run(len(tokens), progress)
        requests = []
        for i, (prompt, params) in enumerate(zip(tokens, sampling, strict=True)):
            stream = TextStream(self.loaded.tokenizer, params.stop)
            constraint = compiled.matcher() if compiled is not None else None
            requests.append(Request(f"llm-{call}-{i}", prompt, params, constraint=constraint, text=stream, on_event=run.listen))
        try:
            for request, name in zip(requests, names, strict=True):
                request.adapter = self._store.key(name) if name is not None else ""
                self.engine.submit(request)
            self.engine.run_until_idle()
        except BaseException:
            for request in requests:
                self.engine.cancel(request.id)
            raise
        if run.error is not None:
            raise run.error
        unfinished = [request.id for request in requests if request.finish_reason is None]
        if unfinished:
            raise ArmillaryError(f"the engine stopped before {len(unfinished)} of {len(requests)} requests ended")
        return [
            Completion(
                text, request.prompt, "".join(run.pieces.get(request.id, ())), tuple(request.output), request.finish_reason or "error",
                tuple(request.logprobs), request,
            )
            for text, request in zip(texts, requests, strict=True)
        ]  # fmt: skip


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int))


@dataclass(slots=True)
class _Run:
    """What the events of one call add up to."""

    total: int
    progress: Progress | None
    pieces: dict[str, list[str]] = field(default_factory=dict)
    done: int = 0
    error: Exception | None = None

    def listen(self, event: Event) -> None:
        self.pieces.setdefault(event.request_id, []).append(event.text)
        if event.error is not None:
            self.error = self.error or event.error
        if event.finish_reason is not None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)
