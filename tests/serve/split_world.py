"""A prefill and a decode engine in this process, stepped by hand: disaggregation with nothing between the workers but their messages."""

from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory

from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.dispatcher import Dispatcher
from armillary.serve.fleet.handover import SharedFolder
from armillary.serve.fleet.host import ReplicaHost
from armillary.serve.fleet.kv_files import KVFiles
from armillary.serve.fleet.live import Live
from armillary.serve.policies.routing.probation import Probation


class Split:
    """`Engine`'s surface over two engines that `build` makes. Messages wait in a queue, so nobody is called while calling."""

    def __init__(self, build, constrain=None):
        self._constrain = constrain
        self._folder = TemporaryDirectory()
        self.engines = [build(), build()]
        first = self.engines[0]
        self.config, self.limits, self.clock, self.policy = first.config, first.limits, first.clock, first.policy
        self.dispatcher = Dispatcher(
            FleetConfig(prefill_workers=1, decode_workers=1),
            self.config,
            self.limits,
            self.clock,
            lambda request, event: request.on_event(event) if request.on_event is not None else None,
            eos_ids=first.eos_ids,
            probation=Probation(silence=1 << 60),
            exchange=SharedFolder(Path(self._folder.name)),
        )
        self._mail = deque()
        for member, engine in zip(self.dispatcher.members, self.engines, strict=True):
            self._connect(member, engine)
        self._live = Live(self.dispatcher)

    def _connect(self, member, engine):
        files = KVFiles(engine.executor.forward, self.limits.block_size)
        host = ReplicaHost(engine, lambda message: self._mail.append((self.dispatcher.heard, member, message)), files, self._constrain)

        class Link:
            def send(link, message):
                self._mail.append((lambda _, message: host.heard(message), member, message))

        self.dispatcher.joined(member, Link())

    def _deliver(self):
        while self._mail:
            receive, member, message = self._mail.popleft()
            receive(member, message)

    def submit(self, request):
        self.dispatcher.submit(request)

    def cancel(self, request_id):
        return self.dispatcher.cancel(request_id)

    def step(self):
        self._deliver()
        busy = [engine.step() for engine in self.engines]
        self._deliver()
        return any(busy) or bool(self.dispatcher.tickets)

    def check(self):
        for engine in self.engines:
            engine.check()
        assert not any(Path(self._folder.name).iterdir())

    @property
    def stats(self):
        for member, engine in zip(self.dispatcher.members, self.engines, strict=True):
            member.pulse = engine.snapshot()
        return self._live.stats()

    def snapshot(self):
        return {"blocks": {"used": sum(engine.snapshot()["blocks"]["used"] for engine in self.engines)}}

    def explain(self, request_id):
        return [line for engine in self.engines for line in engine.explain(request_id) or ()]

    def stop(self):
        for engine in self.engines:
            engine.stop()
        self._folder.cleanup()
