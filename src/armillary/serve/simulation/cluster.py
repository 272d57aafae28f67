"""Replicas of the engine behind the router in virtual time: nobody is asked anything between the events that concern them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from armillary.core.errors import InputError
from armillary.serve.fleet.prefix_index import PrefixIndex
from armillary.serve.policies.routing.state import ReplicaView, RouteState, RoutingPolicy
from armillary.serve.prefix_cache import known_names
from armillary.serve.request import Request
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.leap import Leap
from armillary.serve.simulation.pipeline import Pipeline, parts_of, pipeline_of
from armillary.serve.workload.requests import Listed, Source
from armillary.sim.events import EventQueue


class Replica:
    """An engine, and what it is at: a leap of which `count` iterations are to be run."""

    def __init__(self, index: int, engine: VirtualEngine) -> None:
        self.index, self.engine = index, engine
        self.leap: Leap | None = None
        self.count = 0
        self.expected = 0  # requests that wait for it outside of the engine
        self.event: int | None = None  # when it is next looked at
        self.due = 0  # ns of that, for a lane
        self.lanes: Lanes | None = None  # those that it is one of
        self.prefixes = PrefixIndex(engine.limits.total_blocks)

    def view(self, names: Sequence[bytes]) -> ReplicaView:
        """What a router knows of it."""
        engine = self.engine
        size = engine.limits.block_size
        matched = self.prefixes.matched(names) * size if names else 0
        return ReplicaView(
            self.index, engine.queued + self.expected, engine.running, engine.queued_tokens, len(self.prefixes) * size, matched
        )


class Lanes:
    """A replica with several batches in flight over its pipeline, each an engine's: to a router they are one."""

    def __init__(self, index: int, lanes: Sequence[Replica], pipeline: Pipeline) -> None:
        self.index, self.lanes, self.pipeline = index, lanes, pipeline
        for lane in lanes:
            lane.lanes = self

    def view(self, names: Sequence[bytes]) -> ReplicaView:
        each = [lane.view(names) for lane in self.lanes]
        return ReplicaView(
            self.index,
            sum(view.waiting for view in each),
            sum(view.running for view in each),
            sum(view.queued_tokens for view in each),
            sum(view.cached_tokens for view in each),
            max(view.matched for view in each),
        )

    def lane(self, names: Sequence[bytes], at: int) -> Replica:
        """The one that a request joins: which has computed most of it, then with fewest requests, then whose batch has been under way for longest."""

        def key(place: int) -> tuple[int, int, int, int]:
            lane, flight = self.lanes[place], self.pipeline.flights[place]
            began = flight.under_way(at) if flight is not None else -1
            return -lane.view(names).matched, lane.engine.queued + lane.engine.running, began, place

        return self.lanes[min(range(len(self.lanes)), key=key)]


class Views(Sequence[ReplicaView]):
    """All replicas' views, made when they are looked at: a router that looks at two of a thousand pays for two."""

    def __init__(self, replicas: Sequence[Replica | Lanes], names: Sequence[bytes]) -> None:
        self._replicas, self._names = replicas, names

    def __len__(self) -> int:
        return len(self._replicas)

    @overload
    def __getitem__(self, place: int) -> ReplicaView: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ReplicaView]: ...
    def __getitem__(self, place: int | slice) -> ReplicaView | Sequence[ReplicaView]:
        if isinstance(place, slice):
            return Views(self._replicas[place], self._names)
        return self._replicas[place].view(self._names)


