"""What users felt: time to first token, time between tokens, throughput; from the requests that were served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from armillary.core.trace_summary import percentile
from armillary.core.units import S
from armillary.serve.request import Event, FinishReason, Request


class TokenTimes:
    """A request's listener that keeps when each token came, and the text."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.text: list[str] = []

    def __call__(self, event: Event) -> None:
        if event.token is not None:
            self.times.append(event.at)
        self.text.append(event.text)


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request as its user saw it; instants in ns of the engine's clock, counted from arrival and not from admission."""

    id: str
    prompt_tokens: int
    arrival: int
    first_scheduled: int | None
    token_times: tuple[int, ...]
    preemptions: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, token_times: Sequence[int]) -> RequestTiming:
        """The timing of a request that was submitted; `token_times` are its tokens' instants."""
        assert request.arrival is not None  # the engine stamps it at submit
        return cls(
            request.id,
            len(request.prompt),
            request.arrival,
            request.first_scheduled,
            tuple(token_times),
            request.preemptions,
            request.finish_reason,
        )

    @property
    def time_to_first_token(self) -> int | None:
        """ns from arrival to the first token; None when none came."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def gaps(self) -> tuple[int, ...]:
        """ns between each token and the next."""
        return tuple(later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Latencies:
    """A set of requests in numbers; durations in ns, sorted."""

    requests: int
    first_tokens: tuple[int, ...]
    gaps: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    duration: int  # from the first arrival to the last token
    preemptions: int

    @classmethod
    def of(cls, timings: Sequence[RequestTiming]) -> Latencies:
        ended = [timing for timing in timings if timing.token_times]
        duration = max(t.token_times[-1] for t in ended) - min(t.arrival for t in timings) if ended else 0
        return cls(
            len(timings),
            tuple(sorted(t.token_times[0] - t.arrival for t in ended)),
            tuple(sorted(gap for t in ended for gap in t.gaps)),
            sum(t.prompt_tokens for t in timings),
            sum(len(t.token_times) for t in timings),
            duration,
            sum(t.preemptions for t in timings),
        )

    @property
    def throughput(self) -> float:
        """Generated tokens a second over the whole set."""
        return self.output_tokens * S / self.duration if self.duration else 0.0

    def first_token(self, percent: int) -> int | None:
        """Nearest-rank percentile of the time to first token (ns): a value that occurred."""
        return percentile(self.first_tokens, percent) if self.first_tokens else None

    def gap(self, percent: int) -> int | None:
        """Nearest-rank percentile of the time between tokens (ns)."""
        return percentile(self.gaps, percent) if self.gaps else None
