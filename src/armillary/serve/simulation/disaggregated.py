"""Prompts and answers on engines of their own in virtual time, keys and values moved between them (Zhong et al., DistServe, OSDI 2024)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.cluster.device import Link
from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.units import S
from armillary.serve.admission import admissible
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.policies import routing
from armillary.serve.request import Request
from armillary.serve.schedule import Plan
from armillary.serve.simulation.cluster import Cluster, Replica
from armillary.serve.simulation.drafts import Drafting
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.pipeline import Lane, Pipeline
from armillary.serve.simulation.recorder import Recorder, Result
from armillary.serve.workload.requests import Listed, Source
from armillary.sim.costs import CostModel
from armillary.sim.costs.roofline import Roofline
from armillary.sim.events import EventQueue


@dataclass(frozen=True, slots=True)
class Side:
    """`count` engines of one phase. `config.kv_blocks` is settled; `drafting` where `config` speculates. Of each `lanes` batches are in flight over
    its `stages`, and `config` is one's."""

    cost: CostModel
    config: EngineConfig
    count: int = 1
    drafting: Drafting | None = None
    lanes: int = 1
    stages: Sequence[Roofline] = ()


@dataclass(frozen=True, slots=True)
class Transfer:
    """The keys and values of one request's prompt on their way, ns."""

    request_id: str
    source: int
    target: int
    size: int  # bytes
    begun: int
    ended: int


@dataclass(slots=True)
class _Waiting:
    """A request whose prompt is computed: what users will see of it, and where its keys and values lie."""

    request: Request
    source: int


