"""N engines that look like one: the surface that the service, the page and the metrics use."""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Final

from armillary.core.clock import Clock, RealClock
from armillary.core.errors import ArmillaryError, CapacityError
from armillary.core.trace import Trace
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.adapters import FleetAdapters
from armillary.serve.fleet.channel import Channel
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.dispatcher import Dispatcher
from armillary.serve.fleet.handover import Network, SharedFolder
from armillary.serve.fleet.live import Live
from armillary.serve.fleet.member import Member
from armillary.serve.fleet.messages import Message, unpack_error
from armillary.serve.fleet.processes import Launcher, LocalLauncher, Started
from armillary.serve.fleet.shared_folder import make_alone, shared_folder
from armillary.serve.history import EngineStats
from armillary.serve.outbox import Outbox
from armillary.serve.request import Request
from armillary.serve.schedule import Limits

log = logging.getLogger(__name__)

TICK: Final = 0.01  # seconds between looks at the clock while there are requests
IDLE: Final = 0.1
PULSE: Final = 0.1  # seconds between two signs of life of a replica
BACKOFF: Final = (0.5, 30.0)  # seconds before a dead replica is started again: at first, doubled each time, and at most
HOPELESS: Final = 120.0  # seconds of silence after which a replica is killed and started again
WELL: Final = 60.0  # seconds that a replica lives before its earlier deaths are forgotten
EXPLAIN_SECONDS: Final = 0.5  # that replicas have to tell their part of a request's story


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What each replica builds: a function by name ("module:function") and its arguments, plain values, by keyword."""

    build: str
    arguments: dict[str, Any]


class _Process:
    """The process of one member: it changes when it dies, the member stays."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.started: Started | None = None
        self.channel: Channel | None = None
        self.since = 0.0
        self.delay = 0.0
        self.restart_at: float | None = None
        self.ready: Message = {}  # what it said when it had been built
        self.pid: int | None = None
        self.words = ""

    def send(self, message: Message) -> None:
        """`member.Link`: what cannot be sent to a dead process is told by its end."""
        if self.channel is not None:
            with contextlib.suppress(OSError):
                self.channel.send(message)


