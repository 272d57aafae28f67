"""The fields that say when a request wants its turn, where the queue's order looks at them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from armillary.core.units import MS
from armillary.serve.http.body import Body

MAX_PRIORITY = 2**31 - 1
MAX_TTFT_MS = 86_400_000  # a day


class TurnBody(Body):
    """`priority` is vLLM's: the lower goes first. `ttft_ms`: within how many milliseconds of its arrival the first token is wanted."""

    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    ttft_ms: float | None = Field(None, gt=0, le=MAX_TTFT_MS)

    def turn(self, arrival: int) -> dict[str, Any]:
        """As `Service.start` takes them; `arrival` in ns of the engine's clock."""
        return {"priority": self.priority, "deadline": None if self.ttft_ms is None else arrival + round(self.ttft_ms * MS)}
