"""What iterations of an engine cost on this machine: measured as it is configured, kept in the machine's profile, read back as a cost model."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.core.units import S
from armillary.serve.executors.virtual import batch_of
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Entry, Outcome, Plan, Reason, Schedule
from armillary.sim.batch import Batch
from armillary.sim.costs.fitting import Sample, fit

if TYPE_CHECKING:
    from armillary.cluster.machine import Machine
    from armillary.cluster.profile import Profile
    from armillary.models.config import ModelConfig
    from armillary.serve.config import EngineConfig
    from armillary.serve.engine import Engine
    from armillary.serve.executors.local import LocalExecutor
    from armillary.sim.costs.fitted import Fitted

PROMPTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
PIECES: Final = (16, 64, 128, 256, 512)  # of prompts, after ...
CACHED: Final = (256, 1024, 4096)  # ... computed tokens
SEQUENCES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS: Final = (16, 128, 512, 1024, 4096)
PAIRS: Final = 1 << 19  # of queries and cached tokens in a piece
MIXED: Final = 24  # batches of prompts and decodes
MOST: Final = 16_384  # tokens of the KV pool that plans are laid in
ROUNDS: Final = 2  # at least, of which each plan has the median
SERVICE: Final = 0.6  # share of the time in which requests are served as they come
SPELLS: Final = 24  # of that, each with a load of its own

Row = dict[str, float | str]
Progress = Callable[[str, float], None]
"""What is being measured, and the share of it that is done."""

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """A sequence's share of a plan: `query` tokens after `cached` ones. A decode has one, and the next token is drawn."""

    query: int
    cached: int
    sample: bool = False
    decode: bool = False


def identity(model: ModelConfig, config: EngineConfig, threads: int) -> dict[str, str]:
    """What the costs of an iteration depend on, in words: two engines of one identity cost the same on one machine."""
    return _of_model(model) | {
        "weights": config.quantize,
        "kv_dtype": config.kv_dtype,
        "kv_policy": config.kv_policy,
        "backend": config.backend,
        "block_size": str(config.block_size),
        "deterministic": str(config.deterministic),
        "threads": str(threads),
    }


def _of_model(model: ModelConfig) -> dict[str, str]:
    return {
        "architecture": f"{model.architecture}, {model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}",
        "parameters": str(model.parameters()),
    }


def section(model: str, known: Mapping[str, str]) -> str:
    """The name of an engine's measurements in a profile."""
    weights = "fp32" if known["weights"] == "none" else known["weights"]
    return f"{model}, {weights} weights, {known['kv_dtype']} cache, {known['threads']} threads"


def measure(engine: Engine, vocabulary: int, *, seconds: float = 30.0, seed: int = 0, progress: Progress | None = None) -> list[Sample]:
    """Plans of all shapes through the executor, then requests as they come to the whole engine; about `seconds`, at least two rounds of plans.

    The engine must be new and idle: what plans leave in its KV pool belongs to nobody. Each plan is measured in turn with the others, so
    that no shape has a quiet moment to itself. Raises InputError for an engine whose iterations cost more than their shapes tell.
    """
    config = engine.config
    if engine.stats.iterations or engine.alive:
        raise InputError("the engine has served already: its KV pool is not free", "calibrate a new one")
    told = {
        "speculate": config.speculate != "off", "offload": config.offload is not None, "sparsity": config.sparsity is not None,
        "async_scheduling": config.async_scheduling == "on",
    }  # fmt: skip
    if wrong := [name for name, there in told.items() if there]:
        raise InputError(f"with {wrong[0]} an iteration's cost depends on more than its shape", f"calibrate without {wrong[0]}")
    if config.kv_policy != "dense":
        raise InputError(f"kv_policy {config.kv_policy} reads what its policy says, not all", "calibrate with --kv-policy dense")
    tell = progress if progress is not None else lambda what, share: None
    generator = random.Random(seed)
    executor: LocalExecutor = engine.executor  # type: ignore[assignment]
    pool = _Pool(engine, vocabulary, generator, MOST)
    tell("filling the KV pool", 0.0)
    pool.fill(executor)
    plans = [pool.plan(shapes) for shapes in _grid(pool, generator)]
    for plan in sorted(plans, key=lambda plan: -plan.schedule.tokens)[:3]:  # buffers grow, pages are touched
        executor.run(plan)
    taken: list[list[int]] = [[] for _ in plans]
    began, order, rounds = time.monotonic(), list(range(len(plans))), 0
    limit = seconds * (1 - SERVICE)
    while rounds < ROUNDS or (time.monotonic() - began) * (rounds + 1) / rounds < limit:
        generator.shuffle(order)
        for done, place in enumerate(order):
            outcome = executor.run(plans[place])
            taken[place].append(outcome.end - outcome.start)
            if done % 8 == 0:
                tell("plans", min(0.99, max((time.monotonic() - began) / limit, (rounds + done / len(order)) / ROUNDS / 2)))
        rounds += 1
    samples = [Sample(batch_of(plan), round(median(found))) for plan, found in zip(plans, taken, strict=True)]
    return samples + _service(engine, vocabulary, seconds * SERVICE, generator, tell)