class Fleet:
    """Replicas behind a dispatcher, with `Engine`'s surface: `submit`, `cancel`, `snapshot`, `explain` from any thread.

    `config` and `limits` are those of one replica, which bound a request. One thread talks to all replicas and delivers events, outside the
    lock, so a listener may submit and cancel.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        config: EngineConfig,
        fleet: FleetConfig,
        *,
        eos_ids: Collection[int] = (),
        token_bytes: int = 0,
        clock: Clock | None = None,
        launcher: Launcher | None = None,
        trace: Trace | None = None,
    ) -> None:
        if config.kv_blocks is None:
            raise ArmillaryError("the size of a replica's KV pool is not settled", "divide it first (fleet.build)")
        self.config, self.fleet_config = config, fleet
        self.limits = Limits(config.block_size, config.kv_blocks, config.max_batch_tokens, config.max_running, config.kv.most_blocks)
        self.clock = clock if clock is not None else RealClock()
        self.policy = policies.get(config.policy, *config.composition)
        self.eos_ids = frozenset(eos_ids)
        self._blueprint = blueprint
        self._launcher = launcher if launcher is not None else LocalLauncher()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outbox = Outbox(self._changed)
        shared = bool(fleet.prefill_workers) and fleet.transfer == "memory"
        self._folder = shared_folder() if shared else None
        self.dispatcher = Dispatcher(
            fleet,
            config,
            self.limits,
            self.clock,
            self._outbox.put,
            eos_ids=self.eos_ids,
            token_bytes=token_bytes,
            exchange=SharedFolder(self._folder) if self._folder is not None else Network() if fleet.prefill_workers else None,
        )
        self._processes = [_Process(member) for member in self.dispatcher.members]
        self.adapters = FleetAdapters(config.lora, self._changed, lambda index, message: self._processes[index].send(message))
        self._live = Live(self.dispatcher, trace)
        self._arrived: deque[tuple[_Process, Started]] = deque()  # launched, not listened to yet
        self._answers: dict[int, queue.SimpleQueue[list[str] | None]] = {}
        self._asked = 0
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)

    # -- what users call ---------------------------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        """The replicas' counters, added; what hedging computed twice is in them twice."""
        with self._lock:
            return self._live.stats()

    @property
    def alive(self) -> bool:
        """Whether requests are taken: some replica lives or is being started."""
        thread = self._thread
        running = thread is not None and thread.is_alive() and not self._stopping
        return running and any(member.health != "dead" for member in self.dispatcher.members)

    def submit(self, request: Request) -> None:
        """Send a request to a replica. Raises as `Engine.submit`."""
        with self._changed:
            if self._stopping or self._thread is None:
                raise CapacityError("the fleet does not run", "start it, or come back when the server has restarted")
            self.dispatcher.submit(request)
        self._notify()

    def cancel(self, request_id: str) -> bool:
        """End a request wherever it is; False when it is unknown or has ended."""
        with self._changed:
            found = self.dispatcher.cancel(request_id)
        self._notify()
        return found

    def start(self) -> None:
        """Start the replicas and wait until each is ready. Raises what went wrong in one that cannot."""
        with self._changed:
            if self._thread is not None:
                raise ArmillaryError("the fleet already runs", "call start() once")
            self._stopping, self._broken = False, None
            for process in self._processes:
                process.restart_at = 0.0
            self._thread = threading.Thread(target=self._loop, name="armillary-fleet", daemon=True)
            self._thread.start()
            if self._folder is not None:
                make_alone(self._folder)
            while self._broken is None and any(member.health == "starting" for member in self.dispatcher.members):
                self._changed.wait(1.0)
        if self._broken is not None:
            self.stop()
            raise self._broken

    def stop(self) -> None:
        """Cancel what has not ended, and end the replicas."""
        with self._changed:
            thread, self._stopping = self._thread, True
        self._notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._changed:
            self._thread = None
            self.dispatcher.end_all()
            self.adapters.closed()
            ending = [process for process in self._processes if process.started is not None]
            ending_now = [started for _, started in self._arrived]
            self._arrived.clear()
        self._outbox.deliver()
        for process in ending:
            assert process.started is not None
            process.started.connection.close()
        for process in ending:
            assert process.started is not None
            process.started.end(now=process.member.health == "silent")
            process.started = process.channel = None
        for started in ending_now:
            started.end(now=True)
        for member in self.dispatcher.members:
            member.health, member.link = "starting", None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run_until_idle(self) -> None:
        """Wait until every request has ended and every event is delivered."""
        with self._changed:
            while self.dispatcher.tickets or not self._outbox.empty:
                self._changed.wait(1.0)

    def snapshot(self, since: int = -1) -> dict[str, Any]:
        """As `Engine.snapshot`, all replicas together, and `fleet`: each of them, and what the router did."""
        with self._lock:
            state = self._live.snapshot(since, self.policy.name, self.limits)
            for process, row in zip(self._processes, state["features"]["fleet"]["replicas"], strict=True):
                row["pid"], row["computing"] = process.pid, process.words
            reports = [found for member in self.dispatcher.members if (found := member.pulse.get("features", {}).get("adapters"))]
            if adapters := self.adapters.state(reports):
                state["features"]["adapters"] = adapters
            return state

    def explain(self, request_id: str) -> list[str] | None:
        """What the router and the replicas did with a request and why, in words; None when it is unknown or ended long ago."""
        with self._lock:
            words = self.dispatcher.stories.read(request_id)
            if words is None:
                return None
            asked: list[tuple[int, int, queue.SimpleQueue[list[str] | None]]] = []
            for member in self.dispatcher.members:
                if member.link is not None and member.health in ("open", "slow") and threading.current_thread() is not self._thread:
                    self._asked += 1
                    answer = self._answers[self._asked] = queue.SimpleQueue()
                    asked.append((member.index, self._asked, answer))
                    member.link.send({"op": "explain", "ask": self._asked, "id": request_id})
        self._notify()
        deadline = time.monotonic() + EXPLAIN_SECONDS
        told: list[list[str]] = []
        for index, number, answer in asked:
            with contextlib.suppress(queue.Empty):
                told.append([f"replica {index}: {line}" for line in answer.get(timeout=max(0.0, deadline - time.monotonic())) or ()])
            with self._lock:
                self._answers.pop(number, None)
        told.sort(key=lambda lines: "ended: cancelled" not in " ".join(lines[-2:]))  # who gave the answer has the last word
        return [*words, *(line for lines in told for line in lines)]

    # -- the thread --------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stopping:
                ready = selector.select(TICK if self.dispatcher.tickets else IDLE)
                with self._changed:
                    try:
                        self._turn(selector, ready)
                    except Exception:  # a defect of the router; serving on is better than dying, hiding it is not
                        log.exception("the router failed in one of its turns")
                    self._changed.notify_all()
                self._outbox.deliver()

    def _turn(self, selector: selectors.BaseSelector, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                self._read(selector, key.data)
        while self._arrived:
            process, started = self._arrived.popleft()
            self._meet(selector, process, started)
        now = time.monotonic()
        for process in self._processes:
            if process.restart_at is not None and now >= process.restart_at:
                process.restart_at = None
                process.member.health = "starting"
                threading.Thread(target=self._launch, args=(process,), name=f"launch-{process.member.index}", daemon=True).start()
        self.dispatcher.tick()
        self.adapters.tidy(lambda: {ticket.request.adapter for ticket in self.dispatcher.tickets.values()})
        for process in self._processes:
            if process.member.health == "silent" and self.clock.now() - process.member.heard > HOPELESS * 1e9:
                self._bury(selector, process, f"silent for {HOPELESS:g} s")
        for process in self._processes:
            if process.channel is not None and process.member.health != "starting":
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.channel.pending else 0)
                if selector.get_key(process.channel.socket).events != wanted:
                    selector.modify(process.channel.socket, wanted, process)
                if process.channel.pending:
                    with contextlib.suppress(OSError):
                        process.channel.flush()

    def _launch(self, process: _Process) -> None:
        try:
            started = self._launcher.launch(process.member.index)
        except Exception as error:
            log.exception("replica %d could not be started", process.member.index)
            with self._changed:
                self._failed(process, error)
            return
        with self._changed:
            if not self._stopping:
                self._arrived.append((process, started))
                self._notify()
                return
        started.end(now=True)

    def _meet(self, selector: selectors.BaseSelector, process: _Process, started: Started) -> None:
        """A process has begun: tell it what to build."""
        started.connection.setblocking(False)
        process.started, process.channel, process.since = started, Channel(started.connection), time.monotonic()
        selector.register(started.connection, selectors.EVENT_READ, process)
        pulse = min(PULSE, self.fleet_config.silence / 4)
        process.send(
            {
                "op": "serve",
                "build": self._blueprint.build,
                "arguments": self._blueprint.arguments,
                "pulse": pulse,
                "role": process.member.role,
                "transfer": self.fleet_config.transfer,
            }
        )

    def _read(self, selector: selectors.BaseSelector, process: _Process) -> None:
        assert process.channel is not None
        why = ""
        try:
            for message in process.channel.receive():
                self._heard(process, message)
            return
        except (EOFError, OSError):
            pass
        except (ArmillaryError, KeyError, TypeError, ValueError) as error:  # it talks nonsense: as good as dead, and it ends here
            why = f"{type(error).__name__}: {error}"
        self._bury(selector, process, why)

    def _bury(self, selector: selectors.BaseSelector, process: _Process, why: str) -> None:
        """A process is gone, or is of no use any more and goes now."""
        assert process.started is not None and process.channel is not None  # noqa: PT018
        selector.unregister(process.channel.socket)
        how = process.started.end(now=True)
        process.started = process.channel = None
        log.warning("replica %d died (%s)", process.member.index, why or how)
        self._failed(process, ArmillaryError(f"replica {process.member.index} ended before it was ready ({why or how})", "see its log"))
        self.adapters.left(process.member.index)
        self.dispatcher.lost(process.member, why or how)
        self._live.buried(process.member)

    def _heard(self, process: _Process, message: Message) -> None:
        op = message["op"]
        if op == "ready":
            if message["limits"] != asdict(self.limits):
                raise ArmillaryError(f"replica {process.member.index} has other limits than asked for: {message['limits']}")
            process.ready = message
            if self.adapters.greet(process.member.index):
                self._joined(process)
        elif op == "adapter":
            try:
                if self.adapters.heard(process.member.index, message):
                    self._joined(process)
            except ArmillaryError as error:
                if process.pid is None and self._broken is None:
                    self._broken = error
                raise
        elif op == "failed":
            if self._broken is None:
                self._broken = unpack_error(message["error"])
        elif op == "explained":
            answer = self._answers.get(message["ask"])
            if answer is not None:
                answer.put(message["words"])
        else:
            self.dispatcher.heard(process.member, message)
            if op == "pulse":
                self._live.pulse(process.member)

    def _joined(self, process: _Process) -> None:
        """It takes requests from now on."""
        process.member.address = str(process.ready["address"])
        process.pid, process.words = int(process.ready["pid"]), str(process.ready["words"])
        self.dispatcher.joined(process.member, process)

    def _failed(self, process: _Process, error: Exception) -> None:
        """It is started again, later each time; the first start of all is not tried again."""
        if process.pid is None and self._broken is None:
            self._broken = error
        least, most = BACKOFF
        lived = time.monotonic() - process.since
        process.delay = least if lived > WELL or not process.delay else min(most, 2 * process.delay)
        process.restart_at = time.monotonic() + process.delay
