"""What links of this machine really do: messages between two processes, over TCP on the loopback interface and through shared memory.

One way is half of a round trip, whose copies into and out of the shared memory count.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Final

import numpy as np

from armillary.cluster.profile import LinkRate, Transfer
from armillary.core.errors import ArmillaryError

SIZES: Final = (8, 4096, 65_536, 1 << 20, 16 << 20)
PATIENCE: Final = 60.0  # seconds that either side waits for the other
_LINE: Final = 64  # bytes between the two counters, so that they lie in cache lines of their own
_SPINS: Final = 200  # looks at a counter before giving up the core: with as few cores as processes, spinning keeps the peer from running


def measure_links(seconds: float = 0.4, sizes: Sequence[int] = SIZES) -> tuple[LinkRate, ...]:
    """Both links at every size, `seconds` each size at most (at least three round trips). Raises ArmillaryError if the peer is lost."""
    return (_loopback(seconds, sizes), _shared_memory(seconds, sizes))


def _loopback(seconds: float, sizes: Sequence[int]) -> LinkRate:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        with _peer("tcp", str(server.getsockname()[1])):
            try:
                connection, _ = server.accept()
            except TimeoutError as error:
                raise ArmillaryError("the peer that measures the loopback did not start", "is 127.0.0.1 reachable?") from error
            with connection:
                _prepare(connection)
                transfers = []
                for size in sizes:
                    room = bytearray(size)
                    connection.sendall(size.to_bytes(8, "little"))

                    def round_trip(message: bytes = b"\1" + bytes(size), room: bytearray = room) -> None:
                        connection.sendall(message)
                        _receive(connection, room)

                    transfers.append(Transfer(size=size, seconds=_shortest(round_trip, seconds) / 2))
                    connection.sendall(b"\0")
                connection.sendall((0).to_bytes(8, "little"))
    return LinkRate(name="loopback", transfers=tuple(transfers))


def _shared_memory(seconds: float, sizes: Sequence[int]) -> LinkRate:
    memory = SharedMemory(create=True, size=2 * _LINE + max(sizes))
    slab = _Slab(memory)
    try:
        slab.counters[:] = 0
        with _peer("shm", memory.name):
            transfers = []
            for size in sizes:
                message, room = np.ones(size, np.uint8), np.zeros(size, np.uint8)
                best = _shortest(partial(slab.ask, message, room), seconds)
                transfers.append(Transfer(size=size, seconds=best / 2))
            slab.counters[0] = -1
    finally:
        slab.release()
        memory.close()
        memory.unlink()
    return LinkRate(name="shared-memory", transfers=tuple(transfers))


def peer(kind: str, where: str) -> None:
    """The other process: give back every message until told to stop."""
    if kind == "tcp":
        _echo(int(where))
        return
    memory = SharedMemory(name=where)
    with suppress(Exception):  # the parent unlinks it; Python's tracker would warn of that at this process's end
        resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    slab = _Slab(memory)
    try:
        slab.serve()
    finally:
        slab.release()
        memory.close()


def _echo(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        _prepare(connection)
        head = bytearray(8)
        while size := int.from_bytes(_receive(connection, head), "little"):
            room = bytearray(size)
            while _receive(connection, bytearray(1)) == b"\1":
                _receive(connection, room)
                connection.sendall(room)


class _Slab:
    """Two counters (ours first, with the message's size beside it; the peer's on the next cache line), then the bytes of the message."""

    def __init__(self, memory: SharedMemory) -> None:
        self.counters = np.ndarray(2 * _LINE // 8, np.int64, memory.buf)
        self.payload = np.ndarray(memory.size - 2 * _LINE, np.uint8, memory.buf, 2 * _LINE)
        self.turn = 0

    def ask(self, message: np.ndarray, room: np.ndarray) -> None:
        """Copy a message in, wait until the peer has had it, copy it out."""
        self.payload[: len(message)] = message
        self.turn += 1
        self.counters[1] = len(message)
        self.counters[0] = self.turn
        self._await(_LINE // 8, self.turn)
        room[:] = self.payload[: len(room)]

    def serve(self) -> None:
        """Copy every message out and in again, until the other side's counter is negative."""
        own = np.zeros(len(self.payload), np.uint8)
        while self._await(0, self.turn + 1) > 0:
            self.turn += 1
            size = int(self.counters[1])
            own[:size] = self.payload[:size]
            self.payload[:size] = own[:size]
            self.counters[_LINE // 8] = self.turn

    def release(self) -> None:
        """Give up the views of the memory, which cannot be closed before."""
        del self.counters, self.payload

    def _await(self, index: int, value: int) -> int:
        """Wait until a counter has reached `value`, or is negative; returns it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for _ in range(_SPINS):
                seen = int(self.counters[index])
                if seen >= value or seen < 0:
                    return seen
            if time.monotonic() > deadline:
                raise ArmillaryError("the other process of the shared memory did not answer", "run it again on a machine with less to do")
            if hasattr(os, "sched_yield"):
                os.sched_yield()


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _receive(connection: socket.socket, room: bytearray) -> bytearray:
    view = memoryview(room)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ArmillaryError("the other process of the loopback is gone", "run it again")
        view = view[count:]
    return room


def _shortest(run: Callable[[], None], seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, at least three after one that warms up; in seconds."""
    run()
    best, runs, deadline = float("inf"), 0, time.perf_counter() + seconds
    while runs < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


@contextmanager
def _peer(kind: str, where: str) -> Iterator[None]:
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from armillary.cluster.link_rates import peer; peer({kind!r}, {where!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL)
    try:
        yield
        process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