def warm(engine: Engine, vocabulary: int) -> None:
    """Writes a new engine's whole KV pool, as it is after hours of service: the first to touch a page waits for the system to give it."""
    pool = _Pool(engine, vocabulary, random.Random(0), engine.limits.total_blocks * engine.limits.block_size)
    pool.fill(engine.executor)  # type: ignore[arg-type]


def rows_of(about: Mapping[str, str], samples: Sequence[Sample]) -> tuple[Row, ...]:
    """A profile's section: a row that says of what the others are, then one a measured iteration."""
    rows: list[Row] = [{"kind": "about", **about}]
    for sample in samples:
        batch = sample.batch
        rows.append(
            {
                "kind": "engine" if sample.host is not None else "executor",
                "prompts": " ".join(f"{query}@{cached}" for query, cached in batch.prompts),
                "decodes": float(batch.decodes),
                "cached": float(batch.cached),
                "sampled": float(batch.sampled),
                "ns": float(sample.ns),
                **({} if sample.host is None else {"host": float(sample.host)}),
            }
        )
    return tuple(rows)


def samples_of(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[Sample]]:
    """What `rows_of` wrote. Raises FormatError."""
    try:
        if not rows or rows[0]["kind"] != "about":
            raise KeyError("about")
        samples = []
        for row in rows[1:]:
            prompts = tuple((int(query), int(cached)) for query, cached in (piece.split("@") for piece in row["prompts"].split()))
            counts = [int(row[name]) for name in ("decodes", "cached", "sampled")]
            if min(0, *counts, *(min(query - 1, cached) for query, cached in prompts)) < 0 or not (prompts or counts[0]):
                raise ValueError("counts below 0, or nothing at all")
            samples.append(
                Sample(
                    Batch(prompts, counts[0], counts[1], counts[2]), int(row["ns"]), int(row["host"]) if row["kind"] == "engine" else None
                )
            )
        return {name: str(value) for name, value in rows[0].items() if name != "kind"}, samples
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise FormatError(f"the profile's engine section is damaged ({error})", "run armillary calibrate --model again") from error


def formats(profile: Profile, model: ModelConfig) -> tuple[str, ...]:
    """The formats of weights in which engines of `model` were measured."""
    of_model = _of_model(model)
    found = [samples_of(rows)[0] for rows in profile.engine.values()]
    return tuple(dict.fromkeys(about["weights"] for about in found if of_model.items() <= about.items()))


def cost_model(profile: Profile, model: ModelConfig, config: EngineConfig, machine: Machine | None = None) -> Fitted:
    """The costs of an engine of `model` as `config` has it, as they were measured; threads that `config` leaves open may be any.

    Raises NotFoundError where only other models or formats were measured. Warns when `machine` is not the one that was measured, and when
    that was not quiet.
    """
    others: list[tuple[int, str]] = []
    for name, rows in profile.engine.items():
        about, samples = samples_of(rows)
        threads = int(about.get("threads", "1")) if config.threads is None else config.threads
        wanted = identity(model, config, threads)
        apart = [
            f"{key.replace('_', ' ')} {about.get(key, 'unknown')}, not {value}" for key, value in wanted.items() if about.get(key) != value
        ]
        if not apart:
            if machine is not None and (differs := profile.differs(machine)):
                warnings.warn(f"the costs were measured on another machine ({'; '.join(differs)})", stacklevel=2)
            if disturbed := about.get("disturbed"):
                warnings.warn(f"the costs were measured beside other work ({disturbed})", stacklevel=2)
            return fit(name, samples)
        others.append((len(apart), f"{name}: {'; '.join(apart)}"))
    have = f"the closest is {min(others)[1]}" if others else "it has measured no engine"
    raise NotFoundError(f"the profile has no such engine; {have}", "run armillary calibrate --model with the same options as serve")


