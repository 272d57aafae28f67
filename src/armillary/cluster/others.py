"""How much of the machine other processes take while this one measures."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Others:
    """Counts from when it is made. Children count as ours once they have ended and been waited for."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._stat = root / "proc/stat"
        self._start = (time.monotonic(), self._busy(), _own())

    def share(self, cores: int) -> float | None:
        """Share of the machine's `cores` cores' time since then that was neither ours nor idle; None where the system does not say."""
        began, busy, own = self._start
        now = self._busy()
        if busy is None or now is None:
            return None
        elapsed = max(1e-9, time.monotonic() - began)
        return max(0.0, (now - busy - (_own() - own)) / (elapsed * cores))

    def _busy(self) -> float | None:
        """Seconds that all cores were at work since the machine started: user, nice, system, interrupts; not what a hypervisor took."""
        try:
            words = self._stat.read_text(encoding="ascii").split("\n", 1)[0].split()
            return sum(int(words[index]) for index in (1, 2, 3, 6, 7)) / _TICKS
        except (OSError, ValueError, IndexError):
            return None


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
