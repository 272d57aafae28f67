"""What embeddings and reranking need of a model, and an encoder that gives it: all who wait share its batches."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from armillary.core.errors import ArmillaryError, CapacityError, InputError, NotFoundError
from armillary.serve.admission import known_tokens

if TYPE_CHECKING:
    from armillary.models.encoder import LoadedEncoder

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 4096
MAX_QUEUE = 16384


class Embedder(Protocol):
    """A model that turns sequences of tokens into vectors."""

    @property
    def model_name(self) -> str: ...

    @property
    def dimensions(self) -> int:
        """The length of a vector."""
        ...

    @property
    def max_input_tokens(self) -> int:
        """The most tokens of one input."""
        ...

    @property
    def longer(self) -> str:
        """What would make that more, in words that end a sentence."""
        ...

    def check_model(self, name: str | None) -> None:
        """Raises NotFoundError for another model's name."""
        ...

    def text_tokens(self, text: str) -> tuple[int, ...]: ...

    def check_tokens(self, tokens: Sequence[int], field: str = "prompt") -> tuple[int, ...]: ...

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        """One vector [dimensions] for each input; being cancelled withdraws what has not begun."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    tokens: Sequence[int]
    future: asyncio.Future[Tensor]
    loop: asyncio.AbstractEventLoop
    error: Exception | None = None
    vector: Tensor | None = None


@dataclass(slots=True)
class EmbedderStats:
    """Cumulative counts since the start."""

    sequences: int = 0
    tokens: int = 0
    batches: int = 0
    busy_seconds: float = 0.0


class EncoderService:
    """An encoder behind one thread: each batch takes those that have waited longest, up to `max_batch_tokens` tokens.

    `gate`, when there is one, raises when that many tokens are not to be taken now. At most `max_queue` sequences wait: CapacityError for more. `max_tokens` may be over what the model was made for, up to its positions.
    """

    def __init__(
        self,
        loaded: LoadedEncoder,
        *,
        max_tokens: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        config = loaded.config
        if max_tokens is not None and max_tokens > config.positions:
            raise InputError(
                f"a context of {max_tokens:,} was asked for; {loaded.name} has {config.positions} positions",
                "ask for less",
                field="context",
            )
        self.loaded = loaded
        self.model_name = loaded.name
        self.dimensions = config.hidden_size
        self.max_input_tokens = config.max_tokens if max_tokens is None else max_tokens
        self.started_at = time.time()
        self.stats = EmbedderStats()
        self.gate: Callable[[int], None] | None = None
        self._max_batch_tokens = max_batch_tokens
        self._max_queue = max_queue
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def longer(self) -> str:
        """What would make `max_input_tokens` more, in words that end a sentence."""
        positions = self.loaded.config.positions
        if self.max_input_tokens < positions:
            return f"serve with a larger --context: the model has {positions} positions"
        return "serve a model with more positions"

    def start(self) -> None:
        """Compute on a background thread as inputs come."""
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="armillary-encoder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the running batch; who waits gets a CapacityError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
        for job in left:
            job.error = CapacityError("the encoder is stopping", "send the request to another server")
        _tell(left)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise NotFoundError(f"model {name[:200]!r} is not served here", f"ask for {self.model_name!r}", field="model")

    def text_tokens(self, text: str) -> tuple[int, ...]:
        return self.loaded.encode(text)

    def check_tokens(self, tokens: Sequence[int], field: str = "prompt") -> tuple[int, ...]:
        known_tokens(tokens, self.loaded.config.vocab_size, field)
        return tuple(tokens)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        if self.gate is not None:
            self.gate(sum(map(len, inputs)))
        loop = asyncio.get_running_loop()
        jobs = [_Job(tokens, loop.create_future(), loop) for tokens in inputs]
        with self._changed:
            if not self.alive:
                raise CapacityError("the encoder does not run", "come back when the server has restarted")
            if len(self._queue) + len(jobs) > self._max_queue:
                raise CapacityError(
                    f"{len(self._queue):,} inputs wait and {len(jobs):,} more came; the bound is {self._max_queue:,}", "retry later"
                )
            self._queue.extend(jobs)
            self._changed.notify_all()
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        finally:
            for job in jobs:
                job.future.cancel()  # whoever waits for one no longer; the thread passes it by

    def _work(self) -> None:
        while batch := self._next():
            begin = time.perf_counter()
            try:
                for job, vector in zip(batch, self.loaded.encoder.embed([job.tokens for job in batch]), strict=True):
                    job.vector = vector
            except Exception as error:
                for job in batch:
                    job.error = ArmillaryError(f"the encoder failed on a batch ({type(error).__name__})", "its log has the details")
                log.error("the encoder failed", exc_info=error)
            self.stats.busy_seconds += time.perf_counter() - begin
            self.stats.sequences += len(batch)
            self.stats.tokens += sum(len(job.tokens) for job in batch)
            self.stats.batches += 1
            _tell(batch)

    def _next(self) -> list[_Job]:
        """The next batch, when there is one; empty when the service stops."""
        with self._changed:
            while True:
                batch: list[_Job] = []
                tokens = 0
                while self._queue and not self._stopping:
                    if self._queue[0].future.cancelled():
                        self._queue.popleft()
                        continue
                    tokens += len(self._queue[0].tokens)
                    if batch and tokens > self._max_batch_tokens:
                        break
                    batch.append(self._queue.popleft())
                if batch or self._stopping:
                    return batch
                self._changed.wait()


def _tell(jobs: Sequence[_Job]) -> None:
    """Give the results to their loops, one wakeup a loop."""

    def settle(mine: list[_Job]) -> None:
        for job in mine:
            if not job.future.done():
                if job.error is not None:
                    job.future.set_exception(job.error)
                elif job.vector is not None:
                    job.future.set_result(job.vector)

    for loop in {job.loop for job in jobs}:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            loop.call_soon_threadsafe(settle, [job for job in jobs if job.loop is loop])
