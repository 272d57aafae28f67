"""`armillary simulate` in processes beside the server: as many as it allows, niced, within a time and a memory, gone with who asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import IO, Any, Final

from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import owner

log = logging.getLogger("armillary.simulate")

SECONDS: Final = 120.0
MEMORY: Final = 6 << 30
"""Bytes of address space of a simulation, where the system can hold it to that (Linux)."""
LINE_BYTES: Final = 64 << 20
_NICE: Final = 10


class Slots:
    """Which keys simulate now: one simulation each, `most` in all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: set[str] = set()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Raises APIError 403 where simulations are off, 429 where there is no room."""
        self.check_allowed()
        key = owner()
        if key in self._taken:
            raise busy("a simulation of yours is running: wait for its end, or close its connection")
        if len(self._taken) >= self.most:
            raise busy(f"{len(self._taken)} simulations are running, this server's bound: try again soon, or serve with more --simulations")
        self._taken.add(key)
        try:
            yield
        finally:
            self._taken.discard(key)

    def check_allowed(self) -> None:
        """Raises APIError 403 where simulations are off."""
        if not self.most:
            raise APIError(
                403, "this server simulates nothing: serve with --simulations 2", type="permission_error", code="simulations_not_allowed"
            )


def busy(message: str) -> APIError:
    """Too many at once."""
    return APIError(429, message, type="rate_limit_error", code="simulation_running", headers={"Retry-After": "2"})


class Simulator:
    """One such process."""

    def __init__(self, process: asyncio.subprocess.Process, told: IO[bytes]) -> None:
        self._process, self._told = process, told
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self.stdout = process.stdin, process.stdout

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> Simulator:
        """`armillary simulate ARGUMENTS`, with this server's own settings and keys kept out of its environment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARMILLARY_") or name == "ARMILLARY_HOME"}
        told = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "armillary", "simulate", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=told, env=kept | {"ARMILLARY_ERRORS": "json", "OMP_NUM_THREADS": "1"}, limit=LINE_BYTES,
        )  # fmt: skip
        _hold(process.pid)
        return cls(process, told)

    async def __aenter__(self) -> Simulator:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End it, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._told.close()

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, line by line, to its end. Raises APIError for what it could not do."""
        while line := await self.stdout.readline():
            yield json.loads(line)
        await self.ended()

    async def output(self) -> bytes:
        """All that it says. Raises APIError for what it could not do."""
        said = await self.stdout.read()
        await self.ended()
        return said

    async def ended(self) -> None:
        """Wait for its end. Raises APIError for what it could not do."""
        status = await self._process.wait()
        if status:
            self._told.seek(0)
            raise _failure(status, self._told.read().decode(errors="replace"))

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line for one line."""
        with contextlib.suppress(ConnectionError):
            self.stdin.write(json.dumps(question).encode() + b"\n")
            await self.stdin.drain()
        return await self.heard()

    async def heard(self) -> dict[str, Any]:
        """The next line. Raises APIError when there is none."""
        if line := await self.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        await self.ended()
        raise APIError(500, "the simulation ended without an answer", type="server_error", code="server_error")


@contextlib.asynccontextmanager
async def within(seconds: float, command: str, until: float | None = None) -> AsyncIterator[None]:
    """A bound on the time, counted from here or, where it was begun before, to `until` of the loop's clock. Raises APIError naming what does
    the same without it."""
    try:
        async with asyncio.timeout(seconds) if until is None else asyncio.timeout_at(until):
            yield
    except TimeoutError:
        message = f"the simulation took over {seconds:g} s, this server's bound: ask for less, or run it in a terminal: {command}"
        raise APIError(400, message, code="simulation_too_long") from None


def _failure(status: int, told: str) -> APIError:
    """What a process that failed said last."""
    last = told.strip().rpartition("\n")[2]
    try:
        said = json.loads(last)
        message = f"{said['problem']}: {said['fix']}" if said["fix"] else said["problem"]
        return APIError(400, message, param=said["field"], code="invalid_value")
    except (ValueError, KeyError, TypeError):
        log.error("a simulation ended with status %d: %s", status, told[-2000:])
        return APIError(500, "the simulation failed: the server's log has the details", type="server_error", code="server_error")


def _hold(pid: int) -> None:
    """Let everything else go first, and bound its memory."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        resource.prlimit(pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
