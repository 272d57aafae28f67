"""The process of one replica: `python -m armillary.serve.fleet.worker FD` serves whoever holds the other end of the socket."""

from __future__ import annotations

import importlib
import os
import queue
import signal
import socket
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from armillary.serve.fleet.channel import Channel
from armillary.serve.fleet.host import ReplicaHost
from armillary.serve.fleet.messages import Message, pack_error

if TYPE_CHECKING:
    from armillary.serve.engine import Engine
    from armillary.serve.fleet.kv_files import KVFiles
    from armillary.serve.fleet.kv_network import KVNetwork

FROM_MODEL = "armillary.serve.fleet.worker:from_model"


def from_model(model: str, engine: dict[str, Any]) -> tuple[Engine, str]:
    """The engine of a model by name or path, and what computes, in words."""
    from armillary.core.units import format_bytes
    from armillary.models.load import load
    from armillary.serve.config import EngineConfig
    from armillary.serve.llm import build_engine

    built = build_engine(load(model), EngineConfig.model_validate(engine))
    forward = built.executor.forward  # type: ignore[attr-defined]
    return built, f"{forward.name}, weights {format_bytes(forward.weight_bytes)} in memory"


def serve(connection: socket.socket) -> None:
    """Build the engine that the first message names, and serve until the other end is closed."""
    channel = Channel(connection)
    (first, *_) = channel.receive()
    module, _, function = str(first["build"]).partition(":")
    try:
        engine, words = getattr(importlib.import_module(module), function)(**first["arguments"])
    except Exception as error:
        channel.send({"op": "failed", "error": pack_error(error)})
        return
    outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    files = _files(engine, str(first["role"]), str(first["transfer"]), connection)
    host = ReplicaHost(engine, outgoing.put, files)
    engine.start()
    outgoing.put(
        {"op": "ready", "pid": os.getpid(), "limits": asdict(engine.limits), "words": words, "address": files.address if files else ""}
    )
    over = threading.Event()
    threads = [
        threading.Thread(target=_send, args=(channel, outgoing), name="replica-send", daemon=True),
        threading.Thread(target=_pulse, args=(host, outgoing, float(first["pulse"]), over), name="replica-pulse", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            for message in channel.receive():
                host.heard(message)
    except (EOFError, OSError):
        over.set()
        outgoing.put(None)
        engine.stop()


def _files(engine: Engine, role: str, transfer: str, connection: socket.socket) -> KVFiles | KVNetwork | None:
    """The way in and out of the pool of a prefill or decode worker. Others find it where the router does."""
    forward = getattr(engine.executor, "forward", None)
    if forward is None or role == "both":
        return None
    if transfer == "memory":
        from armillary.serve.fleet.kv_files import KVFiles

        return KVFiles(forward, engine.limits.block_size)
    from armillary.serve.fleet.kv_network import KVNetwork

    here = "127.0.0.1" if connection.family == socket.AF_UNIX else str(connection.getsockname()[0])
    return KVNetwork(forward, engine.limits.block_size, here if role == "prefill" else None)


def _send(channel: Channel, outgoing: queue.SimpleQueue[Message | None]) -> None:
    """Messages leave on a thread of their own: the engine never waits for the router."""
    try:
        while (message := outgoing.get()) is not None:
            channel.send(message)
    except OSError:
        return  # the reader finds out too


def _pulse(host: ReplicaHost, outgoing: queue.SimpleQueue[Message | None], seconds: float, over: threading.Event) -> None:
    """Says that this process lives, and how its engine is."""
    since = -1
    while not over.wait(seconds):
        pulse = host.pulse(since)
        since = max((iteration["index"] for iteration in pulse["iterations"]), default=since)
        outgoing.put(pulse)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's to answer
    serve(socket.socket(fileno=int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # threads of libraries that are still busy do not hold up the end


if __name__ == "__main__":
    main()
