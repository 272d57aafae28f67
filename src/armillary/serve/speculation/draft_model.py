"""A smaller model proposes: another one, or the same with layers left out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from armillary.serve.block_pool import BlockPool
from armillary.serve.executors.forward import FlatBatch, Forward, Span
from armillary.serve.request import Request
from armillary.serve.sampling import GREEDY_BELOW, Row, SamplingError, law, sample, uniform
from armillary.serve.speculation.rejection import drawn

CHUNK = 512  # tokens of known text that the draft model reads at a time


@dataclass(slots=True)
class _Sequence:
    """What the draft model's cache holds of a request."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class DraftModel:
    """Drafts by `forward`, a model of the same vocabulary with a KV pool of its own: `num_blocks` blocks of `block_size` tokens.

    A draft is drawn with the request's parameters. Where the request has a seed, and so has to have the same tokens with and without drafts,
    it is drawn with the target's own random number, so that models which agree draw the same token. Otherwise it is drawn with one of
    its own and verified by rejection sampling, which accepts more (`laws`): at temperature 1 SmolLM2 without every tenth layer is right
    42 % of the time, against 21 %. After a rejection the cache is right up to the last accepted token; after full acceptance it
    lacks the last draft, which is read together with the token that followed. A sequence for which the pool has no room is not drafted for.
    """

    def __init__(
        self,
        name: str,
        forward: Forward,
        *,
        num_blocks: int,
        block_size: int,
        context: int,
        seed: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self.name = name
        self._forward, self._seed, self._context = forward, seed, context
        self._deterministic = deterministic  # every answer is to be the one without drafts
        self._pool = BlockPool(num_blocks, block_size)
        self._sequences: dict[str, _Sequence] = {}
        self._laws: dict[str, list[Tensor]] = {}  # of the last proposals

    def prepare(self, requests: Sequence[Request]) -> None:
        for request in requests:
            known = _known(request)
            sequence = self._kept(request, known)
            while len(known) - len(sequence.tokens) > 2 and self._room(sequence, len(known) + 1):
                start = len(sequence.tokens)
                piece = known[start : min(start + CHUNK, len(known) - 1)]
                self._compute([(sequence, piece)], rows=False)

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        drafts: list[list[int]] = [[] for _ in requests]
        self._laws.clear()
        coming: list[tuple[int, _Sequence, list[int]]] = []  # index, its cache, what it reads next
        for index, (request, bound) in enumerate(zip(requests, most, strict=True)):
            known = _known(request)
            if not bound or len(known) + bound > self._context:
                continue
            sequence = self._kept(request, known)
            unread = known[len(sequence.tokens) :]
            if len(unread) <= 2 and self._room(sequence, len(known) + bound - 1):
                coming.append((index, sequence, unread))
        with torch.inference_mode():
            while coming:
                logits = self._compute([(sequence, piece) for _, sequence, piece in coming], rows=True)
                rows = [Row(requests[index], tuple(drafts[index])) for index, _, _ in coming]
                further: list[tuple[int, _Sequence, list[int]]] = []
                for (index, sequence, _), token in zip(coming, self._draw(logits, rows), strict=True):
                    if token is None:
                        continue  # the target decides without a draft
                    drafts[index].append(token)
                    if len(drafts[index]) < most[index]:
                        further.append((index, sequence, [token]))
                coming = further
        return [tuple(tokens) for tokens in drafts]

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        return tuple(self._laws.get(request.id, ()))

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int | None]:
        """A token from each row of `logits`, None where none can be drawn; laws are kept where rejection sampling needs them."""
        free = [not self._deterministic and _free(row.request) for row in rows]
        named = iter(sample(logits[[not one for one in free]], [row for row, one in zip(rows, free, strict=True) if not one], self._seed))
        tokens: list[int | None] = []
        for values, row, one in zip(logits, rows, free, strict=True):
            if not one:
                result = next(named)
                tokens.append(None if isinstance(result, SamplingError) else result.token)
                continue
            with suppress(SamplingError):
                own = law(values.float(), row)
                self._laws.setdefault(row.request.id, []).append(own)
                tokens.append(drawn(own, uniform(row.request, row.position, self._seed, "draft")))
                continue
            tokens.append(None)
        return tokens

    def forget(self, request: Request) -> None:
        sequence = self._sequences.pop(request.id, None)
        if sequence is not None:
            self._pool.free(sequence.blocks)

    def _kept(self, request: Request, known: Sequence[int]) -> _Sequence:
        """The request's cache, cut to what is true of it; its last known token is always read anew."""
        sequence = self._sequences.setdefault(request.id, _Sequence())
        tokens = sequence.tokens
        valid = min(len(tokens), len(known) - 1)
        first = min(len(request.prompt), valid)  # drafts stand behind the prompt
        right = next((place for place in range(first, valid) if tokens[place] != known[place]), valid)
        del tokens[right:]
        return sequence

    def _room(self, sequence: _Sequence, length: int) -> bool:
        """Blocks for `length` tokens, if there are."""
        needed = -(-length // self._pool.block_size) - len(sequence.blocks)
        if needed > self._pool.free_count:
            return False
        if needed > 0:
            sequence.blocks += self._pool.allocate(needed, sequence.blocks[-1] if sequence.blocks else None)
        return True

    def _compute(self, pieces: Sequence[tuple[_Sequence, Sequence[int]]], *, rows: bool) -> Tensor:
        """Read a piece of each sequence; the logits after each [pieces, vocabulary]."""
        tokens = [token for _, piece in pieces for token in piece]
        spans = [Span(len(sequence.tokens), len(piece), sequence.blocks) for sequence, piece in pieces]
        positions = [position for span in spans for position in range(span.start, span.start + span.count)]
        ends, end = [], -1
        for span in spans:
            end += span.count
            ends.append(end)
        with torch.inference_mode():
            logits = self._forward.logits(FlatBatch(tokens, positions, spans, ends if rows else []))
        for sequence, piece in pieces:
            sequence.tokens += piece
        return logits.values


def _free(request: Request) -> bool:
    """Whether a request may have other tokens with drafts than without, of the same distribution."""
    return request.sampling.seed is None and request.sampling.temperature >= GREEDY_BELOW


def _known(request: Request) -> list[int]:
    return [*request.prompt, *request.output]
