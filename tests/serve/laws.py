"""The plainest loop, an executor whose cache is a table of integers, and a policy wrapper that asserts the laws of scheduling."""

import copy
import dataclasses
import random
import zlib
from fractions import Fraction

from armillary.core.clock import VirtualClock
from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request, SamplingParams, TokenLogprob
from armillary.serve.schedule import Outcome, Reason
from armillary.serve.verify import verify

VOCABULARY = 50
EOS = 7


def next_token(cached):
    """The token after [(position, token), ...]: it depends on all of them, as attention does."""
    return zlib.crc32(repr(cached).encode()) % VOCABULARY


def plain_loop(prompt, max_tokens, eos=(EOS,), stop=()):
    """One request alone, without blocks, chunks or a batch."""
    known, output = list(prompt), []
    while len(output) < max_tokens:
        output.append(next_token(list(enumerate(known))))
        known.append(output[-1])
        if output[-1] in eos or output[-1] in stop:
            break
    return output


class TableExecutor:
    """Writes every computed token into its slot and reads the whole sequence back through the block table."""

    def __init__(self, block_size, clock=None):
        self.block_size = block_size
        self.clock = clock or VirtualClock()
        self.slots = {}
        self.fail = False
        self.on_run = None

    def run(self, plan):
        if self.on_run is not None:
            self.on_run(plan)
        if self.fail:
            self.fail = False
            raise MemoryError("the executor ran out of memory")
        start = self.clock.now()
        self.clock.advance(1)
        rows = list(zip(plan.schedule.entries, plan.requests, plan.block_tables, strict=True))
        for source, target in plan.copies:
            for slot in range(self.block_size):
                self.slots[target * self.block_size + slot] = self.slots.get(source * self.block_size + slot)
        for entry, request, table in rows:
            assert len(table) == entry.blocks
            for position in range(entry.start, entry.start + entry.count):
                token = request.token(position) if position < request.known else request.drafts[position - request.known]
                self.slots[self._slot(table, position)] = (position, token)
        sampled = [self._drawn(entry, request, table) for entry, request, table in rows]
        return Outcome(tuple(sampled), ((),) * len(rows), start, self.clock.now())

    def _drawn(self, entry, request, table):
        end = entry.start + entry.count
        cached = [self.slots[self._slot(table, position)] for position in range(end)]
        drawn = []
        for known in range(end - entry.drafts, end + 1) if entry.sample else ():
            drawn.append(TokenLogprob(next_token(cached[:known])))
            if known < end and cached[known][1] != drawn[-1].token:
                break
        return tuple(drawn)

    def _slot(self, table, position):
        return table[position // self.block_size] * self.block_size + position % self.block_size


class Guesser:
    """A drafter that knows what comes, and is now and then wrong."""

    name = "guesser"

    def __init__(self, seed, length, errors):
        self.random, self.length, self.errors = random.Random(seed), length, errors
        self.told = []

    def propose(self, requests, most):
        return [self._guess(request, min(self.length, bound)) for request, bound in zip(requests, most, strict=True)]

    def _guess(self, request, count):
        known = [*request.prompt, *request.output]
        for _ in range(count):
            wrong = self.random.random() < self.errors
            known.append(self.random.randrange(VOCABULARY) if wrong else next_token(list(enumerate(known))))
        return tuple(known[request.known :])

    def verified(self, request, drafted, accepted):
        assert 0 <= accepted <= drafted
        self.told.append(accepted)

    def ran(self, tokens, duration):
        assert tokens > 0
        assert duration >= 0

    def laws(self, request):
        return ()

    def forget(self, request):
        assert request.finish_reason is not None


def frozen(state):
    """Everything a policy could have written, as a value."""
    waiting, running = ([(id(r), *_values(r)) for r in queue] for queue in (state.waiting, state.running))
    return waiting, running, state.free_blocks, state.index, state.limits


def _values(request):
    names = ("id", "prompt", "sampling", "arrival", "computed", "blocks", "preemptions", "drafts")
    return (len(request.output), list(iter(request.output)), *(copy.copy(getattr(request, name)) for name in names))


def without_identity(state):
    """A state that is equal in values and shares nothing with `state`."""
    twins = [[_twin(r) for r in queue] for queue in (state.waiting, state.running)]
    return dataclasses.replace(state, waiting=twins[0], running=tuple(twins[1]))


def _twin(request):
    twin = Request(request.id, request.prompt, request.sampling, request.arrival, cache_salt=request.cache_salt)
    twin.output, twin.blocks = copy.copy(request.output), list(request.blocks)
    twin.computed, twin.preemptions = request.computed, request.preemptions
    twin.drafts, twin.parent = request.drafts, request.parent
    twin.priority, twin.deadline = request.priority, request.deadline
    return twin


class Lawful:
    """A policy that is watched: pure, deterministic, within its limits, and true to the promises of its name.

    `order` and `victim` are how it was composed, `max_wait` its bound on waiting.
    """

    def __init__(self, policy, order="fcfs", victim="last", max_wait=None):
        self.policy, self.name, self.returns_together, self.behind = policy, policy.name, policy.returns_together, policy.behind
        self.order, self.victim, self.max_wait = order, victim, max_wait
        self.schedules = []

    def step(self, state):
        before = frozen(state)
        places = [request.number for request in (*state.running, *state.waiting) if request.parent is None]
        if (self.order, self.victim) == ("fcfs", "last"):
            assert places == sorted(places), "who came first is served first, preempted or not; forks wait for their parent's prompt"
        schedule = self.policy.step(state)
        assert frozen(state) == before, "the policy wrote its state"
        assert self.policy.step(without_identity(state)) == schedule, "equal states must give equal schedules"
        verify(schedule, state)
        self._keeps_its_promises(schedule, state)
        self.schedules.append(schedule)
        return schedule

    def _turns(self, state):
        """The ids of those who wait, in the order in which they are to be admitted, by the plainest definition of it."""

        def turn(request):
            begun, work = request.preemptions == 0, request.known + min(256, request.sampling.max_tokens - len(request.output))
            if self.order == "fcfs":
                return ()
            if self.max_wait is not None and state.now - request.arrival > self.max_wait:
                return (0,)
            if self.order == "sjf":
                return (1, begun, work)
            if self.order == "priority":
                return (1, request.priority)
            if self.order == "prefix":
                age = Fraction(state.now - request.arrival, self.max_wait) if self.max_wait else 0
                return (1, begun, -(state.memory.hit(request).tokens + request.known * age))
            if request.deadline is None:
                return (1, begun, 2)
            tokens, duration = max(state.measured) if state.measured else (1, 0)
            return (1, begun, state.now + request.known * duration // tokens > request.deadline, request.deadline)

        return [request.id for request in sorted(state.waiting, key=turn)]

    def _keeps_its_promises(self, schedule, state):
        scheduled = [entry.request_id for entry in schedule.entries]
        preempted = {preemption.request_id for preemption in schedule.preempted}
        running = {request.id: request for request in state.running}
        waiting = {request.id: request for request in state.waiting}
        admitted = [request_id for request_id in scheduled if request_id not in running]
        queue = self._turns(state)
        assert admitted == queue[: len(admitted)], "everybody in his turn"
        assert not (preempted and admitted), "nobody is admitted while somebody is thrown out"
        for request in state.running:  # a decode never starves
            if is_decode(request) and request.id not in preempted:
                assert request.id in scheduled
        assert all(hold.request_id not in scheduled for hold in schedule.held)
        if state.waiting and not admitted:
            assert {queue[0], state.waiting[0].id} & {hold.request_id for hold in schedule.held}, "who waits is told why"
        # The victims are the last admitted (of the lowest class), and the first of them goes to the front of the queue last.
        order = [request.id for request in state.running]
        if self.victim == "last":
            worst = sorted(order[1:], key=lambda name: (running[name].priority, order.index(name)))[len(order) - 1 - len(preempted) :]
            assert preempted == set(worst)
        assert [p.request_id for p in schedule.preempted] == [name for name in order[::-1] if name in preempted]
        assert not (preempted and order[0] in preempted), "the first admitted goes on to its end"
        if self.name in ("orca", "request-level"):
            assert not preempted
            for entry in schedule.entries:
                request = running.get(entry.request_id) or waiting[entry.request_id]
                assert entry.start + entry.count == request.known + entry.drafts, "prompts are not chunked"
                assert entry.blocks == state.limits.blocks_for(request.max_length)
        if self.name == "request-level" and running:
            assert not admitted
        if any(entry.drafts for entry in schedule.entries):  # a draft costs nobody his turn
            assert not preempted or all(entry.reason is Reason.DECODE for entry in schedule.entries if entry.drafts)
            assert all(hold.reason is not Reason.NO_BUDGET or hold.request_id not in running for hold in schedule.held)
        for entry in schedule.entries:
            request = running.get(entry.request_id) or waiting[entry.request_id]
            if self.name == "vllm":
                wanted = state.limits.blocks_for(entry.start + entry.count)
                assert entry.blocks == max(wanted, len(request.blocks)), "waste is less than a block, but for drafts that were wrong"
            if self.name == "sarathi":
                wanted = state.limits.blocks_for(request.known + entry.drafts)
                assert entry.blocks == max(wanted, len(request.blocks)), "waste is less than a block of what is known"


def request(name, prompt, max_tokens, **sampling):
    return Request(str(name), tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))
