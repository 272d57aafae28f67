"""Whether the machine is quiet: timings taken beside other work mean nothing."""

from __future__ import annotations

import os
import sys

QUIET = 0.5  # load average of the last minute


def quiet(*, force: bool = False) -> bool:
    """Says on stderr why nothing is measured when the machine is not quiet; with `force` it always is."""
    load = os.getloadavg()[0]
    if force or load <= QUIET:
        return True
    print(f"not measured: the load average is {load:.2f}; wait for a quiet machine, or --force", file=sys.stderr)
    return False
