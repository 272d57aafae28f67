"""How many keys the queries of an iteration read under a KV policy: what a cost model needs, and all of it is arithmetic.

Which tokens are read depends on their contents for H2O, Quest, MInference and InfLLM; how many does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from armillary.kernels.seen import PAGE, REPRESENTATIVES, UNIT, Seen, page_bound_bytes
from armillary.serve.kv_policies.h2o import H2O
from armillary.serve.kv_policies.infllm import InfLLM
from armillary.serve.kv_policies.minference import MInference
from armillary.serve.kv_policies.policy import KVPolicy

_LAST_QUERIES = 64  # whose attention MInference finds its columns and diagonals by


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one sequence's queries in a layer: (query, key) `pairs`, distinct `keys` that are read with their values, and `beside` bytes of each
    key/value head that are read to decide which."""

    pairs: int
    keys: int
    beside: int = 0


def reading(kv: KVPolicy, query: int, cached: int, head_dim: int, *, prompt: bool) -> Reading:
    """What `query` tokens after `cached` computed ones read in a layer that the policy is of; `prompt`: they are not a decode.

    A policy's way of computing is our kernels': blocks and pages as they have them.
    """
    end, seen = cached + query, kv.seen
    if isinstance(kv, H2O):
        return _h2o(kv, cached, end)
    if isinstance(kv, MInference):
        return _minference(kv, query, cached, prompt=prompt)
    if isinstance(kv, InfLLM):
        return _infllm(kv, cached, end, head_dim)
    if seen.rolling:
        return _rolling(seen, cached, end, kv.options.block_size)  # type: ignore[attr-defined]
    if seen.pages and not prompt:
        return _pages(seen, query, cached, head_dim)
    return Reading(_all(cached, end), end)


def _all(start: int, end: int) -> int:
    """Pairs of the queries at positions from `start` to `end` - 1, each of which reads everything up to itself."""
    return (start + 1 + end) * (end - start) // 2


def _bounded(start: int, end: int, from_: int, least: int, size: int) -> int:
    """The same where a query at a position from `from_` on (a multiple of `size` more, less one, or itself) reads `least` keys and one more
    for each token since the last multiple."""
    pairs = _all(start, min(end, from_)) if start < from_ else 0
    first, last = max(start, from_) - from_, end - from_
    return pairs + (_steps(last, least, size) - _steps(first, least, size) if last > first else 0)


def _steps(count: int, least: int, size: int) -> int:
    """Sum of `least` + i % `size` for i below `count`."""
    whole, rest = divmod(count, size)
    return count * least + whole * (size * (size - 1) // 2) + rest * (rest - 1) // 2


def _rolling(seen: Seen, start: int, end: int, size: int) -> Reading:
    """StreamingLLM: sinks, and a window that begins with a block."""
    from_ = seen.rolling + (seen.sinks // size + 1) * size - 1  # the first query that does not see all
    pairs = _bounded(start, end, from_, seen.sinks + seen.rolling, size)
    first = seen.first(start, size)
    return Reading(pairs, end - first + seen.sinks if first else end)


def _h2o(kv: H2O, start: int, end: int) -> Reading:
    """What is kept, and what has come since the last eviction; beside each key its position and the attention that it has gathered."""
    size, total = kv.options.block_size, kv.heavy + kv.recent
    first = (total // size + 1) * size
    kept = total + start % size if start >= first else start
    keys = kept + end - start
    return Reading(_bounded(start, end, first, total + 1, size), keys, keys * kv.beside(0))


def _pages(seen: Seen, query: int, cached: int, head_dim: int) -> Reading:
    """Quest: pages of 16 by the bounds of all of them; the last one is filled as far as the sequence is long."""
    pairs = beside = most = 0
    for end in range(cached + 1, cached + query + 1):
        pages = -(-end // PAGE)
        keys = end if pages <= seen.pages else (seen.pages - 1) * PAGE + (end - 1) % PAGE + 1
        if pages > seen.pages:
            beside += pages * page_bound_bytes(head_dim)
        pairs += keys
        most = max(most, keys)
    return Reading(pairs, min(cached + query, pairs if query > 1 else most), beside)


def _minference(kv: MInference, query: int, cached: int, *, prompt: bool) -> Reading:
    """A piece of a prompt that is longer than a pattern reads goes by it, after its last queries have been compared with all keys."""
    options, end = kv.options, cached + query
    bound = options.sinks + options.window + options.budget
    if not prompt or query < 2 or end <= bound:
        return Reading(_all(cached, end), end)
    short = max(0, min(end, bound) - cached)
    pairs = (_all(cached, cached + short) if short else 0) + (query - short) * bound
    return Reading(pairs + min(_LAST_QUERIES, query) * end, end)


def _infllm(kv: InfLLM, start: int, end: int, head_dim: int) -> Reading:
    """Pieces end with units: each reads the first tokens, units that are looked up by their representatives, and its window."""
    pairs = keys = beside = 0
    while start < end:
        upto = min(end, start // UNIT * UNIT + UNIT)
        local = kv.near.first(start, UNIT)
        known = local // UNIT
        first = min(-(-kv.options.sinks // UNIT) * UNIT, local)
        far = first + max(0, min(kv.units, known - -(-kv.options.sinks // UNIT))) * UNIT if local else 0
        pairs += _all(start, upto) - (local - far) * (upto - start)
        keys += upto - local + far
        beside += known * REPRESENTATIVES * 4 * head_dim + (upto - local) * 4
        start = upto
    return Reading(pairs, keys, beside)
