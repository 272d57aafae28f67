"""Engines in virtual time that somebody watches: a process each, that ends when nobody has looked for a while."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any, Final

from armillary.core.errors import NotFoundError
from armillary.serve.http.exchange import owner
from armillary.web.simulate.processes import Simulator, busy, within

IDLE_SECONDS: Final = 120.0
ANSWER_SECONDS: Final = 60.0
OF_A_KEY: Final = 2  # the older one makes room


class Watch:
    """`ask` may be called from several requests at once: they take turns."""

    def __init__(self, simulator: Simulator, command: str) -> None:
        self.id, self.owner, self.command = f"watch-{secrets.token_hex(8)}", owner(), command
        self._simulator = simulator
        self._turn, self._used, self._over = asyncio.Lock(), asyncio.Event(), asyncio.Event()

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the process answers. Raises APIError when it takes too long, or for what it could not do; the watch is over then."""
        async with self._turn:
            self._used.set()
            try:
                async with within(ANSWER_SECONDS, self.command):
                    return await self._simulator.ask(question)
            except BaseException:
                self.end()
                raise

    def end(self) -> None:
        """It is not wanted any more."""
        self._over.set()
        self._used.set()

    async def guard(self) -> None:
        """Keeps the process for as long as it is looked at."""
        try:
            while not self._over.is_set():
                self._used.clear()
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._used.wait()
        except TimeoutError:
            pass
        finally:
            await self._simulator.close()


class Watches:
    """All of a server: `most` at a time, two a key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._watches: dict[str, tuple[Watch, asyncio.Task[None]]] = {}
        self._beginning: list[str] = []  # whose processes are being started

    async def begin(self, arguments: list[str], command: str) -> Watch:
        """Raises APIError 429 where others watch already, 400 for what cannot be simulated."""
        key = owner()
        mine = [watch for watch, _ in self._watches.values() if watch.owner == key]
        for watch in mine[: max(0, len(mine) + 1 - OF_A_KEY)]:
            with contextlib.suppress(NotFoundError):  # another request has ended it meanwhile
                await self.end(watch.id)
        if self._beginning.count(key) >= OF_A_KEY:
            raise busy("simulations of yours are being started: wait until they can be watched")
        taken = len(self._watches) + len(self._beginning)
        if taken >= self._most:
            raise busy(f"{taken} simulations are watched on this server, its bound: try again later")
        self._beginning.append(key)
        try:
            simulator = await Simulator.start(arguments)
            try:
                async with within(ANSWER_SECONDS, command):
                    await simulator.heard()  # that it is ready
            except BaseException:
                await simulator.close()
                raise
            watch = Watch(simulator, command)
        finally:
            self._beginning.remove(key)
        task = asyncio.create_task(watch.guard())
        self._watches[watch.id] = (watch, task)
        task.add_done_callback(lambda _: self._watches.pop(watch.id, None))
        return watch

    def get(self, watch_id: str) -> Watch:
        """Raises NotFoundError for one that is over, or another key's."""
        found = self._watches.get(watch_id)
        if found is None or found[0].owner != owner():
            raise NotFoundError(
                f"no simulation {watch_id[:100]!r} is watched", f"begin again: one that nobody has looked at for {IDLE_SECONDS:g} s ends"
            )
        return found[0]

    async def end(self, watch_id: str) -> None:
        """Raises NotFoundError likewise."""
        watch = self.get(watch_id)
        _, task = self._watches[watch_id]
        watch.end()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
