"""So much a minute: a bucket that fills at a steady rate and is drawn from as things happen."""

from __future__ import annotations

from armillary.core.units import S

MINUTE = 60 * S


class TokenBucket:
    """Holds at most a minute's worth. Over any span of t ns no more than `per_minute` * (1 + t / minute) is taken.

    Times are ns of one clock and never go back. `charge` may leave a debt, for what is known only afterwards; it is paid before
    anything else is taken.
    """

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: int) -> float:
        """What is left; below 0 is a debt."""
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float, now: int) -> int:
        """Take `amount` if it is there: 0, or the ns until it will be (nothing is taken then)."""
        missing = amount - self.level(now)
        if missing > 1e-9:
            return max(1, self._time(missing))
        self._level -= amount
        return 0

    def charge(self, amount: float, now: int) -> None:
        """Take `amount` whether it is there or not."""
        self._level = self.level(now) - amount

    def full_in(self, now: int) -> int:
        """ns until nothing is missing."""
        return self._time(self.per_minute - self.level(now))

    def _time(self, amount: float) -> int:
        return int(amount * MINUTE / self.per_minute) + 1 if amount > 0 else 0
