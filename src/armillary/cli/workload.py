"""What comes in a simulation, as flags: single requests, a recorded trace, or conversations; and what came, in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from armillary.cli.settings import WORKLOAD, Acceptance, Variation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from armillary.serve.request import Request
    from armillary.serve.simulation.phases import Phases
    from armillary.serve.simulation.recorder import Result
    from armillary.serve.simulation.scenario import Scenario
    from armillary.serve.workload.requests import Source
    from armillary.serve.workload.sessions import Conversations
    from armillary.serve.workload.trace_file import Recorded

_REQUESTS: Final = 1000
_LENGTHS: Final = "conversation"
_TURN: Final = "200+300"
_TURNS: Final = "4"
_THINK: Final = "20s"


def _of_sessions(text: str) -> Any:
    return Parameter(group=WORKLOAD, help=text, show_default=False)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What comes."""

    requests: Annotated[
        int | None,
        Parameter(group=WORKLOAD, help="How many at most (default: 1000; all of a trace, all turns of all sessions).", show_default=False),
    ] = None
    rate: Annotated[
        float | None,
        Parameter(
            group=WORKLOAD, help="Requests or sessions a second, over all replicas (default: 1 request a replica).", show_default=False
        ),
    ] = None
    variation: Variation = 1.0
    lengths: Annotated[
        str | None,
        Parameter(
            group=WORKLOAD,
            help=f"conversation (default), code, summarization (fitted to published traces), or PROMPT+ANSWER tokens; of each turn with --sessions (default: {_TURN}).",
            show_default=False,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        Parameter(
            group=WORKLOAD,
            help="Recorded requests instead: CSV (Vidur, Azure, BurstGPT), Mooncake, our access log, our trace.json.",
            show_default=False,
        ),
    ] = None
    speed: Annotated[float, Parameter(group=WORKLOAD, help="How many times as fast the trace is replayed.")] = 1.0
    cut: Annotated[
        bool, Parameter(group=WORKLOAD, negative=(), help="Shorten requests of the trace that exceed the context, answers first.")
    ] = False
    acceptance: Acceptance = None
    adapters: Annotated[
        int | None, Parameter(group=WORKLOAD, show_default=False, help="So many LoRA adapters, one of which each request asks for.")
    ] = None
    adapter_rank: Annotated[int | None, Parameter(group=WORKLOAD, show_default=False, help="Their rank (default: 16).")] = None
    adapter_skew: Annotated[
        float | None,
        Parameter(
            group=WORKLOAD, show_default=False, help="The i-th is asked for in proportion to i to the minus this (default: 1; 0 is evenly)."
        ),
    ] = None
    sessions: Annotated[
        int | None, _of_sessions("So many conversations instead: each turn asks with all before it, some time after it was answered.")
    ] = None
    turns: Annotated[
        str | None, _of_sessions(f"Turns of a session: their mean, such as 5, or bounds such as 2..6 (default: {_TURNS}).")
    ] = None
    think: Annotated[
        str | None,
        _of_sessions(f"Time from an answer's end to the next turn: its mean, such as 20s, or bounds such as 5s..1min (default: {_THINK})."),
    ] = None
    system_prompt: Annotated[
        str | None, _of_sessions("Tokens that all sessions begin with, such as 1000, or 1000x8: one of eight such beginnings (default: 0).")
    ] = None


class Coming:
    """A workload made of its flags: `source` for the simulation, and after it what came.

    Raises InputError for flags that say nothing together, naming them.
    """

    def __init__(self, flags: Workload, simulated: Scenario | Phases) -> None:
        from armillary.core.errors import InputError
        from armillary.serve.simulation.phases import Phases

        first = simulated.prefill if isinstance(simulated, Phases) else simulated
        self.flags, self.context, self.seed = flags, first.context, first.config.seed
        self.replicas = 1 if isinstance(simulated, Phases) else simulated.replicas
        if flags.requests is not None and flags.requests < 1:
            raise InputError(f"{flags.requests} requests are no workload", "give at least 1", field="requests")
        if flags.sessions is None:
            for name in ("turns", "think", "system_prompt"):
                if getattr(flags, name) is not None:
                    raise InputError(
                        f"{name} is of sessions, and single requests come", "give --sessions, such as --sessions 200", field=name
                    )
        elif flags.trace is not None:
            raise InputError("a trace is replayed as it came, and sessions are asked for", "give one of them", field="sessions")
        for name, usual in (("speed", 1.0), ("cut", False)):
            if flags.trace is None and getattr(flags, name) != usual:
                raise InputError(f"{name} is of a trace, and none is given", "give --trace, or leave it out", field=name)
        for name in ("rate", "lengths"):
            if flags.trace is not None and getattr(flags, name) is not None:
                raise InputError(f"a trace is replayed as it came, and {name} is given", "give --speed, or leave the trace out", field=name)
        self.recorded: Recorded | None = None
        self.conversations = self._conversations() if flags.sessions is not None else None
        self.source: Source | Iterable[Request] = self._with_adapters(self.conversations or self._single())

    def check(self) -> None:
        """Raises what is wrong with the first request, which is gone then."""
        if self.conversations is None:
            next(iter(self.source), None)  # type: ignore[arg-type]

    def _with_adapters(self, source: Source | Iterable[Request]) -> Source | Iterable[Request]:
        from armillary.serve.workload.adapters import Adapted, Popularity
        from armillary.serve.workload.requests import Source

        flags = self.flags
        if flags.adapters is None:
            return source
        popularity = Popularity(flags.adapters, flags.adapter_skew if flags.adapter_skew is not None else 1.0, self.seed)
        return Adapted(source, popularity) if isinstance(source, Source) else popularity.each(source)

    def _single(self) -> Iterable[Request]:
        from armillary.serve.workload import bursty, requests
        from armillary.serve.workload.lengths import named
        from armillary.serve.workload.requests import arrivals
        from armillary.serve.workload.trace_file import Recorded

        flags, count = self.flags, self.flags.requests or _REQUESTS
        if flags.trace is not None:
            self.recorded = Recorded(flags.trace, flags.speed, flags.requests, self.context, flags.cut)
            return requests(self.recorded)
        times = bursty(flags.rate if flags.rate is not None else float(self.replicas), flags.variation, self.seed)
        return requests(arrivals(times, named(flags.lengths or _LENGTHS), count, self.seed + 1, limit=self.context))

    def _conversations(self) -> Conversations:
        from armillary.core.errors import InputError
        from armillary.serve.workload import bursty, sessions
        from armillary.serve.workload.lengths import named

        flags = self.flags
        assert flags.sessions is not None
        if flags.sessions < 1:
            raise InputError(f"{flags.sessions} sessions are no workload", "give at least 1", field="sessions")
        tokens, kinds = sessions.system_prompt(flags.system_prompt or "0")
        turns, think = sessions.turns(flags.turns or _TURNS), sessions.think(flags.think or _THINK)
        like = sessions.Sessions(named(flags.lengths or _TURN), turns, think, tokens, kinds)
        times = bursty(flags.rate if flags.rate is not None else self.replicas / turns.mean, flags.variation, self.seed)
        return sessions.Conversations(times, like, context=self.context, seed=self.seed + 1, count=flags.sessions, most=flags.requests)

    def facts(self, result: Result) -> dict[str, Any]:
        """What came, as plain values: rates a second, tokens; `variation` of the time between arrivals."""
        import numpy as np

        gaps = np.diff(np.sort(result.arrival)).astype(np.float64)
        mean = float(gaps.mean()) if len(gaps) else 0.0
        said: dict[str, Any] = {
            "requests": len(result.arrival),
            "rate": 1e9 / mean if mean else None,
            "variation": float(gaps.std()) / mean if mean else None,
            "prompt": percentiles(result.prompt),
            "answer": percentiles(result.answer),
        }
        talk, file = self.conversations, self.recorded
        if file is not None:
            said |= {"unanswered": file.unanswered, "shortened": file.shortened, "shared": file.shared / max(1, file.asked)}
        if talk is not None:
            said |= {"sessions": talk.begun, "sessions_cut": talk.cut, "shared": talk.shared / max(1, talk.asked)}
        return said


def percentiles(values: Any) -> dict[str, float]:
    """The 50th, 90th and 99th by nearest rank; 0 where there are no values."""
    import numpy as np

    return {f"p{percent}": float(np.percentile(values, percent, method="inverted_cdf")) if len(values) else 0.0 for percent in (50, 90, 99)}


def told(facts: dict[str, Any]) -> str:
    """What came, in a line or two."""
    every = facts["rate"]
    rate = "" if every is None else f", {every:.3g}" if every < 1000 else f", {every:,.0f}"
    rate += f" a second (variation {facts['variation']:.2g})" if rate else ""
    prompt, answer = facts["prompt"], facts["answer"]
    lengths = f"prompts of {prompt['p50']:,.0f} tokens (p99 {prompt['p99']:,.0f}), answers of {answer['p50']:,.0f} ({answer['p99']:,.0f})"
    words = f"{facts['requests']:,} requests{rate}: {lengths}"
    if "sessions" in facts:
        cut = facts["sessions_cut"]
        words += f"\n{facts['sessions']:,} sessions" + (
            f", {cut:,} of which ended early, for their next turn exceeds the context" if cut else ""
        )
    if facts.get("unanswered"):
        words += f"\n{facts['unanswered']:,} without an answer were passed over"
    if facts.get("shortened"):
        words += f"\n{facts['shortened']:,} were shortened to the context"
    if facts.get("shared"):
        words += f"\n{facts['shared']:.1%} of the prompts' tokens had been asked or answered before"
    return words
