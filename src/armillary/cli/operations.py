"""From the server's options to how it is run: keys, limits, logs, spans, and stories on the console."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.core.trace import Trace
    from armillary.serve.http.operations import Operations
    from armillary.serve.operations.keys import KeyRing
    from armillary.serve.request import Event, Request
    from armillary.serve.service import Service
    from armillary.serve.streams import Observer


def key_ring(server: Any) -> KeyRing | None:
    """The keys that clients need; None when they need none. Raises InputError, NotFoundError or FormatError."""
    from armillary.serve.operations.keys import KeyRing

    return KeyRing.of(server.key_list, server.keys) if server.guarded else None


def operations(server: Any, trace: Trace | None) -> Operations:
    """All that needs no model, so that what is wrong with it is told before one is loaded. Raises InputError or MissingDependencyError."""
    from armillary.serve.http.access_log import AccessLog
    from armillary.serve.http.file_store import FileStore
    from armillary.serve.http.operations import Operations

    if server.otel is not None:
        from armillary.serve.operations.otel import check_installed

        check_installed()
    files = FileStore(server.files_limit, server.files)
    files.claim()
    return Operations(
        max_queued_kv=server.max_queued_kv,
        shed_after=server.shed_after,
        access_log=AccessLog.open(server.access_log) if server.access_log is not None else None,
        debug_trace=trace if server.allow_debug else None,
        files=files,
        adapter_directory=server.allow_lora_loading,
    )


def observers(server: Any, service: Service) -> tuple[Observer, ...]:
    """Who is told of every request beside the API itself."""
    found: list[Observer] = []
    if server.otel is not None:
        from armillary.serve.operations.otel import RequestSpans, exporting_to

        found.append(RequestSpans(exporting_to(server.otel), service.model_name, service.engine.clock))
    if server.explain:
        found.append(Stories(service))
    return tuple(found)


class Stories:
    """Tells on stderr of every request that ends why it took as long as it did; on a thread, for replicas are asked about it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ended: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._tell, name="armillary-stories", daemon=True).start()

    def submitted(self, request: Request) -> None: ...

    def event(self, request: Request, event: Event) -> None:
        if event.finish_reason is not None:
            self._ended.put(request.id)

    def _tell(self) -> None:
        from armillary.cli.terminal import note

        while True:
            request_id = self._ended.get()
            note(f"{request_id}: {(self._service.engine.explain(request_id) or ['its story is lost'])[-1]}")
