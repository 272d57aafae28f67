"""The command as users run it: what the tests of this ring share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

Command = Callable[..., "subprocess.CompletedProcess[str]"]

VERBS = (
    "serve",
    "batch",
    "chat",
    "demo",
    "train",
    "doctor",
    "simulate",
    "plan",
    "cluster",
    "calibrate",
    "perplexity",
    "bfcl",
    "models",
    "data",
    "trace",
    "compare",
    "reproduce",
)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would change the command's behaviour, and with one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ARMILLARY_") or key == "ARMILLARY_HOME"}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more
