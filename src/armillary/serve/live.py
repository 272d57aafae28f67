"""What people who watch an engine see, as plain values: a row for each of its requests, a card for each part that is switched on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from armillary.serve.config import EngineConfig
from armillary.serve.history import EngineStats
from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request
from armillary.serve.schedule import Reason
from armillary.serve.seats import Seats

WAITING_ROWS = 64  # of the queue that are shown


def rows(seats: Seats, held: Callable[[str], Reason | None], behind: Reason = Reason.QUEUE_ORDER) -> list[dict[str, Any]]:
    """Running sequences in the order of admission, those that are returned with their batch, then the head of the queue.

    `held`: why one was last held back; `behind`: why one waits of which no schedule has said anything.
    """
    found = [
        _row(request, "decode" if is_decode(request) else "recompute" if request.preemptions else "prompt", held)
        for request in seats.running
    ]
    found += [_row(request, "returning", held) for request, _, _ in seats.parked]
    for place, request in enumerate(islice(seats.queue(), WAITING_ROWS)):
        row = _row(request, "preempted" if request.preemptions else "queued", held)
        if row["held"] is None and place and not request.computed:
            row["held"] = str(behind)
        found.append(row)
    return found


def features(config: EngineConfig, stats: EngineStats, kept_blocks: int) -> dict[str, dict[str, Any]]:
    """The engine's own parts by name; others register theirs in `Engine.features`.

    A value is a number, a text, None, a list of numbers, or objects of such; names that end in ratio, rate, share or acceptance are 0 to 1.
    """
    found: dict[str, dict[str, Any]] = {}
    if config.prefix_cache == "on":
        found["prefix cache"] = {
            "hit_ratio": stats.reused_tokens / stats.sought_tokens if stats.sought_tokens else None,
            "tokens_sought": stats.sought_tokens,
            "tokens_found": stats.reused_tokens,
            "blocks_kept": kept_blocks,
        }
    if stats.forked_tokens:
        found["forks"] = {"prompt_tokens_shared": stats.forked_tokens}
    if stats.drafted_tokens:
        found["drafts"] = {
            "acceptance": stats.accepted_tokens / stats.drafted_tokens,
            "verified": stats.drafted_tokens,
            "right": stats.accepted_tokens,
        }
    if config.async_scheduling == "on":
        found["asynchronous scheduling"] = {
            "foreseen_share": stats.foreseen_schedules / stats.iterations if stats.iterations else None,
            "schedules": stats.iterations,
        }
    return found


def _row(request: Request, phase: str, held: Callable[[str], Reason | None]) -> dict[str, Any]:
    reason = held(request.id)
    return {
        "id": request.id,
        "phase": phase,
        "prompt": len(request.prompt),
        "known": request.known,
        "computed": request.computed,
        "max_length": request.max_length,
        "blocks": len(request.blocks),
        "preemptions": request.preemptions,
        "arrival": request.arrival,
        "held": None if reason is None else str(reason),
    }
