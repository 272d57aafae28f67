"""Ranks that find each other, and failures that name the rank and the operation: never a hang.

`torchrun` starts the processes and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `joined` is everything from
there on. `spawn` starts ranks on this machine without torchrun, for tests and tables.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch._C import _distributed_c10d

from armillary.core.errors import ArmillaryError, InputError

JOIN_SECONDS = 300.0
COLLECTIVE_SECONDS = 120.0
BEAT_SECONDS = 0.5  # how often a rank says that it lives
_c10d: Any = _distributed_c10d  # has no type stubs for what is private
_LOST = (
    "timed out",
    "connection closed",
    "connection reset",
    "broken pipe",
    "socket",
    "read error",
    "write error",
    "remote process",
    "peer",
)


class PeerError(ArmillaryError):
    """A rank is missing, dead, or does something else than the others."""


@contextlib.contextmanager
def joined(timeout: float = COLLECTIVE_SECONDS, join_timeout: float = JOIN_SECONDS) -> Iterator[int]:
    """Within, this process is a rank of the default process group; yields the rank. Seconds.

    A collective that a peer does not join within `timeout`, or in which a peer dies, raises PeerError with this rank,
    the operation and the ranks that are gone. So do peers that are not there within `join_timeout`.
    """
    rank, world, address = _environment()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")  # the flight recorder: the last collectives, by name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback()) if address.startswith(("127.", "localhost")) else None
    try:
        with _signals_end_the_process():
            dist.init_process_group(_backend(), timeout=timedelta(seconds=join_timeout))
    except (dist.DistError, RuntimeError) as error:
        fix = f"start all {world} ranks with the same MASTER_ADDR and MASTER_PORT, rank 0 among them"
        raise PeerError(
            f"rank {rank} of {world}: not every rank came to {address} within {join_timeout:g} s ({_first_line(error)})", fix
        ) from error
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), dist.group.WORLD)
    with _Heart(rank, world) as heart, named_failures(rank, heart):
        yield rank
    dist.destroy_process_group()


@contextlib.contextmanager
def _signals_end_the_process() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM end the process at once: torch waits for the peers without looking at Python's handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number, handler in before.items():
        if callable(handler):  # not one that was switched off
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def launched() -> Iterator[int]:
    """`joined` where a launcher started this process as one of several ranks; otherwise nothing, and rank 0."""
    if _integer("WORLD_SIZE", "1") == 1:
        yield 0
        return
    with joined() as rank:
        yield rank


class _Heart(contextlib.AbstractContextManager["_Heart"]):
    """Counts up in the group's store twice a second, so that the others can tell a dead rank from a slow one."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._stop = threading.Event()
        # Connections of their own, made while rank 0 lives: one to beat, one to look, beside the one that a rank may block in.
        self._store, self._watch = _own_connection(), _own_connection()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Heart:
        self._store.add(f"beat/{self.rank}", 1)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):  # the store has gone: its owner, rank 0, is dead
            while not self._stop.wait(BEAT_SECONDS):
                self._store.add(f"beat/{self.rank}", 1)

    def silent(self) -> list[int]:
        """Ranks whose heart stands still. Takes three beats."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        try:
            before = [self._watch.add(f"beat/{rank}", 0) for rank in others]
            time.sleep(3 * BEAT_SECONDS)
            return [rank for rank, count in zip(others, before, strict=True) if self._watch.add(f"beat/{rank}", 0) == count]
        except (dist.DistError, RuntimeError):
            return [0]  # the store lives in rank 0


@contextlib.contextmanager
def named_failures(rank: int, heart: _Heart) -> Iterator[None]:
    """Turns a backend's error about a lost or late peer into a PeerError with the rank, the operation and who is gone."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        message = str(error).lower()
        if isinstance(error, ArmillaryError) or not any(sign in message for sign in _LOST):
            raise
        dead = heart.silent()
        operation = last_collective()
        if dead:
            who = f"rank {dead[0]} is" if len(dead) == 1 else f"ranks {', '.join(map(str, dead))} are"
            problem, fix = f"{who} gone", "look at its log; start again from the last checkpoint"
        else:
            problem = "all ranks live, but not all take part"
            fix = "compare what the ranks were doing: batches or steps that differ, or one rank far slower than the timeout"
        raise PeerError(f"rank {rank}: {operation} failed: {problem} ({_first_line(error)})", fix) from error


def last_collective() -> str:
    """What the flight recorder saw last on this rank: `all_reduce of [3, 128] Float (number 17)`."""
    entries = json.loads(_c10d._dump_fr_trace_json()).get("entries", [])
    if not entries:
        return "a collective"
    pending = [entry for entry in entries if not entry["retired"]]
    entry = (pending or entries[-1:])[0]
    name = entry["profiling_name"].split(":")[-1]
    return f"{name} of {entry['input_sizes'][0]} {entry['input_dtypes'][0]} (number {entry['collective_seq_id']})"


def spawn(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60.0, join_timeout: float = 60.0) -> list[Any]:
    """`work(rank, *arguments)` in `world` processes on this machine, joined over gloo. Returns what each returned, in rank order.

    `work` and its arguments are importable and picklable. The first failure ends the others and is raised as a
    RuntimeError with the rank's traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    started: Any = multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _spawned, (world, port, timeout, join_timeout, results, work, arguments), nprocs=world, join=False
    )
    gathered: dict[int, Any] = {}
    ended = False
    while not ended:
        ended = started.join(timeout=0.2)
        while not results.empty():
            rank, value = results.get()
            gathered[rank] = torch.load(io.BytesIO(value), weights_only=False)  # our own children's
    return [gathered[rank] for rank in range(world)]


def _spawned(rank: int, world: int, port: int, timeout: float, join_timeout: float, results: Any, work: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(timeout, join_timeout):
        result = io.BytesIO()  # as bytes: a tensor would be shared memory that ends with this process
        torch.save(work(rank, *arguments), result)
        results.put((rank, result.getvalue()))
        dist.barrier()  # no rank leaves while another still needs it


def _own_connection() -> Any:
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def _environment() -> tuple[int, int, str]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(f"{', '.join(missing)} not set: this process does not know its peers", "start with torchrun --nproc-per-node N")
    return _integer("RANK"), _integer("WORLD_SIZE"), f"{os.environ['MASTER_ADDR']}:{_integer('MASTER_PORT')}"


def _integer(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{name} is {text!r} in the environment, no number", "unset it, or start with torchrun --nproc-per-node N")
    return int(text)


def _backend() -> str:
    # Collectives of CPU tensors (counts, checkpoints) need gloo even where the model lives on GPUs.
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
