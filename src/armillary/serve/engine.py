"""The engine: state -> policy -> schedule -> executor -> outcome -> events and trace, once an iteration."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

from armillary.core.clock import Clock, RealClock
from armillary.core.contract import Executor
from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.serve import live, policies
from armillary.serve.admission import admissible
from armillary.serve.config import EngineConfig
from armillary.serve.continuation import extend, keep_prompt_scores
from armillary.serve.history import History
from armillary.serve.iteration_times import IterationTimes
from armillary.serve.lookahead import Foreseen, foresee
from armillary.serve.outbox import Outbox
from armillary.serve.request import Event, FinishReason, Request, TokenLogprob
from armillary.serve.schedule import Hit, Limits, Outcome, Plan, Reason, Schedule, SchedulerPolicy, State
from armillary.serve.seats import Seats
from armillary.serve.sequence_memory import SequenceMemory
from armillary.serve.speculation import Drafter
from armillary.serve.speculation.proposals import Proposals
from armillary.serve.verify import ScheduleError, verify, verify_outcome
from armillary.serve.worker import Worker

if TYPE_CHECKING:
    from armillary.core.trace import Trace
    from armillary.serve.adapters import AdapterStore

log = logging.getLogger(__name__)


class Engine:
    """Runs requests to their end, one iteration after another.

    Use it synchronously (`submit`, then `step` or `run_until_idle`) or let `start` run a thread that sleeps while there is
    nothing to do. `submit`, `cancel`, `snapshot` and `explain` may be called from any thread. Events are delivered on the
    thread that runs the engine, outside its lock, so a listener may submit and cancel; it may not step.

    `eos_ids` end a sequence unless its request ignores them. `policy` overrides the one that `config` names. `drafter` proposes
    tokens to be verified together. `adapters` are those that requests may run with. `features` are named parts that show their
    state in `snapshot`. `told`: whether stories are kept for `explain`, and recent iterations.

    A request with a `parent` that is still waiting for its prompt begins when the parent has computed it, and shares it.
    """

    def __init__(
        self,
        executor: Executor[Plan, Outcome],
        config: EngineConfig,
        *,
        clock: Clock | None = None,
        trace: Trace | None = None,
        eos_ids: Collection[int] = (),
        policy: SchedulerPolicy | None = None,
        drafter: Drafter | None = None,
        adapters: AdapterStore | None = None,
        told: bool = True,
    ) -> None:
        if config.kv_blocks is None:
            raise InputError("the size of the KV pool is not settled", "set kv_blocks, or use EngineConfig.with_pool", field="kv_blocks")
        self.executor = executor
        self.config = config
        self.clock = clock if clock is not None else RealClock()
        self.policy = policy if policy is not None else policies.get(config.policy, *config.composition)
        self.drafter = drafter
        self.adapters = adapters
        self.features: dict[str, Callable[[], Mapping[str, Any]]] = {}
        if adapters is not None:
            self.features["adapters"] = adapters.state
        self.eos_ids = frozenset(eos_ids)
        self.limits = Limits(config.block_size, config.kv_blocks, config.max_batch_tokens, config.max_running, config.kv.most_blocks)
        self._memory = SequenceMemory(config.kv_blocks, config.block_size, config.kv, sharing=config.prefix_cache == "on")
        self._history = History(trace, config.block_size, told=told)
        self.stats = self._history.stats  # cumulative counters; read them, never write
        self._times = IterationTimes()
        self._index = 0
        self._numbers = count()
        self._requests: dict[str, Request] = {}  # every one that has not ended
        self._seats = Seats()
        self._foreseen: Foreseen | None = None
        self._worker = Worker("armillary-executor") if config.async_scheduling == "on" else None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._proposals = Proposals(self._lock)
        self._outbox = Outbox(self._changed)
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # -- what users call ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError when it could never run here, CapacityError when the queue is full."""
        admissible(request, self.config, self.limits)
        with self._changed:
            if self._thread is not None and self._stopping:
                raise CapacityError("the engine is stopping", "send the request to another server, or start() it again")
            if request.id in self._requests:
                raise InputError(f"a request '{request.id}' is already being served", "give each request its own id", field="id")
            if self._seats.queued >= self.config.max_queue:
                raise CapacityError(
                    f"the queue holds its bound of {self.config.max_queue:,} requests", "retry later or serve with a larger --max-queue"
                )
            if request.adapter:
                self._begin_adapter(request)
            now = self.clock.now()
            if request.arrival is None:
                request.arrival = now
            request.number = next(self._numbers)
            self._requests[request.id] = request
            self._history.arrived(request, max(now, request.arrival), self._seats.queued, self.policy.behind)
            self._seats.enter(request, as_fork=self._awaits_prompt(request))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        """End a request wherever it is; False when it is unknown or has ended.

        Its blocks are free at once. An iteration that the executor is carrying out may still write to them; nobody else is
        given them before it returns, because blocks are allocated between iterations only.
        """
        with self._changed:
            request = self._requests.get(request_id)
            if request is None:
                return False
            self._seats.drop(request)
            self._finish(request, "cancelled", self.clock.now())
            self._return_batch()
            self._changed.notify_all()
            threaded = self._thread is not None
        if not threaded:
            self._outbox.deliver()
        return True

    def let_go(self, requests: Iterable[Request]) -> None:
        """Give back the blocks of ended requests that were `retained`."""
        with self._lock:
            self._memory.let_go(requests)

    def step(self) -> bool:
        """Run one iteration and deliver its events; False when there was nothing to do.

        Raises ScheduleError when the policy is defective. An executor's exception ends the requests of its iteration with
        an error event and is not raised.
        """
        if self._thread is not None:
            raise ArmillaryError("the engine runs on its own thread", "call stop() before step()")
        busy = self._step()
        self._outbox.deliver()
        return busy

    def run_until_idle(self) -> None:
        """Step until every request has ended; with a thread running, wait for that."""
        while self._thread is not None and threading.current_thread() is not self._thread:
            with self._changed:
                if not self._requests and self._outbox.empty:
                    return
                self._changed.wait(timeout=1.0)
        while self.step():
            pass
        self.check()

    def start(self) -> None:
        """Run iterations on a background thread as requests come."""
        with self._changed:
            if self._thread is not None:
                raise ArmillaryError("the engine already runs", "call start() once")
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="armillary-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the background thread after its iteration and cancel what has not ended."""
        with self._changed:
            thread = self._thread
            self._stopping = True
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._changed:
            self._thread = None
            self._end_all("cancelled", None)
        if self._worker is not None:
            self._worker.stop()
        self._outbox.deliver()

    @property
    def alive(self) -> bool:
        """Whether the background thread runs."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._stopping

    def snapshot(self, since: int = -1) -> dict[str, Any]:
        """The live state as plain values: counts, one row a request (the head of the queue only), blocks, recent iterations.

        Only iterations with an index over `since` are listed, so that a page that asks often costs little.
        """
        with self._lock:
            pool = self._memory.pool
            own = live.features(self.config, self.stats, pool.idle_count)
            return {
                "policy": self.policy.name,
                "now": self.clock.now(),
                "iteration": self._index,
                "running": len(self._seats.running),
                "waiting": self._seats.queued,
                "limits": asdict(self.limits),
                "blocks": {"used": pool.used_count, "kept": pool.idle_count, "total": pool.total, "block_size": pool.block_size},
                "requests": live.rows(self._seats, self._history.held, self.policy.behind),
                "iterations": self._history.iterations(since),
                "stats": asdict(self.stats),
                "features": own | {name: dict(found) for name, state in self.features.items() if (found := state())},
            }

    def explain(self, request_id: str) -> list[str] | None:
        """What happened to a request and why, in words; None when it is unknown or ended long ago."""
        with self._lock:
            return self._history.explain(request_id)

    def check(self) -> None:
        """Assert the invariants of memory: each block is in as many block tables as it has users."""
        with self._lock:
            self._memory.check(self._requests.values())

    # -- one iteration -----------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        if not self._stepping.acquire(blocking=False):
            raise ArmillaryError("an iteration is already being run", "step from one thread, and never from a listener")
        try:
            return self._iterate()
        finally:
            self._stepping.release()

    def _iterate(self) -> bool:
        if self.drafter is not None:
            self._proposals.ask(self.drafter, self._seats.running)
        with self._lock:
            if not self._seats.running and not self._seats.waiting:
                return False
            began = self.clock.now()
            schedule, scheduled = self._decide()
            plan = self._apply(schedule, scheduled)
        start, failure, outcome = self.clock.now(), None, None
        try:
            outcome = self._run(plan)
            verify_outcome(outcome, plan)
        except Exception as error:
            failure = error
            log.exception("iteration %d failed; its %d requests end with an error", schedule.index, len(schedule.entries))
        finally:
            with self._changed:
                if failure is not None:
                    self._fail(plan, failure, start)
                elif outcome is not None:
                    self._collect(plan, outcome)
                    self._times.note(schedule.tokens, self.clock.now() - began)
                self._return_batch()
                self._changed.notify_all()
        return True

    def _state(self) -> State:
        running, free = tuple(self._seats.running), self._memory.pool.free_count
        return State(self._index, self._seats.waiting, running, free, self.limits, self._memory, self.clock.now(), self._times)

    def _decide(self) -> tuple[Schedule, dict[str, Request]]:
        """The next schedule and whom it names: the one made ahead where it still fits, otherwise the policy's for the state as it is."""
        state, foreseen = self._state(), self._foreseen
        self._foreseen = None
        if foreseen is not None and (schedule := foreseen.settled(state, self._requests)) is not None:
            with suppress(ScheduleError):  # what was foreseen is no reason to fail
                scheduled = verify(schedule, state)
                self.stats.foreseen_schedules += 1
                return schedule, scheduled
        schedule = self.policy.step(state)
        short = schedule.preempted or any(hold.reason is Reason.NO_BLOCKS for hold in schedule.held)
        if short and self._memory.let_go():  # what is retained, before anybody waits for memory
            state = self._state()
            schedule = self.policy.step(state)
        return schedule, verify(schedule, state)

    def _run(self, plan: Plan) -> Outcome:
        """Have the plan carried out; with asynchronous scheduling on another thread, while the next is made here."""
        if self._worker is None:
            return self.executor.run(plan)
        with self._worker.running(self.executor.run, plan) as running:
            self._outbox.deliver()
            if self.drafter is None:  # drafts follow the token that is being drawn
                with self._lock, suppress(Exception):  # a policy's defect shows when it is asked again
                    self._foreseen = foresee(self.policy, plan, self._state())
        return running.result()

    def _apply(self, schedule: Schedule, scheduled: dict[str, Request]) -> Plan:
        """Carry out what the schedule says about memory and seats; give the batch."""
        now = self.clock.now()
        self._index += 1
        running = {request.id for request in self._seats.running}
        admitted = [scheduled[entry.request_id] for entry in schedule.entries if entry.request_id not in running]
        for preemption in schedule.preempted:
            request = self._requests[preemption.request_id]
            self._history.preempted(request, preemption, now)
            self._seats.preempt(request)
            self._memory.release(request)
            request.computed = request.kept = 0
            request.drafts, request.draft_laws = (), ()
            request.preemptions += 1
        hits: dict[str, Hit] = {}
        if admitted:
            self._seats.admit(admitted)
            for entry in schedule.entries:  # before anybody is given what others have left
                if entry.request_id not in running:
                    hits[entry.request_id] = self._begin(scheduled[entry.request_id], entry.start)
        copies: list[tuple[int, int]] = []
        requests = tuple([scheduled[entry.request_id] for entry in schedule.entries])
        for entry, request in zip(schedule.entries, requests, strict=True):
            self._memory.grow(request, entry.blocks)
            if request.first_scheduled is None:
                request.first_scheduled = now
            if hits and (hit := hits.get(entry.request_id)) is not None and hit.copied is not None:
                copies.append((hit.copied, request.blocks[entry.start // self.limits.block_size]))
        self._history.scheduled(schedule, admitted, hits, now)
        return Plan(schedule, requests, self._tables(requests), tuple(copies))

    def _tables(self, requests: Sequence[Request]) -> tuple[Sequence[int], ...]:
        """Copies: an executor may still read them when the sequences have other blocks."""
        return tuple([tuple(request.blocks) for request in requests])

    def _begin(self, request: Request, start: int) -> Hit:
        """An admitted sequence has its first `start` tokens from others."""
        hit = self._memory.begin(request, start)
        self._history.began(request, hit, start, self._memory.looks_for(request))
        if not hit.delivered and request.first_scheduled is None:
            request.reused = start
        return hit

    def _begin_adapter(self, request: Request) -> None:
        if self.adapters is None:
            raise InputError(
                f"request '{request.id}' asks for an adapter, and this engine serves none", "serve with --lora", field="adapter"
            )
        self.adapters.begin(request.adapter)

    def _collect(self, plan: Plan, outcome: Outcome) -> None:
        """Advance every sequence of the iteration by what was computed and drawn."""
        self._history.ran(plan, outcome.start, outcome.end, self._memory.pool.used_count)
        failed, alive, shared = dict(outcome.failed), self._requests, self._memory.shared
        for index, vector in outcome.pooled:
            plan.requests[index].pooled = vector
        if self.drafter is not None:
            self.drafter.ran(plan.schedule.tokens, outcome.end - outcome.start)
        for index, (entry, request, sampled, scores) in enumerate(
            zip(plan.schedule.entries, plan.requests, outcome.sampled, outcome.prompt_logprobs, strict=True)
        ):
            request.drafts = request.draft_laws = ()
            if alive.get(request.id) is not request:  # cancelled meanwhile
                continue
            request.computed = entry.start + entry.count - entry.drafts
            if shared and index not in failed:
                self._memory.keep(request)
            if not request.output and entry.start < len(request.prompt) <= request.computed:
                self.stats.prompt_tokens += len(request.prompt)
            if scores:
                keep_prompt_scores(request, entry.start, scores)
            try:
                if index in failed:
                    raise failed[index]
                if sampled:
                    self._accept(request, entry.drafts, sampled, outcome.end)
                elif request.sampling.max_tokens == 0 and request.computed == request.known:
                    self._end(request, "length", Event(request.id, None, "", None, "length", outcome.end))
            except Exception as error:  # its logits or its text stream: only this request ends
                log.error("request '%s' failed alone: %s", request.id, error, exc_info=not isinstance(error, InputError))
                self._seats.drop(request)
                self._finish(request, "error", outcome.end, error)

    def _accept(self, request: Request, drafts: int, sampled: Sequence[TokenLogprob], at: int) -> None:
        """A sequence goes on with the drawn tokens: what its drafts had right is computed already."""
        if drafts:
            accepted = len(sampled) - 1
            request.drafted, request.accepted = request.drafted + drafts, request.accepted + accepted
            self.stats.drafted_tokens += drafts
            self.stats.accepted_tokens += accepted
            if self.drafter is not None:
                self.drafter.verified(request, drafts, accepted)
        for place, token in enumerate(sampled):
            if place:
                request.computed += 1
            event = extend(request, token, self.eos_ids, at)
            self.stats.generated_tokens += 1
            if event.finish_reason is not None:
                self._end(request, event.finish_reason, event)
                return
            self._outbox.put(request, event)
        if self._seats.forks.count:
            self._seats.release_forks(request)

    def _fail(self, plan: Plan, error: Exception, start: int) -> None:
        """The executor raised: the requests of the iteration end, everything else goes on."""
        now = self.clock.now()
        self._history.failed(plan, error, start, now)
        for request in plan.requests:
            if self._requests.get(request.id) is request:
                self._seats.drop(request)
                self._finish(request, "error", now, error)

    # -- how requests end --------------------------------------------------------------------------------------------

    def _end(self, request: Request, reason: FinishReason, event: Event) -> None:
        """A running sequence is complete: return it now, or with its batch when the policy serves whole batches."""
        if self.policy.returns_together:
            self._seats.park(request, reason, event)
        else:
            self._seats.drop(request)
            self._finish(request, reason, event.at, event=event)

    def _return_batch(self) -> None:
        parked = self._seats.parked
        if parked and not self._seats.running:
            at = max(event.at for _, _, event in parked)
            for request, reason, event in parked:
                self._finish(request, reason, at, event=event)
            parked.clear()

    def _awaits_prompt(self, request: Request) -> bool:
        """Whether to wait for the parent's prompt. Policies that serve whole batches would hold a late-comer until the next."""
        parent = request.parent
        return (
            parent is not None
            and not self.policy.returns_together
            and parent.id in self._requests
            and parent.computed < len(request.prompt) - 1
            and request.sampling.prompt_logprobs is None
        )

    def _finish(self, request: Request, reason: FinishReason, at: int, error: Exception | None = None, event: Event | None = None) -> None:
        """The end, whatever the cause: memory back, listener told."""
        if request.retained and reason in ("stop", "length"):
            self._memory.retain(request)
        else:
            self._memory.release(request)
        request.finish_reason = reason
        request.finished = at
        del self._requests[request.id]
        if request.adapter and self.adapters is not None:
            self.adapters.end(request.adapter)
        self._seats.release_forks(request)
        if self.drafter is not None:
            self._proposals.forget(self.drafter, request)
        self._history.finished(request, at, error)
        request.block_names.clear()  # callers keep their requests
        self._outbox.put(request, event if event is not None else Event(request.id, None, "", None, reason, at, error))

    def _end_all(self, reason: FinishReason, error: Exception | None) -> None:
        self._seats.clear()
        self._memory.let_go()
        for request in list(self._requests.values()):
            self._finish(request, reason, self.clock.now(), error)
        self._changed.notify_all()

    # -- events and the thread ---------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._changed:
                if not self._requests:
                    self._check_idle()
                while not (self._stopping or self._seats.running or self._seats.waiting or self._outbox.waiting):
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                self._step()
            except Exception as error:  # a defective policy: say so to everyone who waits, then serve whoever comes next
                log.exception("the scheduler failed; all %d requests end with an error", len(self._requests))
                with self._changed:
                    self._end_all("error", error)
            if self._worker is None or not self._seats.running:  # else while the next iteration runs
                self._outbox.deliver()

    # -- small print -------------------------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        try:
            self._memory.check(self._requests.values())
        except ArmillaryError:  # a defect of the engine; serving on is better than dying, hiding it is not
            log.critical("the KV pool's books are wrong while nothing runs", exc_info=True)
