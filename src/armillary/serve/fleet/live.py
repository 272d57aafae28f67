"""The fleet as it is now, in the shape of an engine's snapshot: rows, blocks, iterations and counters of all replicas."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import asdict
from typing import Any

from armillary.core.trace import Trace
from armillary.serve.fleet.dispatcher import Dispatcher
from armillary.serve.fleet.member import Member, Ticket
from armillary.serve.history import RECENT_ITERATIONS, EngineStats
from armillary.serve.schedule import Limits

ROWS = 128


class Live:
    """Read under the fleet's lock. Counters of replicas that died are kept, so that none ever falls."""

    def __init__(self, dispatcher: Dispatcher, trace: Trace | None = None) -> None:
        self._dispatcher, self._trace = dispatcher, trace
        self._buried: dict[str, Any] = asdict(EngineStats())
        self._iterations: deque[dict[str, Any]] = deque(maxlen=RECENT_ITERATIONS)
        self._index = 0

    def pulse(self, member: Member) -> None:
        """Its newest iterations join those of the others, in the order in which they were heard of."""
        for iteration in member.pulse["iterations"]:
            self._iterations.append({**iteration, "index": self._index, "replica": member.index})
            self._index += 1
            if self._trace is not None:
                sizes = {"tokens": iteration["tokens"], "sequences": len(iteration["entries"]), "blocks_used": iteration["blocks_used"]}
                self._trace.add(f"replica {member.index}", "step", iteration["start"], iteration["end"], "", sizes)

    def buried(self, member: Member) -> None:
        """A replica died, and its successor counts from 0."""
        if member.pulse:
            self._buried = _sum(self._buried, member.pulse["stats"])
            member.pulse = {}

    def stats(self) -> EngineStats:
        total = self._buried
        for member in self._dispatcher.members:
            if member.pulse:
                total = _sum(total, member.pulse["stats"])
        own = {"finished": dict(self._dispatcher.finished), "generated_tokens": self._dispatcher.generated}
        return EngineStats(**{**total, **own})

    def snapshot(self, since: int, policy: str, limits: Limits) -> dict[str, Any]:
        dispatcher = self._dispatcher
        members, tickets = dispatcher.members, dispatcher.tickets
        started = sum(any(attempt.started for attempt in ticket.attempts) for ticket in tickets.values())
        pulses = [member.pulse["blocks"] for member in members if member.pulse]
        return {
            "policy": f"{policy}, {dispatcher.router.name} over {len(members)} replicas",
            "now": dispatcher.clock.now(),
            "iteration": self._index,
            "running": started,
            "waiting": len(tickets) - started,
            "limits": asdict(limits),
            "blocks": {
                "used": sum(blocks["used"] for blocks in pulses),
                "kept": sum(blocks["kept"] for blocks in pulses),
                "total": limits.total_blocks * len(members),
                "block_size": limits.block_size,
            },
            "requests": [self._row(ticket, limits) for ticket in itertools.islice(tickets.values(), ROWS)],
            "iterations": [iteration for iteration in self._iterations if iteration["index"] > since],
            "stats": asdict(self.stats()),
            "features": {"fleet": self._fleet()},
        }

    def _fleet(self) -> dict[str, Any]:
        dispatcher = self._dispatcher
        return {
            "router": dispatcher.router.name,
            "tail": dispatcher.config.tail,
            "replicas": [_replica(member) for member in dispatcher.members],
            **asdict(dispatcher.stats),
            "transfers": dispatcher.handover.transfers,
            "transferred_bytes": dispatcher.handover.bytes,
        }

    def _row(self, ticket: Ticket, limits: Limits) -> dict[str, Any]:
        request = ticket.request
        started = any(attempt.started for attempt in ticket.attempts)
        return {
            "id": request.id,
            "phase": "decode" if request.output else "prompt" if started else "queued",
            "prompt": len(request.prompt),
            "known": request.known,
            "computed": max(0, request.known - 1) if request.output else request.reused,
            "max_length": request.max_length,
            "blocks": limits.blocks_for(request.known) if started else 0,
            "preemptions": request.preemptions,
            "arrival": request.arrival,
            "held": None if ticket.attempts else "its prompt is being computed" if ticket.follows else "no replica can take it now",
            "replicas": [attempt.member.index for attempt in ticket.attempts],
        }


def _replica(member: Member) -> dict[str, Any]:
    """One row of the page's list of replicas."""
    blocks = member.pulse.get("blocks", {})
    return {
        "index": member.index,
        "role": member.role,
        "health": member.health,
        "waiting": member.waiting,
        "running": member.running,
        "queued_tokens": member.queued_tokens,
        "blocks_used": blocks.get("used", 0),
        "slowness": round(member.slowness, 3),
        "deaths": member.deaths,
        "held_bytes": member.held_bytes,
        "features": member.pulse.get("features", {}),
    }


def _sum(first: Any, second: Any) -> Any:
    """Counters added: numbers, lists and dictionaries of them."""
    if isinstance(first, dict):
        return {name: _sum(value, second[name]) if name in second else value for name, value in first.items()}
    if isinstance(first, list):
        return [_sum(a, b) for a, b in zip(first, second, strict=True)]
    return first + second
