"""An application on a port: bound before it starts, stopped without dropping answers in flight."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from armillary.core.errors import ArmillaryError, InputError
from armillary.serve.http.connections import timed_protocol
from armillary.serve.http.drain import Drain

BACKLOG = 2048
LAST_WORDS_SECONDS = 5  # for answers that were ended to say so, after the grace


class Server:
    """`run()` serves until Ctrl-C or SIGTERM; `start()` and `stop()` (or `with`) serve from a background thread.

    SIGTERM drains: `drain.draining` is set, which the application refuses new work by, and the server goes on until the answers
    in flight are finished, at most `drain_seconds`; a second signal ends that. Then, and on Ctrl-C at once, it stops.

    `port` 0 takes a free one; `url` says which. The port is bound here, so a taken one is an `InputError` before
    anything else happens. On stopping, answers in flight get `grace_seconds` to finish; then `end_answers` is called,
    which should make them end in an orderly way, and what still runs a little later is cut.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        grace_seconds: int = 5,
        end_answers: Callable[[], object] | None = None,
        drain: Drain | None = None,
        drain_seconds: float = 0.0,
        on_drain: Callable[[int], object] | None = None,
        log_level: str = "warning",
    ) -> None:
        self._socket = _bind(host, port)
        bound_host, self.port = self._socket.getsockname()[:2]
        self.host = bound_host
        _raise_file_limit()
        config = uvicorn.Config(
            app,
            http=timed_protocol(),
            log_level=log_level,
            access_log=False,
            server_header=False,
            date_header=True,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=grace_seconds + (LAST_WORDS_SECONDS if end_answers else 0),
            backlog=BACKLOG,
        )
        self._server = _Graceful(config, grace_seconds, end_answers, drain or Drain(), drain_seconds, on_drain)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def run(self) -> None:
        """Serve on this thread until SIGINT (raises KeyboardInterrupt) or SIGTERM."""
        try:
            self._server.run(sockets=[self._socket])
            # uvicorn raises the signal once more on leaving, but the event loop may be over before it is handled: then it would be lost.
            if self._server.interrupted:
                raise KeyboardInterrupt
        finally:
            self._socket.close()

    def start(self) -> Server:
        """Serve on a background thread; returns when connections are accepted."""
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="armillary-http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ArmillaryError("the HTTP server did not start", "see its log")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop the background thread; safe to call twice."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._socket.close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


class _Graceful(uvicorn.Server):
    """uvicorn stops listening at once and cuts what outlives the grace in mid-sentence, a traceback each; this one drains, and ends it."""

    def __init__(
        self,
        config: uvicorn.Config,
        grace_seconds: float,
        end_answers: Callable[[], object] | None,
        drain: Drain,
        drain_seconds: float,
        on_drain: Callable[[int], object] | None,
    ) -> None:
        super().__init__(config)
        self._grace_seconds = grace_seconds
        self._end_answers = end_answers
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._on_drain = on_drain
        self._drained_by: float | None = None
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if sig == signal.SIGTERM and self._drain_seconds > 0 and not self._drain.draining:
            self._drain.draining = True
            self._captured_signals.append(sig)  # raised once more when the server has stopped
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._drain.draining and not self.should_exit:
            if self._drained_by is None:
                self._drained_by = time.monotonic() + self._drain_seconds
                if self._on_drain is not None:
                    self._on_drain(self._drain.in_flight)
            if not self._drain.in_flight:
                self.should_exit = True
            elif time.monotonic() >= self._drained_by:
                self.should_exit, self._grace_seconds = True, 0.0  # they have had their time
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self._grace_seconds)
        if self._end_answers is not None:
            await asyncio.to_thread(self._end_answers)


def check_address(host: str, port: int) -> None:
    """Raise InputError when nothing can listen there now: worth knowing before a model is loaded."""
    _bind(host, port).close()


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is outside 0..65535", "give a port, or 0 for a free one", field="port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(BACKLOG)  # whoever is told the URL may connect at once, and no one else can bind beside us
        except OSError:
            bound.close()
            raise
    except socket.gaierror as error:
        raise InputError(f"{host} is no address of this machine: {error.strerror}", "choose another --host", field="host") from error
    except OSError as error:
        fix = (
            "choose a --host that this machine has" if error.errno == errno.EADDRNOTAVAIL else "stop what uses it, or choose another --port"
        )
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}", fix, field="port") from error
    return bound


def _raise_file_limit() -> None:
    """Each connection is a file: allow as many as the system lets this user have."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