class Cluster:
    """`engines` behind `router`. Each has a clock of its own, which is at the beginning of its present iterations. `lanes` engines after each other
    are one replica to the router."""

    def __init__(self, engines: Sequence[VirtualEngine], router: RoutingPolicy, *, seed: int = 0, lanes: int = 1) -> None:
        if not engines:
            raise InputError("a cluster without replicas serves nothing", "give at least one", field="replicas")
        self.replicas = [Replica(index, engine) for index, engine in enumerate(engines)]
        places = range(0, len(engines), lanes)
        self._routed: Sequence[Replica | Lanes] = self.replicas
        if lanes > 1:
            self._routed = [Lanes(place // lanes, self.replicas[place : place + lanes], pipeline_of(engines[place])) for place in places]
        self.router = router
        self.routed = 0
        self._seed = seed
        self._events: EventQueue[Replica] = EventQueue()
        asked = lanes > 1 or router.name in ("cache-aware", "consistent-hash")
        self._named = asked and any(engine.config.prefix_cache == "on" for engine in engines)

    def run(self, requests: Iterable[Request] | Source) -> None:
        """`requests`, in the order of their `arrival`, to their end; they are taken one by one.

        One that arrives when an iteration ends is in time for the next, but for one that comes because of that end: then the next has begun. Raises InputError for one that arrives before the one before it.
        """
        coming = requests if isinstance(requests, Source) else Listed(requests)
        while True:
            at, then = coming.next_time, self.next_time
            if at is not None and (then is None or at <= then):
                self.route(coming.take(), at)
            elif then is not None:
                self.advance()
            else:
                break
        self.check()

    @property
    def next_time(self) -> int | None:
        """When a replica is next looked at, ns."""
        return self._events.next_time

    def advance(self) -> None:
        """To the next time at which a replica has ended what it was at: it is told to go on."""
        replica = self._events.pop()
        if replica is not None:
            self._look_at(replica)

    def check(self) -> None:
        """Assert the invariants of every replica's memory."""
        for replica in self.replicas:
            replica.engine.check()

    def ended(self, replica: Replica) -> None:
        """What it was at is over, and what comes next has not begun: for clusters that see to more than that."""

    def route(self, request: Request, at: int) -> None:
        """To the replica that the router says."""
        self.give(self.choose(request, at), request, at)

    def choose(self, request: Request, at: int) -> Replica:
        """Whom the router says, at `at` ns."""
        chosen = self._routed[0]
        names: Sequence[bytes] = known_names(request, self.replicas[0].engine.limits.block_size) if self._named else ()
        if len(self._routed) > 1:
            session = request.session or (names[0].hex() if names else request.id)
            state = RouteState(request.id, session, len(request.prompt), Views(self._routed, names), self.routed, self._seed)
            chosen = self._routed[self.router.step(state).replica]
        replica = chosen.lane(names, at) if isinstance(chosen, Lanes) else chosen
        if names:
            replica.prefixes.sent(names)
        self.routed += 1
        return replica

    def give(self, replica: Replica, request: Request, at: int) -> None:
        """To this one, at `at` ns, which is no earlier than anything that has been looked at."""
        replica.engine.submit(request)
        if replica.leap is None:
            if replica.event is None:
                replica.event = self._events.at(at, replica)
        else:
            self.recall(replica, at)

    def recall(self, replica: Replica, at: int) -> None:
        """What has not begun by `at` ns is decided again."""
        if replica.lanes is not None:
            if replica.leap is not None:
                replica.lanes.pipeline.call_off(self._place(replica), at)
                self._foresee(replica.lanes, at)
        elif replica.leap is not None and (count := replica.leap.until(at)) < replica.count:
            self._await(replica, count)

    def _look_at(self, replica: Replica) -> None:
        replica.event = None
        engine, now = replica.engine, self._events.now
        if replica.lanes is not None:
            self._look_at_lane(replica, replica.lanes)
            return
        if replica.leap is not None:
            engine.end(replica.leap, replica.count)
            replica.leap = None
        engine.virtual_clock.advance_to(now)
        self.ended(replica)
        if (drafted := engine.draft()) > now:
            replica.event = self._events.at(drafted, replica)
            return
        replica.leap = engine.begin()
        if replica.leap is not None:
            self._await(replica, len(replica.leap.ends))

    def _look_at_lane(self, lane: Replica, lanes: Lanes) -> None:
        engine, now, place = lane.engine, self._events.now, self._place(lane)
        if lane.leap is not None:
            lane.leap.ends = np.array(lanes.pipeline.end(place), dtype=np.int64)
            engine.end(lane.leap)
        engine.virtual_clock.advance_to(now)
        lane.leap = engine.begin()
        if lane.leap is not None:
            lanes.pipeline.begin(place, now, parts_of(engine))
        self._foresee(lanes, now + 1)

    def _foresee(self, lanes: Lanes, before: int) -> None:
        """Each lane is looked at again when all that is foreseen of it has ended."""
        lanes.pipeline.foresee(before)
        for lane, flight in zip(lanes.lanes, lanes.pipeline.flights, strict=True):
            if flight is None or (lane.event is not None and lane.due == flight.ends[-1]):
                continue
            if lane.event is not None:
                self._events.cancel(lane.event)
            lane.due = flight.ends[-1]
            lane.event = self._events.at(lane.due, lane)

    @staticmethod
    def _place(lane: Replica) -> int:
        assert lane.lanes is not None
        return lane.index - lane.lanes.lanes[0].index

    def _await(self, replica: Replica, count: int) -> None:
        """The replica is looked at again after `count` iterations of its leap."""
        assert replica.leap is not None
        if replica.event is not None:
            self._events.cancel(replica.event)
        replica.count = count
        replica.event = self._events.at(int(replica.leap.ends[count - 1]), replica)
