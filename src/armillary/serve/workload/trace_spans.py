"""Traces of our own engine, real or virtual, as workloads: when each request came, its lengths, and what its prompt shared with others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from armillary.core.errors import FormatError
from armillary.core.trace import Trace
from armillary.serve.workload.requests import Arrival, Content, beginning

_REQUEST = "request/"


def read_spans(path: str | Path) -> Iterator[tuple[str, Arrival]]:
    """(where, request) of those that ended while the trace was recorded; time begins with the first of them.

    One that began as an earlier one did begins so again, though that one's tokens are not in the trace: an identity stands for those of each
    request, and all answers' have one. Raises FormatError for a trace of something else.
    """
    trace = Trace.load(path)
    ended: dict[str, tuple[int, int, int]] = {}  # arrival, prompt, answer
    shares: dict[str, tuple[str, int]] = {}
    for span in trace.spans():
        if not span.lane.startswith(_REQUEST):
            continue
        name = span.lane.removeprefix(_REQUEST)
        if span.kind == "ended":
            try:
                ended[name] = int(span.sizes["arrival"]), int(span.sizes["prompt"]), int(span.sizes["answer"])
            except (KeyError, ValueError, OverflowError):
                raise FormatError(f"request '{name[:80]}' of {path} has no arrival, prompt and answer", "record the trace again") from None
        elif span.kind == "shares":
            shares[name] = span.reason, int(span.sizes.get("shared", 0))
    if not ended:
        raise FormatError(f"{path} has no requests that ended while it was recorded", "record longer, with an engine that serves")
    said: dict[str, Content] = {}  # everything of each, prompt and answer
    found: list[tuple[str, Arrival]] = []
    first = min(arrival for arrival, _, _ in ended.values())
    for number, (name, (arrival, prompt, answer)) in enumerate(ended.items()):
        earlier, tokens = shares.get(name, ("", 0))
        # Of one that the trace lost only the name is known, and that all who name it begin alike.
        whole = said.setdefault(earlier, ((-1 - number, 1 << 30),)) if tokens > 0 else ()
        begun = beginning(whole, min(tokens, prompt))
        shared = sum(count for _, count in begun)
        content = (*begun, *(((number + 1, prompt - shared),) if prompt > shared else ()))
        said[name] = (*content, (0, answer)) if answer else content
        found.append((f"request '{name[:80]}'", Arrival(arrival - first, prompt, answer, name, content, shared)))
    found.sort(key=lambda one: one[1].at)
    return iter(found)
