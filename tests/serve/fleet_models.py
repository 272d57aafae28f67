"""What the replica processes of these tests build: named by "module:function", as `armillary serve` names its own."""

import time

from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.request import TokenLogprob
from armillary.serve.schedule import Outcome


def tiny_engine(engine, seed=0):
    """A tiny random model's engine, and words for it."""
    from models import loaded, tiny

    from armillary.serve.llm import build_engine

    return build_engine(loaded(tiny(seed=seed)), EngineConfig(**engine)), "a tiny random model"


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
    return Engine(Clockwork(), EngineConfig(**engine), eos_ids=[96]), "clockwork"
