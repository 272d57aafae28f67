"""Cuts an iteration's flat batch into the batches that pass a layer one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from armillary.core.errors import CapacityError
from armillary.kernels.paged_attention import Span


@dataclass(slots=True)
class Batch:
    """Tokens `first` .. `first + count - 1` of the iteration. `rows`: those whose logits are wanted, counted from `first`.

    `wanted` is where among the iteration's rows they belong, `whose` which of the iteration's spans each span is of. `continues`: its first span goes on with the last sequence of the batch before.
    """

    first: int
    continues: bool
    count: int = 0
    spans: list[Span] = field(default_factory=list)
    whose: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    blocks: set[int] = field(default_factory=set)


def cut(spans: Sequence[Span], rows: Sequence[int], *, sequences: int, tokens: int, blocks: int, block_size: int) -> list[Batch]:
    """Batches of at most so many sequences, tokens and KV blocks, in the order of the spans; a long span is cut in several.

    Raises CapacityError for a sequence that alone has more than `blocks` blocks.
    """
    batches: list[Batch] = []
    token = 0
    for index, span in enumerate(spans):
        done = 0
        while done < span.count:
            now = batches[-1] if batches else None
            if now is None or len(now.spans) == sequences or now.count == tokens:
                now = _begin(batches, token, done > 0)
            count = min(span.count - done, tokens - now.count)
            needed = set(span.blocks[: -(-(span.start + done + count) // block_size)])
            if len(now.blocks | needed) > blocks:
                if not now.spans:
                    raise CapacityError(
                        f"a sequence has {len(needed)} KV blocks, the accelerator's window {blocks}", "serve with a smaller --context"
                    )
                _begin(batches, token, done > 0)
                continue
            now.spans.append(Span(span.start + done, count, span.blocks))
            now.whose.append(index)
            now.blocks |= needed
            now.count += count
            done += count
            token += count
    at = 0
    for wanted, row in sorted(enumerate(rows), key=lambda one: one[1]):
        while row >= batches[at].first + batches[at].count:
            at += 1
        batches[at].rows.append(row - batches[at].first)
        batches[at].wanted.append(wanted)
    return batches


def _begin(batches: list[Batch], first: int, continues: bool) -> Batch:
    batches.append(Batch(first, continues))
    return batches[-1]
