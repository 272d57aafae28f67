"""Whether there is room for more work: a rule over the queue's length, the KV cache that it wants and the wait that is to be expected."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.serve.operations.refusal import Refused

LONGEST_RETRY_SECONDS = 60.0  # a forecast is worth no more


@dataclass(frozen=True, slots=True)
class Load:
    """What is in flight. `completions_per_second` counts busy time only; None before anything has ended."""

    waiting: int  # requests
    waiting_blocks: int  # KV blocks that they may come to need
    completions_per_second: float | None = None

    @property
    def expected_wait(self) -> float:
        """Seconds until a request that comes now is begun: those before it over the rate at which requests end (Little's law).

        0 where nobody waits, or where nothing has been measured.
        """
        return self.waiting / self.completions_per_second if self.waiting and self.completions_per_second else 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait. `pools`: KV pools' worth, which also bounds the memory of the prompts; `wait`: seconds, None for any."""

    queue: int
    blocks: int  # KV blocks of the whole pool
    pools: float = 64.0
    wait: float | None = None


def refusal(load: Load, requests: int, blocks: int, bounds: Bounds) -> Refused | None:
    """Why `requests` more, which may come to need `blocks` KV blocks, are not taken now; None when they are.

    A single request that finds nobody waiting is always taken: what it alone asks for, admission has judged.
    """
    if load.waiting + requests > bounds.queue:
        return _refused(
            f"{load.waiting:,} requests wait and {requests:,} more would pass the bound of {bounds.queue:,}", "--max-queue", load, requests
        )
    most = int(bounds.pools * bounds.blocks)
    if load.waiting and load.waiting_blocks + blocks > most:
        return _refused(
            f"the {load.waiting:,} waiting requests may need {load.waiting_blocks:,} KV blocks and this one {blocks:,} more; "
            f"the bound is {most:,}, {bounds.pools:g} times the pool",
            "--max-queued-kv",
            load,
            max(1, load.waiting // 8),
        )
    if bounds.wait is not None and load.expected_wait > bounds.wait:
        return _refused(
            f"{load.waiting:,} requests wait and {load.completions_per_second:.3g} end a second, so the wait would be "
            f"{load.expected_wait:.1f} s; the bound is {bounds.wait:g} s",
            "--shed-after",
            load,
            load.waiting - int(bounds.wait * (load.completions_per_second or 0.0)),
        )
    return None


def _refused(problem: str, option: str, load: Load, surplus: int) -> Refused:
    """`surplus`: how many have to go before there is room."""
    rate = load.completions_per_second
    return Refused(
        f"the server is overloaded: {problem}",
        f"retry later, or serve with a larger {option}",
        code="overloaded",
        retry_after=min(LONGEST_RETRY_SECONDS, surplus / rate) if rate else 1.0,
    )
