"""Which share of weights, KV cache and activations lies in the accelerator's arena, in RAM and on disk (FlexGen, Sheng et al., ICML 2023)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from armillary.core.errors import InputError


class Tier(IntEnum):
    """Where bytes live, fastest first."""

    ARENA = 0
    RAM = 1
    DISK = 2


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of the three tiers, which add up to 1."""

    arena: float
    ram: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        if min(self.shares) < -1e-9 or abs(sum(self.shares) - 1) > 1e-6:
            raise InputError(
                f"shares of {' / '.join(f'{100 * share:g}' for share in self.shares)} % of the arena, RAM and disk",
                "make them add up to 100",
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        return self.arena, self.ram, self.disk

    def place(self, sizes: Sequence[int]) -> tuple[Tier, ...]:
        """A tier for each of `sizes` (bytes), in order: that which is furthest behind its share, so that the tiers take turns.

        Whole pieces are placed: the shares are met to within the largest piece.
        """
        given = [0.0, 0.0, 0.0]
        placed, total = [], 0
        for size in sizes:
            total += size
            behind = [share * total - have for share, have in zip(self.shares, given, strict=True)]
            tier = max(Tier, key=lambda one: (behind[one], self.shares[one]))
            given[tier] += size
            placed.append(tier)
        return tuple(placed)

    def __str__(self) -> str:
        return "/".join(f"{100 * share:.4g}" for share in self.shares)


EVERYTHING_HERE: Final = Split(1.0)
_SPLIT: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)/(\d{1,3}(?:\.\d{1,6})?)/(\d{1,3}(?:\.\d{1,6})?)", re.ASCII)
MAX_BATCHES: Final = 1024


@dataclass(frozen=True, slots=True)
class OffloadPolicy:
    """FlexGen's policy. A block of sequences passes each layer in `batches` batches, one after another, while its weights stay.

    FlexGen's names: the block size bls is `batches` times the batch size gbs; wg, wc, wd are `weights`, cg, cc, cd `cache`, hg, hc, hd `hidden`.
    """

    weights: Split = EVERYTHING_HERE
    cache: Split = EVERYTHING_HERE
    hidden: Split = EVERYTHING_HERE
    batches: int = 1
    compress: bool = False  # matrices, keys and values are kept in 4 bits (compress.py), on every tier

    def __post_init__(self) -> None:
        if not 1 <= self.batches <= MAX_BATCHES:
            raise InputError(f"batches={self.batches} of an offloading policy", f"give 1 to {MAX_BATCHES}", field="offload")

    @classmethod
    def parse(cls, text: str) -> OffloadPolicy:
        """`weights=20/80/0,cache=0/100/0,hidden=0/100/0,batches=3`: percentages in the arena, RAM and on disk; what is left out stays in the arena.

        Raises InputError for anything else.
        """
        splits: dict[str, Split] = {}
        batches = 1
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            match = _SPLIT.fullmatch(value)
            if name in ("weights", "cache", "hidden") and name not in splits and match:
                try:
                    splits[name] = Split(*(float(share) / 100 for share in match.groups()))
                except InputError as error:
                    raise InputError(f"{name}={value}: {error.problem}", error.fix, field="offload") from None
            elif name == "batches" and re.fullmatch(r"\d{1,6}", value, re.ASCII):
                batches = int(value)
            else:
                raise InputError(
                    f"{part.strip()[:80]!r} is no part of an offloading policy",
                    "write auto, or weights=20/80/0,cache=0/100/0,hidden=0/100/0,batches=3 (percent in the arena, RAM and on disk)",
                    field="offload",
                )
        weights, cache, hidden = (splits.get(name, EVERYTHING_HERE) for name in ("weights", "cache", "hidden"))
        return cls(weights, cache, hidden, batches)

    def __str__(self) -> str:
        kept = ", in 4 bits" if self.compress else ""
        return f"weights={self.weights},cache={self.cache},hidden={self.hidden},batches={self.batches}{kept}"
