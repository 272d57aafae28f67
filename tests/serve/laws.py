"""The plainest loop, an executor whose cache is a table of integers, and a policy wrapper that asserts the laws of scheduling."""

import copy
import zlib

from armillary.core.clock import VirtualClock
from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request, SamplingParams, TokenLogprob
from armillary.serve.schedule import Outcome
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
        for entry, request, table in rows:
            assert len(table) == entry.blocks
            for position in range(entry.start, entry.start + entry.count):
                self.slots[self._slot(table, position)] = (position, request.token(position))
        sampled = []
        for entry, _, table in rows:
            cached = [self.slots[self._slot(table, position)] for position in range(entry.start + entry.count)]
            sampled.append(TokenLogprob(next_token(cached)) if entry.sample else None)
        return Outcome(tuple(sampled), ((),) * len(rows), start, self.clock.now())

    def _slot(self, table, position):
        return table[position // self.block_size] * self.block_size + position % self.block_size


def frozen(state):
    """Everything a policy could have written, as a value."""
    waiting, running = ([(id(r), *_values(r)) for r in queue] for queue in (state.waiting, state.running))
    return waiting, running, state.free_blocks, state.index, state.limits


def _values(request):
    return tuple(
        copy.copy(getattr(request, name)) for name in ("id", "prompt", "sampling", "arrival", "output", "computed", "blocks", "preemptions")
    )


def without_identity(state):
    """A state that is equal in values and shares nothing with `state`."""
    twins = [[_twin(r) for r in queue] for queue in (state.waiting, state.running)]
    return type(state)(state.index, twins[0], tuple(twins[1]), state.free_blocks, state.limits, state.memory)


def _twin(request):
    twin = Request(request.id, request.prompt, request.sampling, request.arrival, cache_salt=request.cache_salt)
    twin.output, twin.blocks = list(request.output), list(request.blocks)
    twin.computed, twin.preemptions = request.computed, request.preemptions
    return twin


class Lawful:
    """A policy that is watched: pure, deterministic, within its limits, and true to the promises of its name."""

    def __init__(self, policy):
        self.policy, self.name, self.returns_together = policy, policy.name, policy.returns_together
        self.schedules = []
        self.arrived = {}  # request id -> its place in the order of arrival

    def step(self, state):
        before = frozen(state)
        places = [self.arrived.setdefault(request.id, len(self.arrived)) for request in (*state.running, *state.waiting)]
        assert places == sorted(places), "who came first is served first, preempted or not"
        schedule = self.policy.step(state)
        assert frozen(state) == before, "the policy wrote its state"
        assert self.policy.step(without_identity(state)) == schedule, "equal states must give equal schedules"
        verify(schedule, state)
        self._keeps_its_promises(schedule, state)
        self.schedules.append(schedule)
        return schedule

    def _keeps_its_promises(self, schedule, state):
        scheduled = [entry.request_id for entry in schedule.entries]
        preempted = {preemption.request_id for preemption in schedule.preempted}
        running = {request.id: request for request in state.running}
        admitted = [request_id for request_id in scheduled if request_id not in running]
        queue = [request.id for request in state.waiting]
        assert admitted == queue[: len(admitted)], "first come, first served"
        assert not (preempted and admitted), "nobody is admitted while somebody is thrown out"
        for request in state.running:  # a decode never starves
            if is_decode(request) and request.id not in preempted:
                assert request.id in scheduled
        assert all(hold.request_id not in scheduled for hold in schedule.held)
        if state.waiting and not admitted:
            assert queue[0] in {hold.request_id for hold in schedule.held}, "who waits is told why"
        # The victims are the last admitted, and the first of them goes to the front of the queue last.
        order = [request.id for request in state.running]
        assert [p.request_id for p in schedule.preempted] == order[::-1][: len(preempted)]
        if self.name in ("orca", "request-level"):
            assert not preempted
            for entry in schedule.entries:
                request = running.get(entry.request_id) or state.waiting[admitted.index(entry.request_id)]
                assert entry.start + entry.count == request.known, "prompts are not chunked"
                assert entry.blocks == state.limits.blocks_for(request.max_length)
        if self.name == "request-level" and running:
            assert not admitted
        for entry in schedule.entries:
            request = running.get(entry.request_id) or state.waiting[admitted.index(entry.request_id)]
            if self.name == "vllm":
                assert entry.blocks == state.limits.blocks_for(entry.start + entry.count), "waste is less than a block"
            if self.name == "sarathi":
                assert entry.blocks == state.limits.blocks_for(request.known), "waste is less than a block of what is known"


def request(name, prompt, max_tokens, **sampling):
    return Request(str(name), tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))
