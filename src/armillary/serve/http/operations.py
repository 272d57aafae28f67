"""How a server is run, as one value for the application: what may wait, what is logged and observed, whether it is leaving."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from armillary.core.trace import Trace
from armillary.serve.http.access_log import AccessLog
from armillary.serve.http.drain import Drain
from armillary.serve.http.file_store import FileStore
from armillary.serve.streams import Observer


@dataclass(frozen=True, slots=True)
class Operations:
    """`max_queued_kv`: KV pools' worth that may wait; `shed_after`: seconds that a request may be expected to, None for any.

    `adapter_directory`: where adapters may be loaded from over HTTP; without it nowhere. `debug_trace` is what `/debug/trace` shows; without it that path refuses.
    """

    max_queued_kv: float = 64.0
    shed_after: float | None = None
    access_log: AccessLog | None = None
    drain: Drain = field(default_factory=Drain)
    debug_trace: Trace | None = None
    adapter_directory: Path | None = None
    observers: tuple[Observer, ...] = ()
    files: FileStore | None = None  # None: in memory, within its default bound
