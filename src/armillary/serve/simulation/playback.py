"""A simulation that stops at any instant, to be looked at: what a page sees of an engine, at a virtual time of its choice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from armillary.core.errors import ArmillaryError, InputError
from armillary.serve.request import Request
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.simulation.watched import Abandoned, Gate, WatchedEngine
from armillary.serve.workload.requests import Source


class Playback:
    """`requests` over and over again: forward it goes on, backward it begins anew, for the same seed gives the same run.

    `replica`: whose engine is looked at. The other replicas are as far as the events before the instant have brought them.
    """

    def __init__(self, scenario: Scenario, requests: Callable[[], Iterable[Request] | Source], replica: int = 0) -> None:
        if not 0 <= replica < scenario.replicas:
            raise InputError(
                f"there is no replica {replica} among {scenario.replicas:,}", f"watch 0 to {scenario.replicas - 1}", field="replica"
            )
        self._scenario, self._requests, self._replica = scenario, requests, replica
        self._gate: Gate | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def snapshot(self, at: int, since: int = -1) -> dict[str, Any]:
        """`Engine.snapshot` at `at` ns of virtual time."""
        engine = self._at(at)
        return engine.snapshot(since) | {"now": at}

    def explain(self, request_id: str, at: int) -> list[str] | None:
        """`Engine.explain` at `at` ns."""
        return self._at(at).explain(request_id)

    def close(self) -> None:
        """Let the simulation go."""
        if self._gate is not None and self._thread is not None:
            self._gate.abandon()
            self._thread.join()
        self._gate = self._thread = None

    def _at(self, at: int) -> WatchedEngine:
        if self._gate is not None and at < self._gate.target:
            self.close()
        if self._gate is None:
            self._begin()
        gate = self._gate
        assert gate is not None
        gate.run_to(at)
        if self._error is not None:
            raise self._error
        if gate.engine is None:
            raise ArmillaryError("the scenario has made no engine that can be watched", "watch one of the replicas")
        return gate.engine

    def _begin(self) -> None:
        gate = self._gate = Gate(self._replica)
        self._error = None

        def run() -> None:
            try:
                self._scenario.run(self._requests(), watched=gate)
            except Abandoned:
                pass
            except Exception as error:
                self._error = error
            finally:
                gate.end()

        self._thread = threading.Thread(target=run, name="armillary-playback", daemon=True)
        self._thread.start()
