"""What the replica processes of these tests build: named by "module:function", as `armillary serve` names its own."""

import socket
import threading
import time

from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.fleet import worker
from armillary.serve.fleet.processes import LocalLauncher
from armillary.serve.request import TokenLogprob
from armillary.serve.schedule import Outcome

BUILDING = threading.Lock()  # a tiny model is drawn from the random numbers of the whole process


def tiny_engine(engine, seed=0):
    """A tiny random model's engine, and words for it."""
    from models import loaded, tiny

    from armillary.serve.llm import build_engine

    with BUILDING:
        model = loaded(tiny(seed=seed, num_layers=3))
    return worker.Replica(build_engine(model, EngineConfig(**engine)), "a tiny random model", worker.grammars(model))


class Clockwork:
    """An executor without a model: the next token is counted from the position and the prompt, half a millisecond an iteration."""

    def run(self, plan):
        start = time.perf_counter_ns()
        time.sleep(0.0005)
        sampled = []
        for entry, request in zip(plan.schedule.entries, plan.requests, strict=True):
            token = (7 * request.known + sum(request.prompt)) % 90
            sampled.append((TokenLogprob(token, -0.5 if request.sampling.logprobs is not None else None),) if entry.sample else ())
        return Outcome(tuple(sampled), ((),) * len(sampled), start, time.perf_counter_ns())


def scripted_engine(engine):
    """An engine that needs no torch, and so starts at once."""
    return worker.Replica(Engine(Clockwork(), EngineConfig(**engine), eos_ids=[96]), "clockwork")


class ThreadReplica:
    """A replica without a process: it is there at once, and cannot be killed."""

    def __init__(self):
        self.connection, theirs = socket.socketpair()
        self._theirs, self._thread = theirs, threading.Thread(target=worker.serve, args=(theirs,), daemon=True)
        self._thread.start()

    def end(self, *, now=False):
        self.connection.close()
        self._thread.join()
        self._theirs.close()
        return "the thread is over"


class ThreadLauncher:
    """Replicas as threads, except those of `processes`."""

    def __init__(self, processes=()):
        self._processes = processes

    def launch(self, index):
        return LocalLauncher().launch(index) if index in self._processes else ThreadReplica()
