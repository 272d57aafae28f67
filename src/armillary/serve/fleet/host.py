"""A replica's side of the conversation: messages in, an engine at work, messages out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from armillary.core.contract import Executor
from armillary.core.errors import ArmillaryError, InputError
from armillary.serve.constraint import Constraint
from armillary.serve.engine import Engine
from armillary.serve.fleet.messages import Message, pack_error, pack_token, unpack_request
from armillary.serve.request import Event, Request
from armillary.serve.schedule import Outcome, Plan


class Leave(Protocol):
    """Where an attempt's keys and values are left; `left` says what there is, once there is."""

    left: dict[str, int] | None

    def write(self, table: Sequence[int], tokens: int) -> None: ...


class Fetch(Protocol):
    """Keys and values of `tokens` tokens that another worker has left."""

    tokens: int

    def into(self, table: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """How keys and values leave and enter this replica's pool."""

    def leave(self, place: str) -> Leave: ...

    def fetch(self, place: str, tokens: int, size: int) -> Fetch: ...

    def free(self, place: str) -> None:
        """What was left there is not wanted any more."""
        ...


@dataclass(slots=True, eq=False)
class Hosted:
    """An attempt of the router's, as a request of this engine. `leave`: its cache is for others; `fetch`: its cache comes from others."""

    attempt: int
    request: Request
    leave: Leave | None = None
    fetch: Fetch | None = None
    parent: Hosted | None = None  # its prompt is this one's
    forks: list[Hosted] = field(default_factory=list)  # that are ready, and begin after it
    tied: bool = False
    ready: bool = False
    begun: bool = False  # the engine has it
    started: bool = False
    unfetched: bool = False
    scored: bool = False


class ReplicaHost:
    """`heard` takes the router's messages, `send` gives it ours; both may be called from any thread, the engine's too.

    A tied request stays outside the engine until the next iteration could take it; then this replica claims it, and runs it only
    if the router grants that: it grants it once, so that it never runs twice, however long messages take.

    `files`: how keys and values leave and enter, for prefill and decode workers. `constrain` compiles a grammar.
    """

    def __init__(
        self,
        engine: Engine,
        send: Callable[[Message], None],
        files: Files | None = None,
        constrain: Callable[[Message], Constraint] | None = None,
    ) -> None:
        self.engine = engine
        self._constrain = constrain
        self._files = files
        self._send = send
        self._hosted: dict[int, Hosted] = {}
        self._by_id: dict[str, Hosted] = {}
        self._tied: deque[Hosted] = deque()
        self._claimed: dict[int, Hosted] = {}
        self._unstarted = 0  # tokens that the engine was given, or that were claimed for it, and has not begun with
        self._lock = threading.RLock()
        self._adapting = ThreadPoolExecutor(1, "replica-adapters")  # in order, and beside everything else
        engine.executor = Watched(engine.executor, self)

    def heard(self, message: Message) -> None:
        op, attempt = message["op"], message.get("attempt")
        with self._lock:
            if op == "submit":
                self._submit(message)
            elif op == "grant" and attempt in self._claimed:
                self._begin(self._claimed.pop(attempt))
            elif op == "cancel":
                self._cancel(attempt)
        if op in ("load_adapter", "unload_adapter"):
            self._adapting.submit(self._adapt, message)
        if op == "free" and self._files is not None:
            self._files.free(message["place"])
        if op == "explain":
            self._send({"op": "explained", "ask": message["ask"], "attempt": -1, "words": self.engine.explain(message["id"])})

    def pulse(self, since: int) -> Message:
        """How the engine is, with the iterations after `since`."""
        state = self.engine.snapshot(since)
        return {
            "op": "pulse",
            "iterations": state["iterations"][-64:],
            **{name: state[name] for name in ("iteration", "blocks", "stats", "features")},
        }

    def _adapt(self, message: Message) -> None:
        """An adapter comes, which takes its time, or goes."""
        key, store, digest, failure = message["key"], self.engine.adapters, None, None
        try:
            if store is None:
                raise InputError("this engine takes no adapters", "use the native or the torch backend", field="lora")
            if message["op"] == "load_adapter":
                digest = digest_of([stamp.path for stamp in store.load(key, message["path"]).files])
            else:
                store.unload(key)
        except Exception as error:
            failure = pack_error(error)
        if message["op"] == "load_adapter":
            self._send({"op": "adapter", "attempt": -1, "key": key, "digest": digest, "error": failure})

    # -- requests ----------------------------------------------------------------------------------------------------

    def _submit(self, message: Message) -> None:
        attempt = int(message["attempt"])
        try:
            hosted = Hosted(attempt, unpack_request(message["request"], self.engine.clock.now()), tied=bool(message["tied"]))
            hosted.parent = self._hosted.get(message.get("parent", -1))
            self._connect(hosted, message)
        except (ArmillaryError, OSError) as error:
            self._send({"op": "refused", "attempt": attempt, "error": pack_error(error)})
            return
        self._hosted[attempt] = hosted
        grammar = message["request"]["grammar"]
        if grammar is None:
            self._ready(hosted)
        else:  # it may take seconds
            threading.Thread(target=self._compile, args=(hosted, grammar), name=f"grammar-{attempt}", daemon=True).start()

    def _compile(self, hosted: Hosted, grammar: Message) -> None:
        try:
            if self._constrain is None:
                raise InputError("this replica follows no grammars", "serve a model with a tokenizer", field="grammar")
            constraint = self._constrain(grammar)
            for token in hosted.request.output:  # it was begun elsewhere
                constraint.accept(token)
            hosted.request.constraint = constraint
        except Exception as error:
            with self._lock:
                if self._hosted.pop(hosted.attempt, None) is not None:
                    self._release(hosted)
                    self._send({"op": "refused", "attempt": hosted.attempt, "error": pack_error(error)})
            return
        with self._lock:
            if hosted.attempt in self._hosted:
                self._ready(hosted)

    def _ready(self, hosted: Hosted) -> None:
        parent = hosted.parent
        if parent is not None and not parent.begun and parent.attempt in self._hosted:  # its grammar is being compiled
            parent.forks.append(hosted)
            return
        hosted.ready = True
        if hosted.tied:
            self._tied.append(hosted)
            self._claim()
        else:
            self._unstarted += hosted.request.known
            self._begin(hosted)

    def _connect(self, hosted: Hosted, message: Message) -> None:
        """Where its keys and values go to or come from, when that is another worker."""
        leave, fetch = message.get("leave"), message.get("fetch")
        if leave is None and fetch is None:
            return
        if self._files is None:
            raise InputError("this replica has no keys and values to give or take", "serve a model")
        if leave is not None:
            hosted.leave = self._files.leave(leave)
        if fetch is not None:
            hosted.fetch = self._files.fetch(fetch["place"], fetch["tokens"], fetch["bytes"])
            hosted.request.delivered = hosted.fetch.tokens

    def _begin(self, hosted: Hosted) -> None:
        request = hosted.request
        request.on_event = lambda event: self._event(hosted, event)
        self._by_id[request.id] = hosted
        try:
            if request.adapter and self.engine.adapters is not None:
                request.adapter = self.engine.adapters.key(request.adapter)  # between processes it is a name
            parent = hosted.parent
            if parent is not None and parent.attempt in self._hosted and parent.request.adapter == request.adapter:
                request.parent = parent.request
            self.engine.submit(request)
            hosted.begun = True
            self._release(hosted)
        except ArmillaryError as error:
            self._gone(hosted)
            self._send({"op": "refused", "attempt": hosted.attempt, "error": pack_error(error)})

    def _claim(self) -> None:
        """Tied requests that the next iteration could begin with."""
        limits = self.engine.limits
        while self._tied and self._unstarted < limits.max_batch_tokens and len(self._by_id) + len(self._claimed) < limits.max_running:
            hosted = self._tied.popleft()
            self._unstarted += hosted.request.known
            self._claimed[hosted.attempt] = hosted
            self._send({"op": "claim", "attempt": hosted.attempt})

    def _cancel(self, attempt: int | None) -> None:
        hosted = self._hosted.get(attempt) if attempt is not None else None
        if hosted is None:
            return
        if not hosted.ready or hosted in self._tied:
            if hosted.ready:
                self._tied.remove(hosted)
            if hosted.fetch is not None:
                hosted.fetch.close()
            del self._hosted[hosted.attempt]
            self._release(hosted)
        elif self._claimed.pop(hosted.attempt, None) is not None:
            self._gone(hosted)
        elif not self.engine.cancel(hosted.request.id):
            return  # it has ended, and says so
        else:
            self._gone(hosted)

    def _gone(self, hosted: Hosted) -> None:
        """It has left the engine, or never was there."""
        if self._hosted.pop(hosted.attempt, None) is None:
            return
        if self._by_id.get(hosted.request.id) is hosted:
            del self._by_id[hosted.request.id]
        if not hosted.started:
            self._unstarted -= hosted.request.known
        if hosted.fetch is not None:
            hosted.fetch.close()
        self._release(hosted)
        self._claim()

    def _release(self, parent: Hosted) -> None:
        """It has begun, or is gone: its forks wait for it no longer."""
        forks, parent.forks = parent.forks, []
        for fork in forks:
            if fork.attempt in self._hosted:
                self._ready(fork)

    # -- what the engine does ----------------------------------------------------------------------------------------

    def begins(self, request: Request) -> Hosted | None:
        """The engine's thread: `request` is in the iteration that is about to run."""
        hosted = self._by_id.get(request.id)
        if hosted is None or hosted.request is not request:
            return None  # cancelled; another attempt of the same request may be here already
        if hosted.started:
            return hosted
        with self._lock:
            hosted.started = True
            self._unstarted -= request.known
            self._send({"op": "started", "attempt": hosted.attempt, "reused": 0 if hosted.fetch is not None else request.reused})
            self._claim()
        return hosted

    def fetched(self, hosted: Hosted) -> None:
        self._send({"op": "fetched", "attempt": hosted.attempt})

    def _event(self, hosted: Hosted, event: Event) -> None:
        request, scores = hosted.request, None
        if request.prompt_logprobs and not hosted.scored:
            hosted.scored = True
            scores = [None if score is None else pack_token(score) for score in request.prompt_logprobs]
        token = None
        reason = event.finish_reason
        if reason == "error" and hosted.unfetched:  # not the request's fault: it may begin anew elsewhere
            reason = "cancelled"
        if event.token is not None:
            token = [event.token] if event.logprob is None else pack_token(event.logprob)
        self._send(
            {
                "op": "token",
                "attempt": hosted.attempt,
                "token": token,
                "scores": scores,
                "reason": reason,
                "error": None if event.error is None else pack_error(event.error),
                "notes": None if event.finish_reason is None else [request.preemptions, request.drafted, request.accepted],
                "left": None if hosted.leave is None or event.finish_reason is None else hosted.leave.left,
            }
        )
        if event.finish_reason is not None:
            with self._lock:
                self._gone(hosted)


class Watched:
    """The executor of a replica: says what starts, and brings and keeps what other workers compute or need."""

    def __init__(self, executor: Executor[Plan, Outcome], host: ReplicaHost) -> None:
        self.inner = executor
        self._host = host

    def __getattr__(self, name: str) -> Any:
        """What else the executor has."""
        return getattr(self.inner, name)

    def run(self, plan: Plan) -> Outcome:
        hosted = [self._host.begins(request) for request in plan.requests]
        rows = [
            (index, held, entry, table)
            for index, (held, entry, table) in enumerate(zip(hosted, plan.schedule.entries, plan.block_tables, strict=True))
            if held is not None
        ]
        failed: list[tuple[int, Exception]] = []
        for index, held, entry, table in rows:
            if held.fetch is not None:
                try:
                    if entry.start == held.fetch.tokens:
                        held.fetch.into(table)
                    self._host.fetched(held)
                except (ArmillaryError, OSError, ValueError) as error:
                    failed.append((index, error))
                    held.unfetched = True
                held.fetch.close()
                held.fetch = None
        outcome = self.inner.run(plan)
        for index, held, entry, table in rows:
            if held.leave is not None and entry.sample and not any(index == broken for broken, _ in outcome.failed):
                held.leave.write(table, entry.start + entry.count - entry.drafts)
        if failed:
            others = tuple(pair for pair in outcome.failed if pair[0] not in dict(failed))
            outcome = Outcome(outcome.sampled, outcome.prompt_logprobs, outcome.start, outcome.end, (*failed, *others))
        return outcome


def digest_of(files: Iterable[Path]) -> str:
    """Of their contents, the same wherever they lie."""
    digest = blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
