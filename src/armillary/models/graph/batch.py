"""What a batch asks of a model, as sums: enough to count every operation, and cheap to keep up to date."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from armillary.core.errors import InputError
from armillary.models.graph.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Span:
    """Attention under one window. A pair is a query and a key at or before it; `keys` are the distinct ones read, once a sequence.

    Sequences with one query are decoding (their pairs are their keys), the others are in prefill.
    """

    prefill_pairs: int = 0
    prefill_keys: int = 0
    decode_keys: int = 0

    def __add__(self, other: Span) -> Span:
        return Span(self.prefill_pairs + other.prefill_pairs, self.prefill_keys + other.prefill_keys, self.decode_keys + other.decode_keys)


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration of one replica: token counts, the rows whose logits are wanted, and a span for each of the model's windows.

    Batches add up, so a scheduler can keep the sum of its sequences instead of a list.
    """

    prefill_tokens: int
    decodes: int
    rows: int
    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decodes

    def __add__(self, other: Batch) -> Batch:
        return Batch(
            self.prefill_tokens + other.prefill_tokens,
            self.decodes + other.decodes,
            self.rows + other.rows,
            tuple(mine + its for mine, its in zip(self.spans, other.spans, strict=True)),
        )


def windows_of(model: Architecture) -> tuple[int | None, ...]:
    """The model's distinct windows in order of first use: what `Batch.spans` follows."""
    return tuple(dict.fromkeys(model.windows)) if model.windows else (None,)


def summed(sequences: Iterable[tuple[int, int]], windows: Sequence[int | None] = (None,), rows: int | None = None) -> Batch:
    """The sums of (query, context) pairs: `query` tokens to compute after `context` tokens whose keys are cached.

    `rows`: how many logits are wanted, one a sequence unless given. Raises InputError for a query under 1 or a context under 0.
    """
    prefill = decodes = count = 0
    spans = [[0, 0, 0] for _ in windows]
    for query, context in sequences:
        if query < 1 or context < 0:
            raise InputError(f"a sequence of {query} query tokens after {context} cached ones", "give at least 1 query and 0 cached")
        count += 1
        if query == 1:
            decodes += 1
        else:
            prefill += query
        for span, window in zip(spans, windows, strict=True):
            if query == 1:
                span[2] += context + 1 if window is None else min(context + 1, window)
            else:
                span[0] += pairs(query, context, window)
                span[1] += context + query if window is None else min(context + query, window + query - 1)
    return Batch(prefill, decodes, count if rows is None else rows, tuple(Span(*span) for span in spans))


def pairs(query: int, context: int, window: int | None = None) -> int:
    """Sum over the queries of the keys that each reads: context + 1, context + 2, ..., each at most `window`."""
    if window is None:
        return query * context + query * (query + 1) // 2
    growing = min(max(window - context, 0), query)  # queries that still see everything before them
    return growing * context + growing * (growing + 1) // 2 + (query - growing) * window
