"""A request that would be taken at another moment: why not now, and when to come back."""

from __future__ import annotations

import math
from typing import Literal

from armillary.core.errors import CapacityError


class Refused(CapacityError):
    """Refused at the door, before it takes memory or a place in the queue (HTTP 429).

    `retry_after` is in whole seconds, as the header says it; `code` says whose bound it was: the server's (overloaded) or the key's (rate_limit_exceeded).
    """

    def __init__(self, problem: str, fix: str, *, code: Literal["overloaded", "rate_limit_exceeded"], retry_after: float) -> None:
        super().__init__(problem, fix)
        self.code = code
        self.retry_after = max(1, math.ceil(retry_after))