class _Pool:
    """Block tables for plans: each sequence has blocks of its own, one after another."""

    def __init__(self, engine: Engine, vocabulary: int, generator: random.Random, most: int) -> None:
        self.size, self.generator, self.vocabulary = engine.limits.block_size, generator, vocabulary
        self.tokens = min(most // self.size, engine.limits.total_blocks) * self.size
        self.context = min(self.tokens, engine.config.context or self.tokens)
        self.batch, self.seats = min(engine.limits.max_batch_tokens, self.context), engine.limits.max_running

    def fits(self, shapes: Sequence[Shape]) -> bool:
        used = sum(-(-(shape.query + shape.cached) // self.size) * self.size for shape in shapes)
        longest = max(shape.query + shape.cached for shape in shapes)
        return used <= self.tokens and longest < self.context and sum(shape.query for shape in shapes) <= self.batch

    def plan(self, shapes: Sequence[Shape]) -> Plan:
        entries, requests, tables, first = list[Entry](), list[Request](), list[tuple[int, ...]](), 0
        for number, shape in enumerate(shapes):
            count = shape.query + shape.cached
            blocks = -(-count // self.size)
            known = tuple(self.generator.randrange(self.vocabulary) for _ in range(count + (not shape.sample)))
            request = Request(f"{number}", known[:-1] if shape.decode else known, _GREEDY)
            request.output = [known[-1]] if shape.decode else []
            reason = Reason.DECODE if shape.decode else Reason.PROMPT
            entries.append(Entry(request.id, shape.cached, shape.query, shape.sample, blocks, reason))
            requests.append(request)
            tables.append(tuple(range(first, first + blocks)))
            first += blocks
        return Plan(Schedule(0, tuple(entries)), tuple(requests), tuple(tables))

    def fill(self, executor: LocalExecutor) -> None:
        """Keys and values of a real text everywhere: pages that nobody wrote are faster to read than any others."""
        length, done = max(self.size, min(512, self.context - 1) // self.size * self.size), 0
        while done < length:
            count = min(self.batch, length - done)
            plan = self.plan([Shape(count, done)])
            executor.run(plan)
            done += count
        own, blocks = length // self.size, self.tokens // self.size
        executor.forward.copy_blocks([(block % own, block) for block in range(own, blocks)])


def _grid(pool: _Pool, generator: random.Random) -> Iterator[list[Shape]]:
    """Plans that tell the curves apart, as far as they fit."""
    decodes = [count for count in SEQUENCES if count <= pool.seats]
    found = [[Shape(query, 0, sample)] for query in PROMPTS for sample in (False, True)]
    found += [[Shape(query, cached)] for query in PIECES for cached in CACHED if query * cached <= PAIRS]
    found += [[Shape(1, context, True, True)] * count for count in decodes for context in CONTEXTS]
    for _ in range(MIXED):
        count = generator.choice(decodes)
        longest = max(17, min(768, pool.context // 2, pool.tokens // (2 * count)))
        shapes = [Shape(1, generator.randint(16, longest), True, True) for _ in range(count)]
        for _ in range(generator.randint(1, 3)):
            shapes.append(
                Shape(generator.randint(8, max(9, min(256, pool.batch // 4))), generator.choice((0, 0, 64, 320)), generator.random() < 0.7)
            )
        found.append(shapes)
    return (shapes for shapes in found if pool.fits(shapes))


class _Noting:
    """An executor that keeps the last plan's shape and how long it took, ns."""

    def __init__(self, inner: LocalExecutor) -> None:
        self.inner, self.batch, self.ns = inner, Batch(), 0

    def run(self, plan: Plan) -> Outcome:
        outcome = self.inner.run(plan)
        self.batch, self.ns = batch_of(plan), outcome.end - outcome.start
        return outcome


def _service(engine: Engine, vocabulary: int, seconds: float, generator: random.Random, tell: Progress) -> list[Sample]:
    """Requests that come at random, as they do in service: whole iterations, with what the host does between them.

    Now one is there in a while and the threads sleep, now many wait: gaps between arrivals follow from how many shall be there and how long they
    stay (Little's law). Each iteration has one of several budgets of tokens, so that pieces of prompts and decodes meet in all proportions, and
    no shape has a time of its own in which the machine may have been slower.
    """
    noting = _Noting(engine.executor)  # type: ignore[arg-type]
    limits, engine.executor = engine.limits, noting
    samples: list[Sample] = []
    most = min(limits.max_running, 32)
    # Sequences that fill the pool together would be preempted.
    longest = max(8, min(256, (engine.config.context or 256) // 2, limits.total_blocks * limits.block_size // (3 * most)))
    budgets = [max(8, limits.max_batch_tokens >> halved) for halved in range(4)]
    there: list[Request] = []
    stay, wanted, ends, number = 1e-2 * S, 1.0, 0.0, 0
    began, next_at = time.monotonic(), time.perf_counter_ns()
    try:
        while (passed := time.monotonic() - began) < seconds or len(samples) < 20:
            if passed >= ends:
                ends = passed + seconds / SPELLS
                wanted = 0.5 * (2 * most) ** generator.random()
                tell("requests as they come", min(0.99, passed / seconds))
            now = time.perf_counter_ns()
            while next_at <= now and len(there) < 2 * most:
                prompt = tuple(generator.randrange(vocabulary) for _ in range(generator.randint(4, longest)))
                answer = SamplingParams(max_tokens=generator.randint(4, max(5, longest // 4)), temperature=0.0, ignore_eos=True)
                there.append(Request(f"calibration-{number}", prompt, answer))
                engine.submit(there[-1])
                number += 1
                next_at += round(generator.expovariate(1.0) * stay / wanted)
            next_at = max(next_at, now)
            if not there:
                time.sleep(min(next_at - now, S) / S)
                continue
            engine.limits = replace(limits, max_batch_tokens=generator.choice(budgets))
            start = time.perf_counter_ns()
            engine.step()
            took = time.perf_counter_ns() - start
            samples.append(Sample(noting.batch, noting.ns, max(0, took - noting.ns)))
            for request in there:
                if request.finished is not None and request.arrival is not None:
                    stay += 0.1 * (request.finished - request.arrival - stay)
            there = [request for request in there if request.finished is None]
    finally:
        engine.executor, engine.limits = noting.inner, limits
        engine.stop()
    return samples[4:]  # the first ones warm it up
