"""Workers that call one function: threads of this process, or a process behind each thread. Closing them never waits for a call."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from armillary.core.errors import ArmillaryError


class Closed(Exception):
    """The pool was closed before the call was made or had ended."""


class Call:
    """One call of the function: its result or its error, and how long it took."""

    __slots__ = ("_done", "argument", "elapsed", "error", "finished", "result")

    def __init__(self, argument: Any) -> None:
        self.argument, self.result, self.elapsed = argument, None, 0  # ns
        self.error: BaseException | None = None
        self.finished = False
        self._done = threading.Event()

    def wait(self) -> Any:
        """The result, when it is there. Raises what the call raised, or `Closed`."""
        self._done.wait()
        if self.error is not None:
            raise self.error
        return self.result

    def finish(self, result: Any, error: BaseException | None) -> None:
        if not self.finished:
            self.result, self.error, self.finished = result, error, True
            self._done.set()


class Workers:
    """As many workers as there are calls to make, and at most `limit`, which may be raised at any time."""

    def __init__(self, function: Callable[[Any], Any], name: str, *, processes: bool, done: Callable[[], None] = lambda: None) -> None:
        self.limit = 1
        self._function, self._name, self._processes, self._done = function, name, processes, done
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._open: set[Call] = set()
        self._threads: list[threading.Thread] = []
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._idle, self._closed = 0, False

    def submit(self, argument: Any) -> Call:
        call = Call(argument)
        with self._lock:
            if self._closed:
                raise Closed
            self._open.add(call)
            start = self._idle < len(self._open) - (len(self._threads) - self._idle) and len(self._threads) < self.limit
            if start:
                thread = threading.Thread(target=self._work, name=f"{self._name} worker {len(self._threads)}", daemon=True)
                self._threads.append(thread)
        self._queue.put(call)
        if start:
            thread.start()
        return call

    def close(self) -> list[threading.Thread]:
        """Ends everything: calls in flight are given up, processes killed. Gives the threads, which end with their present call."""
        with self._lock:
            self._closed = True
            calls, children = list(self._open), list(self._children)
            for _ in self._threads:
                self._queue.put(None)
        for call in calls:
            call.finish(None, Closed())
        for child in children:
            child.kill()
        return self._threads

    def _work(self) -> None:
        function = None if self._processes else self._function
        while True:
            with self._lock:
                self._idle += 1
            call = self._queue.get()
            with self._lock:
                self._idle -= 1
            if call is None or self._closed:
                return
            start, result, error = time.perf_counter_ns(), None, None
            try:
                if function is None:  # a process that cannot be started is the call's failure, or its caller would wait for ever
                    function = self._child()
                    start = time.perf_counter_ns()
                result = function(call.argument)
            except BaseException as raised:
                error = raised
            call.elapsed = time.perf_counter_ns() - start
            with self._lock:
                self._open.discard(call)
            call.finish(result, error)
            self._done()

    def _child(self) -> Callable[[Any], Any]:
        """The function, in a process of its own."""
        child = _Child(self._function, self._name)
        with self._lock:
            self._children.append(child)
            if self._closed:
                child.kill()
        return child.call


class _Child:
    """A process that calls the function, one call at a time."""

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process that has threads copies locks that nobody will release
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that its end is the end of the pipe

    def call(self, argument: Any) -> Any:
        try:
            self._pipe.send(argument)
            good, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(1)
            raise ArmillaryError(
                f"the worker process ended with status {self._process.exitcode}", "was it killed, or out of memory? lower the parallelism"
            ) from None
        if not good:
            kind, text, trace = value
            error = ArmillaryError(f"{kind}: {text}")
            error.add_note(trace)
            raise error
        return value

    def kill(self) -> None:
        self._process.kill()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """The child's loop, until its parent goes."""
    import signal
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    while True:
        try:
            argument = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = (True, function(argument))
            pipe.send(answer)
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error)[:2000], traceback.format_exc()[-4000:])))
