"""Several sources as one: how many documents of each an epoch draws, and which.

A source's own order never restarts: an epoch of the mixture draws the next `count` documents of the source's endless sequence of shuffled
passes, so a source that is drawn by half is read whole in two epochs, and one drawn twice is read twice in one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.data.batches import Source

MAX_REPEATS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """A source and its share: exactly one of `weight` (share of the epoch's tokens), `fraction` (of its own documents) and `count` (documents)."""

    name: str
    source: Source
    weight: float | None = None
    fraction: float | None = None
    count: int | None = None


class Mixture:
    """The parts' documents, numbered one part after another. Implements `Source`.

    Weights are relative to each other; with them an epoch is as large as it can be without drawing any weighted part more than once,
    or has about `tokens` tokens where that is given. `resolved` is what a run saves: the counts that came out of it.

    Raises `InputError` for parts without documents, with other tokenizers than the first, or with shares that resolve to no document
    or to over 1,000 passes an epoch.
    """

    def __init__(self, parts: Sequence[Part], *, tokens: int | None = None) -> None:
        if not parts:
            raise InputError("a mixture of no parts has nothing to read", "name at least one source")
        names = [part.name for part in parts]
        if len(set(names)) != len(names):
            raise InputError(f"the mixture names a part twice: {names}", "give each part its own name")
        for part in parts:
            given = [value for value in (part.weight, part.fraction, part.count) if value is not None]
            if len(given) != 1 or not 0 < given[0] < float("inf"):
                raise InputError(f"part {part.name!r} has the shares {given}", "give one of weight, fraction and count, above 0")
            if part.source.tokenizer != parts[0].source.tokenizer:
                raise InputError(
                    f"part {part.name!r} was tokenized by another tokenizer than {parts[0].name!r} "
                    f"({part.source.tokenizer[:12]}..., {parts[0].source.tokenizer[:12]}...)",
                    "prepare both with one tokenizer",
                )
            flagged = part.source.scored(0) is not None
            if flagged != (parts[0].source.scored(0) is not None):
                raise InputError(
                    f"part {part.name!r} has {'' if flagged else 'no '}flags of what is scored, unlike {parts[0].name!r}",
                    "mix chats with chats and texts with texts",
                )
        self.parts = tuple(parts)
        self._sizes = np.array([part.source.lengths.size for part in parts])  # documents
        self._first = np.cumsum([0, *self._sizes])
        self.lengths: NDArray[np.int64] = np.concatenate([part.source.lengths for part in parts])
        self._counts = self._resolve(tokens)

    @property
    def resolved(self) -> dict[str, Any]:
        """JSON data: each part's documents an epoch, passes, expected share of the tokens, and fingerprint."""
        tokens = [count * float(part.source.lengths.mean()) for part, count in zip(self.parts, self._counts, strict=True)]
        return {
            part.name: {
                "documents": int(count),
                "passes": round(float(count / size), 6),
                "share_of_tokens": round(expected / sum(tokens), 6),
                "fingerprint": part.source.fingerprint,
            }
            for part, count, size, expected in zip(self.parts, self._counts, self._sizes, tokens, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer(self) -> str:
        return self.parts[0].source.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.parts[0].source.vocab_size

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
        """The documents of an epoch, parts interleaved at random (one after another without `shuffle`)."""
        drawn = []
        for index, (part, count, size) in enumerate(zip(self.parts, self._counts, self._sizes, strict=True)):
            begin, end = epoch * int(count), (epoch + 1) * int(count)
            passes = [part.source.order(_seed_of(seed, index), number, shuffle) for number in range(begin // size, -(-end // size))]
            start = begin - begin // size * size
            drawn.append(np.concatenate(passes)[start : start + end - begin] + self._first[index])
        order = np.concatenate(drawn)
        return np.random.default_rng([seed, epoch, 0x313]).permutation(order) if shuffle else order

    def document(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        part, own = self._locate(index)
        return part.source.document(own, begin, end)

    def scored(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[np.uint8] | None:
        part, own = self._locate(index)
        return part.source.scored(own, begin, end)

    def part_of(self, index: int) -> str:
        """The name of the part that a document belongs to."""
        return self._locate(index)[0].name

    def _locate(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < self._first[-1]:
            raise InputError(f"document {index} is outside 0 .. {self._first[-1] - 1}", "give the number of a document that is there")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.parts[number], index - int(self._first[number])

    def _resolve(self, tokens: int | None) -> NDArray[np.int64]:
        """Documents of each part an epoch."""
        have = np.array([float(part.source.lengths.sum()) for part in self.parts])
        weights = np.array([part.weight or 0.0 for part in self.parts])
        passes = np.array([part.fraction or 0.0 for part in self.parts])
        if weights.any():
            weighted = weights > 0
            weights = weights / weights.sum()
            fixed = sum(h * (p.fraction or (p.count or 0) / s) for h, p, s in zip(have, self.parts, self._sizes, strict=True))
            size = float((have[weighted] / weights[weighted]).min()) if tokens is None else tokens - fixed
            if size <= 0:
                raise InputError(f"the parts with fixed shares have more than {tokens:,} tokens already", "ask for a larger epoch")
            passes = np.where(weighted, weights * size / have, passes)
        elif tokens is not None:
            raise InputError("an epoch of a given size needs parts with weights", "give weights, or leave the size out")
        counts = np.array(
            [part.count or round(share * int(size)) for part, share, size in zip(self.parts, passes, self._sizes, strict=True)],
            dtype=np.int64,
        )
        for part, count, documents in zip(self.parts, counts, self._sizes, strict=True):
            if not 1 <= count <= MAX_REPEATS * documents:
                raise InputError(
                    f"part {part.name!r} comes to {count:,} of its {documents:,} documents an epoch",
                    f"give it a share between one document and {MAX_REPEATS:,} passes",
                )
        return counts


def _seed_of(seed: int, part: int) -> int:
    """A seed of a part's own, so that two parts over the same documents do not draw alike."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0] >> 1)
