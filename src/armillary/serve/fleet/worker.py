"""The process of one replica: `python -m armillary.serve.fleet.worker FD` serves whoever holds the other end of the socket."""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from armillary.serve.fleet.channel import Channel
from armillary.serve.fleet.host import ReplicaHost
from armillary.serve.fleet.messages import Message, pack_error

if TYPE_CHECKING:
    from armillary.models.load import LoadedModel
    from armillary.serve.constraint import Constraint
    from armillary.serve.engine import Engine
    from armillary.serve.fleet.kv_files import KVFiles
    from armillary.serve.fleet.kv_network import KVNetwork

FROM_MODEL = "armillary.serve.fleet.worker:from_model"


@dataclass(frozen=True, slots=True)
class Replica:
    """What a build gives: an engine, what computes in words, and how a grammar (`messages.pack_request`) becomes a constraint."""

    engine: Engine
    words: str
    constrain: Callable[[Message], Constraint] | None = None


def from_model(model: str, engine: dict[str, Any]) -> Replica:
    """The engine of a model by name or path."""
    from armillary.core.units import format_bytes
    from armillary.models.load import load
    from armillary.serve.config import EngineConfig
    from armillary.serve.llm import build_engine

    loaded = load(model)
    built = build_engine(loaded, EngineConfig.model_validate(engine))
    forward = built.executor.forward  # type: ignore[attr-defined]
    words = f"{forward.name}, weights {format_bytes(forward.weight_bytes)} in memory"
    return Replica(built, words, grammars(loaded))


def grammars(loaded: LoadedModel) -> Callable[[Message], Constraint]:
    """Compiles grammars for a model; each once, as long as it is remembered."""
    from armillary.serve.grammar.compiler import GrammarCompiler
    from armillary.serve.grammar.grammar import Grammar

    compiler = GrammarCompiler(loaded.tokenizer, loaded.config.vocab_size)
    return lambda grammar: compiler.compile(Grammar(**grammar)).matcher()


def serve(connection: socket.socket) -> None:
    """Build the engine that the first message names, and serve until the other end is closed."""
    channel = Channel(connection)
    (first, *_) = channel.receive()
    module, _, function = str(first["build"]).partition(":")
    try:
        built: Replica = getattr(importlib.import_module(module), function)(**first["arguments"])
        engine = built.engine
    except Exception as error:
        with contextlib.suppress(OSError):  # the router has heard the same from another, and left
            channel.send({"op": "failed", "error": pack_error(error)})
        return
    outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    files = _files(engine, str(first["role"]), str(first["transfer"]), connection)
    host = ReplicaHost(engine, outgoing.put, files, built.constrain)
    engine.start()
    outgoing.put(
        {
            "op": "ready",
            "pid": os.getpid(),
            "limits": asdict(engine.limits),
            "words": built.words,
            "address": files.address if files else "",
        }
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
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, they are the router's to answer: it may want to drain
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # threads of libraries that are still busy do not hold up the end


if __name__ == "__main__":
    main()
