"""A fleet in virtual time: real engines with executors in virtual time, the real dispatcher, and messages that take as long as a test says."""

import heapq
import itertools
from collections import Counter
from pathlib import Path

from timed import TimedExecutor, linear_cost

from armillary.core.clock import VirtualClock
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.dispatcher import Dispatcher
from armillary.serve.fleet.host import ReplicaHost
from armillary.serve.policies.routing.probation import Probation
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Limits

PATIENT = Probation(silence=1 << 60)


class Replica:
    """An engine that runs whenever it has work; `speed` slows it, `stopped` is a SIGSTOP."""

    def __init__(self, world, member, cost):
        self.world, self.member, self.cost = world, member, cost
        self.slow = 1.0
        self.generation = 0
        self.hears = self.is_heard = 0
        self.boot()

    def boot(self):
        self.generation += 1
        self.clock = VirtualClock(self.world.clock.now())
        executor = TimedExecutor(self.clock, token=self.world.token, cost=lambda plan: round(self.slow * self.cost(plan)))
        self.engine = Engine(executor, self.world.engine, clock=self.clock, eos_ids=self.world.eos)
        self.speaking = None  # when what is being said is said
        self.host = ReplicaHost(self.engine, self.say, self.world.files)
        self.stopped, self.mail, self.busy = False, [], False

    def send(self, message):  # member.Link
        generation = self.generation
        self.hears = max(self.hears, self.world.clock.now() + self.world.delay())  # in order, as on a socket
        self.world.at(self.hears, lambda: self.hear(generation, message))

    def hear(self, generation, message):
        if generation != self.generation:
            return
        if self.stopped:
            self.mail.append(message)
            return
        self.speaking = self.world.clock.now()
        self.host.heard(message)
        self.speaking = None
        self.go()

    def say(self, message):
        at = self.speaking if self.speaking is not None else self.clock.now()
        generation = self.generation
        if message["op"] == "started":
            self.world.started.append((self.member.index, message["attempt"]))

        def arrive():
            if generation == self.generation:
                self.world.dispatcher.heard(self.member, message)

        self.is_heard = max(self.is_heard, at + self.world.delay())
        self.world.at(self.is_heard, arrive)

    def go(self):
        if self.busy or self.stopped:
            return
        now = self.world.clock.now()
        if self.clock.now() < now:
            self.clock.advance_to(now)
        if self.engine.step():
            self.busy = True
            generation = self.generation
            self.world.at(self.clock.now(), lambda: self.rest(generation))

    def rest(self, generation):
        if generation == self.generation:
            self.busy = False
            self.go()

    def stop(self):
        self.stopped = True

    def resume(self):
        self.stopped = False
        mail, self.mail = self.mail, []
        for message in mail:
            self.hear(self.generation, message)
        self.world.dispatcher.heard(self.member, {"op": "pulse"})
        self.go()

    def kill(self):
        self.boot()
        self.stopped = True
        self.world.dispatcher.lost(self.member, "signal 9")

    def restart(self):
        self.boot()
        self.world.dispatcher.joined(self.member, self)


class CountedFiles:
    """`host.Files` whose files hold how many tokens they stand for; counts how often each is read."""

    def __init__(self):
        self.written, self.reads = [], Counter()

    def free(self, place):
        pass

    def leave(self, path):
        return Left(self, path)

    def fetch(self, path, tokens, size):
        assert size == 4 * tokens
        assert Path(path).read_text() == str(tokens), "it is there before anybody is told"
        return Fetched(self, path, tokens)


class Left:
    def __init__(self, files, path):
        self.files, self.path, self.left = files, path, None

    def write(self, table, tokens):
        Path(self.path).write_text(str(tokens))
        self.files.written.append(self.path)
        self.left = {"tokens": tokens, "bytes": 4 * tokens}


class Fetched:
    def __init__(self, files, path, tokens):
        self.files, self.path, self.tokens = files, path, tokens

    def into(self, table):
        self.files.reads[self.path] += 1

    def close(self):
        pass


class World:
    """`run` moves time until nothing is left to do. `delay()` is how long a message takes (ns)."""

    def __init__(self, fleet, engine=None, *, cost=None, delay=lambda: 0, probation=PATIENT, token=None, eos=(), tick=0, **options):
        self.clock = VirtualClock()
        self.engine = EngineConfig(**{"kv_blocks": 400, "block_size": 4, "max_batch_tokens": 64, "max_running": 8} | (engine or {}))
        self.eos, self.delay, self.tick = eos, delay, tick
        self.token = token or (lambda request, position: (position * 7 + sum(request.prompt)) % 50)
        self._heap, self._order = [], itertools.count()
        limits = Limits(self.engine.block_size, self.engine.kv_blocks, self.engine.max_batch_tokens, self.engine.max_running)
        self.events, self.started = {}, []
        self.files = CountedFiles()
        self.dispatcher = Dispatcher(
            FleetConfig(**fleet), self.engine, limits, self.clock, self._announce, eos_ids=eos, probation=probation, look=0, **options
        )
        cost = cost or linear_cost(100, 10)
        self.replicas = [Replica(self, member, cost) for member in self.dispatcher.members]
        for replica in self.replicas:
            self.dispatcher.joined(replica.member, replica)

    def _announce(self, request, event):
        self.events.setdefault(request.id, []).append(event)

    def at(self, time, action):
        heapq.heappush(self._heap, (max(time, self.clock.now()), next(self._order), action))

    def later(self, duration, action):
        self.at(self.clock.now() + duration, action)

    def submit(self, name, prompt, max_tokens, at=None, parent=None, **sampling):
        request = Request(str(name), tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling), parent=parent)
        if at is None:
            self.dispatcher.submit(request)
        else:
            self.at(at, lambda: self.dispatcher.submit(request))
        return request

    def run(self, until=None):
        ticked = self.clock.now()
        while self._heap and (until is None or self._heap[0][0] <= until):
            time, _, action = heapq.heappop(self._heap)
            while self.tick and ticked + self.tick <= time:
                ticked += self.tick
                self.clock.advance_to(max(ticked, self.clock.now()))
                self.dispatcher.tick()
            self.clock.advance_to(max(time, self.clock.now()))
            action()
        if until is None:
            assert not self.dispatcher.tickets
            for replica in self.replicas:
                if not replica.stopped:
                    replica.engine.check()

    def expected(self, request):
        """What a single engine says."""
        output = []
        for position in range(len(request.prompt), len(request.prompt) + request.sampling.max_tokens):
            output.append(self.token(request, position))
            if output[-1] in self.eos:
                break
        return output

    def check(self, request):
        """The answer is the single engine's: each token once, one end, the end last."""
        events = self.events[request.id]
        assert [event.token for event in events] == self.expected(request) == request.output
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