class _Ended:
    """Collects the requests that an engine ends; the times between tokens go to `recorder`."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.requests: list[Request] = []
        self._recorder = recorder

    def ended(self, request: Request) -> None:
        self.requests.append(request)

    def waited(self, plan: Plan, ends: NDArray[np.int64]) -> None:
        if self._recorder is not None:
            self._recorder.waited(plan, ends)


class Disaggregated:
    """A request is sent to the prefill engine with the shortest queue, which draws its first token; then to the decode engine with fewest requests,
    which pulls its keys and values when it has blocks for them, one request after another over its `link`.

    What has been sent to a prefill engine and not been pulled is at most `buffer` tokens: a request whose prompt would exceed that is not begun.
    A buffer as large as the engine's pool is that pool. `token_bytes` of keys and values are moved for each token of a prompt, and an engine
    sends to one at a time. `moved` tells of all of it. `paired`: decode engine i pulls from prefill engine i alone.
    """

    def __init__(
        self, prefill: Side, decode: Side, link: Link, token_bytes: int, buffer: int, *, paired: bool = False, fast_forward: bool = True
    ) -> None:
        if prefill.count < 1 or decode.count < 1:
            raise InputError(f"{prefill.count} prefill and {decode.count} decode engines", "give at least one of each", field="replicas")
        if token_bytes < 1 or buffer < 1:
            raise InputError(f"{token_bytes} bytes a token, a buffer of {buffer} tokens", "give at least 1 of each", field="buffer")
        if paired and prefill.count != decode.count:
            raise InputError(
                f"{prefill.count} prefill and {decode.count} decode engines are no pairs", "give as many of each", field="paired"
            )
        self.recorder = Recorder()
        self._source: Source = Listed(())
        self.moved: list[Transfer] = []
        self._decode, self._link, self._token_bytes, self._buffer = decode, link, token_bytes, buffer
        self._lanes = prefill.lanes, decode.lanes
        self._prefilled = [_Ended() for _ in range(prefill.count * prefill.lanes)]
        self._decoded = [_Ended(self.recorder) for _ in range(decode.count * decode.lanes)]
        self.prefill = Cluster(_engines(prefill, self._prefilled, fast_forward), routing.get("shortest-queue"), lanes=prefill.lanes)
        self.decode = Cluster(_engines(decode, self._decoded, fast_forward), routing.get("shortest-queue"), lanes=decode.lanes)
        self._coming: deque[Request] = deque()  # not begun, for no prefill engine has room for their keys and values
        self._held = [0] * len(self._prefilled)  # tokens of those that were sent to a prefill engine and not pulled yet
        self._requests: dict[str, Request] = {}  # what users see
        self._sources: dict[str, int] = {}
        self._pending: list[deque[_Waiting]] = [deque() for _ in self._decoded]
        self._under_way = [0] * len(self._decoded)  # requests whose keys and values are
        self._promised = [0] * len(self._decoded)  # blocks that these will take
        self._linked = [0] * decode.count  # ns until which a decode engine's link is busy ...
        self._sending = [0] * prefill.count  # ... and a prefill engine's
        self._paired = paired
        self._transfers: EventQueue[tuple[Transfer, Request]] = EventQueue()

    def run(self, requests: Iterable[Request] | Source) -> Result:
        """`requests`, in the order of their `arrival`, to their end; a `Source` hears of those that end.

        Raises InputError for one that could never run, or comes before the last.
        """
        coming = self._source = requests if isinstance(requests, Source) else Listed(requests)
        while True:
            at, then = coming.next_time, self._next_time
            if at is not None and (then is None or at <= then):
                self._enter(coming.take(), at)
            elif then is not None:
                self._advance(then)
            else:
                break
        assert not self._requests  # everything that could run has ended
        self.prefill.check()
        self.decode.check()
        return self.recorder.result()

    def _enter(self, request: Request, at: int) -> None:
        if len(request.prompt) > self._buffer:
            raise InputError(
                f"the prompt of request '{request.id}' has {len(request.prompt):,} tokens, the buffer of a prefill engine {self._buffer:,}",
                "give a larger buffer",
                field="buffer",
            )
        admissible(request, self._decode.config, self.decode.replicas[0].engine.limits)
        self._requests[request.id] = request
        self._coming.append(request)
        self._begin(at)

    @property
    def _next_time(self) -> int | None:
        times = (self.prefill.next_time, self._transfers.next_time, self.decode.next_time)
        return min((time for time in times if time is not None), default=None)

    def _advance(self, now: int) -> None:
        """What happens at `now`; at one instant prompts end first, then transfers, then decodes."""
        if self.prefill.next_time == now:
            self.prefill.advance()
            self._first_tokens(now)
        elif self._transfers.next_time == now:
            found = self._transfers.pop()
            assert found is not None
            self._arrived(*found)
        else:
            self.decode.advance()
            self._answers()
            for target in range(len(self._pending)):
                self._pull(target, now)

    def _begin(self, now: int) -> None:
        """As many of those that wait, in the order in which they came, as have room for what their prompts leave."""
        while self._coming:
            request = self._coming[0]
            room = [replica for replica in self.prefill.replicas if self._held[replica.index] + len(request.prompt) <= self._buffer]
            if not room:
                return
            replica = min(room, key=lambda one: (one.engine.queued_tokens, one.engine.queued + one.engine.running, one.index))
            self._coming.popleft()
            self._held[replica.index] += len(request.prompt)
            self._sources[request.id] = replica.index
            sampling = dataclasses.replace(request.sampling, max_tokens=min(1, request.sampling.max_tokens))
            own = Request(
                request.id, request.prompt, sampling, arrival=request.arrival, priority=request.priority, deadline=request.deadline,
                cache_salt=request.cache_salt,
            )  # fmt: skip
            self.prefill.give(replica, own, now)

    def _first_tokens(self, now: int) -> None:
        """Prompts have ended: who wants more tokens is sent on."""
        for source, ended in enumerate(self._prefilled):
            for first in ended.requests:
                request = self._requests[first.id]
                request.first_scheduled, request.first_token, request.finished = first.first_scheduled, first.first_token, first.finished
                request.output, request.preemptions, request.reused = list(first.output), first.preemptions, first.reused
                if request.sampling.max_tokens <= 1:
                    self._done(request)
                    self._release(request, now)
                    continue
                among, (mine, its) = self.decode.replicas, self._lanes
                if self._paired:
                    among = among[source // mine * its : (source // mine + 1) * its]
                target = min(among, key=self._load)
                self._pending[target.index].append(_Waiting(request, source))
                self._pull(target.index, now)
            ended.requests.clear()

    def _load(self, replica: Replica) -> tuple[int, int]:
        waiting = len(self._pending[replica.index])
        return waiting + self._under_way[replica.index] + replica.engine.queued + replica.engine.running, replica.index

    def _pull(self, target: int, now: int) -> None:
        """What a decode engine has blocks for, beside what is already on its way."""
        pending, engine = self._pending[target], self.decode.replicas[target].engine
        while pending:
            request = pending[0].request
            blocks = engine.limits.blocks_for(request.known)
            if blocks > engine.free_blocks - self._promised[target]:
                return
            waiting = pending.popleft()
            self._under_way[target] += 1
            self._promised[target] += blocks
            size = len(request.prompt) * self._token_bytes
            source, sink = waiting.source // self._lanes[0], target // self._lanes[1]
            begun = max(now, self._linked[sink], self._sending[source])
            ended = begun + self._link.latency + round(size * S / self._link.bandwidth)
            self._linked[sink] = self._sending[source] = ended
            self._transfers.at(ended, (Transfer(request.id, waiting.source, target, size, begun, ended), request))

    def _arrived(self, transfer: Transfer, request: Request) -> None:
        """Keys and values are there: the decode engine may go on with the request."""
        replica = self.decode.replicas[transfer.target]
        self.moved.append(transfer)
        self._under_way[transfer.target] -= 1
        self._promised[transfer.target] -= replica.engine.limits.blocks_for(request.known)
        own = Request(
            request.id, request.prompt, request.sampling, arrival=request.arrival, priority=request.priority, cache_salt=request.cache_salt,
            delivered=len(request.prompt), output=list(request.output), first_token=request.first_token, last_token=request.first_token,
        )  # fmt: skip
        self.decode.give(replica, own, transfer.ended)
        self._release(request, transfer.ended)

    def _release(self, request: Request, now: int) -> None:
        """Its keys and values need not stay where they were computed."""
        self._held[self._sources.pop(request.id)] -= len(request.prompt)
        self._begin(now)

    def _answers(self) -> None:
        for ended in self._decoded:
            for last in ended.requests:
                request = self._requests[last.id]
                request.output, request.finished = last.output, last.finished
                request.preemptions += last.preemptions
                self._done(request)
            ended.requests.clear()

    def _done(self, request: Request) -> None:
        del self._requests[request.id]
        self.recorder.ended(request)
        self._source.ended(request)


def _engines(side: Side, ended: Sequence[_Ended], fast_forward: bool) -> list[VirtualEngine]:
    engines: list[VirtualEngine] = []
    pipelines = [Pipeline(len(side.stages), side.lanes) for _ in range(side.count)] if side.lanes > 1 else []
    for place, one in enumerate(ended):
        clock = VirtualClock()
        executor = Lane(clock, side.cost, pipelines[place // side.lanes], side.stages) if pipelines else VirtualExecutor(clock, side.cost)
        drafter = side.drafting.drafter(side.config, executor.clock) if side.drafting is not None else None
        engines.append(VirtualEngine(executor, side.config, drafter=drafter, recorder=one, told=False, fast_forward=fast_forward))
    return engines
