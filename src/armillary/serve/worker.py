"""One thread that carries out one thing at a time, so that another can go on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Its thread begins with the first work, and again after `stop`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def running(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Iterator[Future[T]]:
        """`work` runs while the block does, and has ended when it is left, whatever happens in it (an interrupt, too)."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, self._name)
        future = self._pool.submit(work, *args, **kwargs)
        try:
            yield future
        finally:
            wait([future])

    def stop(self) -> None:
        """End the thread; it has nothing to do."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
