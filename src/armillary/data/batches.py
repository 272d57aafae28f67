"""What a trainer reads: rows of tokens in an order that depends on a seed and on nothing else.

The rows of an epoch are a pure function of (source, seed, epoch, length, packing), and so is their order. Rank r of a world of w takes
rows r*rows .. (r+1)*rows of every global batch of w*rows, so any number of ranks sees the same global sequence; what is saved is one
position in that sequence, and a run resumes at another world size exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.data.packing import first_fit_decreasing

IGNORE: Final = -100
"""The target of a position that is not scored, as `torch.nn.functional.cross_entropy` has it."""

Packing = Literal["concat", "documents"]


class Source(Protocol):
    """Documents by number, and the order of an epoch: `TokenShards`, `Mixture`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def order(self, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]: ...
    def document(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[Any]: ...
    def scored(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[np.uint8] | None: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """All fields are int64 [rows, length].

    Attention is causal and stays within equal `documents` of a row (a block-diagonal mask); padding is a document of its own, never
    scored. A document cut by a row's edge goes on in another row as a document of its own, at position 0.
    """

    tokens: torch.Tensor
    targets: torch.Tensor  # the next token of the same document; IGNORE where nothing is scored
    positions: torch.Tensor  # within the document: 0 at its first token in the row
    documents: torch.Tensor  # 0, 1, ... from left to right within the row

    @property
    def scored(self) -> int:
        """How many positions carry a loss."""
        return int((self.targets != IGNORE).sum())


class BatchStream:
    """Batches of `rows` rows of `length` tokens for rank `rank` of `world`; endless, unless `epochs` bounds it.

    `packing`:
      - "concat": the epoch's documents one after another, cut into rows. Every token of every document is in exactly one row an epoch,
        and every token but a document's first is a target exactly once.
      - "documents": whole documents, first-fit decreasing into rows (chats, short texts); one longer than a row is cut into pieces.
    Rows are shuffled too, so that neighbours from one long document do not meet in a batch. With `shuffle=False` documents and rows come
    as they lie (evaluation). With `epochs`, the last global batch is filled up with rows that score nothing, so that every rank has
    as many batches as every other.

    Raises `InputError` for sizes out of bounds and for a source that has nothing to score.
    """

    def __init__(
        self,
        source: Source,
        *,
        rows: int,
        length: int,
        seed: int = 0,
        packing: Packing = "concat",
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        for name, value, high in (
            ("rows", rows, 1 << 20),
            ("length", length, 1 << 24),
            ("world", world, 1 << 20),
            ("epochs", epochs, 1 << 40),
        ):
            if value is not None and not 1 <= value <= high:
                raise InputError(f"{name} is {value:,}, outside 1 .. {high:,}", "give a number between", field=name)
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} is outside a world of {world}", f"give 0 .. {world - 1}", field="rank")
        if not 0 <= seed < 1 << 63:
            raise InputError(f"seed {seed} is outside 0 .. 2^63 - 1", "give a number between", field="seed")
        if packing not in ("concat", "documents"):
            raise InputError(f"packing {str(packing)[:40]!r} is not known", "use 'concat' or 'documents'", field="packing")
        self.source, self.rows, self.length, self.seed = source, rows, length, seed
        self.packing, self.rank, self.world, self.shuffle, self.epochs = packing, rank, world, shuffle, epochs
        self._epoch, self._row = 0, 0  # the next row of the global sequence
        self._plans: dict[int, _Epoch] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        mine: list[tuple[int, int]] = []  # (epoch, row)
        epoch, row, missing = self._epoch, self._row, self.rows * self.world
        first = self.rank * self.rows
        place = 0
        if self._ended(epoch, row):
            raise StopIteration
        while missing and not self._ended(epoch, row):
            count = self.rows_in_epoch(epoch)
            take = min(missing, count - row)
            low, high = max(place, first), min(place + take, first + self.rows)
            mine += [(epoch, row + index - place) for index in range(low, high)]
            place, row, missing = place + take, row + take, missing - take
            if row == count:
                epoch, row = epoch + 1, 0
        batch = self._batch(mine)
        self._epoch, self._row = epoch, row
        return batch

    @property
    def epoch(self) -> int:
        """The epoch of the next row, from 0."""
        return self._epoch

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows that all ranks read together in an epoch."""
        return self._plan(epoch).rows

    def state_dict(self) -> dict[str, Any]:
        """JSON data, the same on every rank: the position in the global sequence and what defines that sequence."""
        return {"version": 1, **self._identity(), "epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved position, on any rank of any world. Raises `InputError` naming what differs between the sequences."""
        if state.get("version") != 1:
            raise InputError(
                f"the data state has version {str(state.get('version'))[:20]!r}; this Armillary reads 1", "start the epoch anew"
            )
        differing = [f"{key} {state.get(key)!r}, not {value!r}" for key, value in self._identity().items() if state.get(key) != value]
        if differing:
            raise InputError(
                f"the saved position belongs to other data: {'; '.join(differing)[:400]}",
                "resume with the data and settings of the saved run",
            )
        epoch, row = state.get("epoch"), state.get("row")
        if not (isinstance(epoch, int) and isinstance(row, int) and 0 <= epoch < 1 << 40 and row >= 0):
            raise InputError(f"the data state has epoch {epoch!r} and row {row!r}", "take it from a whole checkpoint")
        if not self._ended(epoch, row) and row >= self.rows_in_epoch(epoch):
            raise InputError(
                f"the data state is at row {row:,} of an epoch of {self.rows_in_epoch(epoch):,}", "take it from a whole checkpoint"
            )
        self._epoch, self._row = epoch, row

    def _identity(self) -> dict[str, Any]:
        return {
            "source": self.source.fingerprint,
            "seed": self.seed,
            "length": self.length,
            "packing": self.packing,
            "shuffle": self.shuffle,
        }

    def _ended(self, epoch: int, row: int) -> bool:
        return self.epochs is not None and epoch >= self.epochs

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._plans:
            # A batch meets two epochs at most unless epochs are smaller than it: keep the last few.
            while len(self._plans) >= 4:
                del self._plans[min(self._plans)]
            make = _concatenated if self.packing == "concat" else _whole_documents
            order = self.source.order(self.seed, epoch, self.shuffle)
            pieces, starts = make(order, self.source.lengths[order], self.length)
            count = len(starts) - 1
            if count == 0:
                raise InputError("no document has two tokens: there is nothing to predict", "give longer documents")
            rows = np.random.default_rng([self.seed, epoch, 0x20A5]).permutation(count) if self.shuffle else np.arange(count)
            self._plans[epoch] = _Epoch(count, pieces, starts, rows)
        return self._plans[epoch]

    def _batch(self, chosen: list[tuple[int, int]]) -> Batch:
        fields = np.zeros((4, self.rows, self.length), dtype=np.int64)
        tokens, targets, positions, documents = fields
        targets.fill(IGNORE)
        for line in range(self.rows):
            place, segment = 0, 0
            for document, begin, end in self._plan(chosen[line][0]).row(chosen[line][1]) if line < len(chosen) else ():
                # One token more than the inputs: the last one's target, unless the document ends with it.
                ids = self.source.document(document, begin, end + 1)
                flags = self.source.scored(document, begin, end + 1)
                size, following = end - begin, ids[1:].astype(np.int64)
                here = slice(place, place + size)
                tokens[line, here] = ids[:size]
                if flags is not None:
                    following[flags[1:] == 0] = IGNORE
                targets[line, place : place + following.size] = following
                positions[line, here] = np.arange(size)
                documents[line, here] = segment
                place, segment = place + size, segment + 1
            positions[line, place:] = np.arange(self.length - place)
            documents[line, place:] = segment
        return Batch(*(torch.from_numpy(field) for field in fields))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The rows of an epoch: row k of the sequence is pieces[starts[rows[k]] : starts[rows[k] + 1]]."""

    rows: int
    pieces: NDArray[np.int64]  # [pieces, 3]: document, first token, one past the last token that is an input
    starts: NDArray[np.int64]  # [rows + 1]
    permutation: NDArray[np.int64]  # [rows]

    def row(self, index: int) -> list[tuple[int, int, int]]:
        place = int(self.permutation[index])
        return [(int(d), int(b), int(e)) for d, b, e in self.pieces[self.starts[place] : self.starts[place + 1]]]


def _concatenated(order: NDArray[np.int64], lengths: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents end to end, cut at every multiple of `length`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    cuts = np.union1d(np.arange(0, total, length), np.concatenate([[0], ends[:-1]]).astype(np.int64))
    after = np.append(cuts[1:], total)
    owner = np.searchsorted(ends, cuts, side="right")
    base = ends[owner] - lengths[owner]
    pieces = np.stack([order[owner], cuts - base, after - base], axis=1)
    starts = np.searchsorted(cuts, np.arange(0, total + length, length)) if total else np.zeros(1, dtype=np.int64)
    return pieces, starts[: -(-total // length) + 1]


def _whole_documents(order: NDArray[np.int64], lengths: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each document's inputs (all its tokens but the last) in pieces of at most `length`, packed first-fit decreasing."""
    inputs = lengths - 1
    counts = -(-inputs // length)
    owner = np.repeat(np.arange(order.size), counts)
    number = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * length
    end = np.minimum(begin + length, inputs[owner])
    bins = first_fit_decreasing(end - begin, length)
    by_bin = np.argsort(bins, kind="stable")
    pieces = np.stack([order[owner], begin, end], axis=1)[by_bin]
    starts = np.searchsorted(bins[by_bin], np.arange(int(bins.max(initial=-1)) + 2))
    return pieces, starts
