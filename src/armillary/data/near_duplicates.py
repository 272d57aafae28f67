"""Near-duplicate texts: MinHash signatures, LSH bands to find candidates, the exact Jaccard similarity to judge them.

A text is the set of its shingles: every run of `shingle` characters of its letters and digits, lower-cased, other characters between
them as one space. A MinHash (Broder 1997) of two sets is equal with probability s, their Jaccard similarity |A & B| / |A | B|. A
signature of b bands of r hashes makes two texts candidates when any band is equal, which happens with probability

    P(s) = 1 - (1 - s^r)^b        (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2)

a steep curve around s = (1/b)^(1/r). `bands_for` chooses r and b so that P(threshold) is at least 0.95; candidates below the threshold
cost a comparison and are then dropped, so what is reported is exact, and what is missed is bounded by 1 - P(s).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError

Progress = Callable[[str, int, int], None]
RECALL: Final = 0.95  # P(threshold), at least
MAX_BUCKET: Final = 64  # a text is compared with this many before it in a bucket: identical boilerplate must not cost n^2
_SEPARATORS: Final = re.compile(r"[\W_]+")
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


class Pair(NamedTuple):
    """Two texts by number, the first the smaller, and their exact Jaccard similarity."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Pairs at or above the threshold, the groups that they connect, and what is left when each group keeps its first text."""

    pairs: tuple[Pair, ...]
    groups: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    candidates: int  # pairs that were compared
    bands: int
    rows: int


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """P(s) = 1 - (1 - s^r)^b."""
    return 1 - (1 - similarity**rows) ** bands


def bands_for(threshold: float, hashes: int = 128) -> tuple[int, int]:
    """(bands, rows): the steepest curve of at most `hashes` hashes that finds a pair at the threshold with probability `RECALL`."""
    rows = 1
    while rows < hashes and candidate_probability(threshold, hashes // (rows + 1), rows + 1) >= RECALL:
        rows += 1
    return hashes // rows, rows


def find_near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.7, shingle: int = 8, hashes: int = 128, seed: int = 0, progress: Progress | None = None
) -> NearDuplicates:
    """The near duplicates among `texts`. Deterministic. Holds 8 bytes a distinct shingle, which is up to 8 a character.

    Texts shorter than `shingle` characters are their own single shingle. Raises `InputError` for settings out of bounds.
    """
    for name, value, low, high in (("threshold", threshold, 0.05, 1), ("shingle", shingle, 1, 100), ("hashes", hashes, 1, 4096)):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}, outside {low} .. {high}", "choose a value between", field=name)
    report = progress or (lambda stage, done, total: None)
    sets: list[NDArray[np.uint64]] = []
    bands, rows = bands_for(threshold, hashes)
    signatures = np.empty((len(texts), bands * rows), dtype=np.uint64)
    for index, text in enumerate(texts):
        report("comparing", index, len(texts))
        sets.append(shingles(text, shingle))
        signatures[index] = minhash(sets[-1], bands * rows, seed)
    seen: set[tuple[int, int]] = set()
    pairs = []
    for first, second in _candidates(signatures, bands, rows):
        if (first, second) not in seen:
            seen.add((first, second))
            similarity = jaccard(sets[first], sets[second])
            if similarity >= threshold:
                pairs.append(Pair(first, second, similarity))
    report("comparing", len(texts), len(texts))
    groups = _connected(len(texts), pairs)
    removed = sorted(member for group in groups for member in group[1:])
    kept = sorted(set(range(len(texts))) - set(removed))
    return NearDuplicates(tuple(sorted(pairs)), tuple(groups), tuple(kept), tuple(removed), len(seen), bands, rows)


def shingles(text: str, length: int) -> NDArray[np.uint64]:
    """The 64-bit hashes of the text's distinct shingles, sorted: [shingles]. `length` counts bytes of UTF-8 after normalising."""
    raw = np.frombuffer(_SEPARATORS.sub(" ", text.lower()).strip().encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint64)
    if raw.size == 0:
        raw = np.zeros(1, dtype=np.uint64)
    length = min(length, raw.size)
    hashed = np.zeros(raw.size - length + 1, dtype=np.uint64)
    for place in range(length):
        hashed = hashed * _STEP + raw[place : place + hashed.size] + np.uint64(1)
    return np.unique(_mixed(hashed))


def minhash(shingled: NDArray[np.uint64], hashes: int, seed: int = 0) -> NDArray[np.uint64]:
    """The least value of each of `hashes` hash functions a*x + b mod 2^64 (a odd) over the set: [hashes]."""
    coefficients = np.random.default_rng([seed, 0x315]).integers(0, 1 << 63, (2, hashes), dtype=np.uint64)
    factors, offsets = coefficients[0] * np.uint64(2) + np.uint64(1), coefficients[1] * np.uint64(2)
    return np.array([(shingled * factor + offset).min() for factor, offset in zip(factors, offsets, strict=True)], dtype=np.uint64)


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """|A & B| / |A | B| of two sorted sets."""
    common = np.intersect1d(first, second, assume_unique=True).size
    return float(common / (first.size + second.size - common))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): close texts get hashes far apart."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _candidates(signatures: NDArray[np.uint64], bands: int, rows: int) -> Iterator[tuple[int, int]]:
    """Pairs that share a band."""
    for band in range(bands):
        key = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            key = _mixed(key * _STEP + signatures[:, column])
        order = np.argsort(key, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            if bucket.size > 1:
                members = bucket.tolist()  # in the order of their numbers: the sort is stable
                for place, second in enumerate(members):
                    for first in members[max(0, place - MAX_BUCKET) : place]:
                        yield first, second


def _connected(count: int, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """The groups of two or more that the pairs connect, each sorted, in the order of their first members."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second, _ in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for node in range(count):
        groups.setdefault(root(node), []).append(node)
    return [tuple(group) for group in groups.values() if len(group) > 1]
