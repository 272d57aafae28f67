"""What people who watch an engine see of its requests: one row each, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request
from armillary.serve.schedule import Reason


def rows(
    running: Sequence[Request],
    returning: Iterable[Request],
    waiting: Iterable[Request],
    held: Callable[[str], Reason | None],
    behind: Reason = Reason.QUEUE_ORDER,
) -> list[dict[str, Any]]:
    """Running sequences in the order of admission, those that are returned with their batch, then the queue.

    `held`: why one was last held back; `behind`: why one waits of which no schedule has said anything.
    """
    found = [
        _row(request, "decode" if is_decode(request) else "recompute" if request.preemptions else "prompt", held) for request in running
    ]
    found += [_row(request, "returning", held) for request in returning]
    for place, request in enumerate(waiting):
        row = _row(request, "preempted" if request.preemptions else "queued", held)
        if row["held"] is None and place and not request.computed:
            row["held"] = str(behind)
        found.append(row)
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
