"""From rows of prepared data to the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from armillary.core.errors import InputError
from armillary.data.batches import Batch, BatchStream, Packing, Source
from armillary.train.config import BatchConfig
from armillary.train.microbatch import MicroBatch, from_rows


class RowBatches:
    """One rank's share of one global batch after another, cut into micro-batches of `batch.micro_rows` rows. A `trainer.Batches`."""

    def __init__(
        self, source: Source, batch: BatchConfig, *, seed: int = 0, packing: Packing = "concat", rank: int = 0, world: int = 1
    ) -> None:
        rows = rows_of_a_rank(batch, world)
        self.micro_rows = min(batch.micro_rows, rows)
        self.stream = BatchStream(source, rows=rows, length=batch.length, seed=seed, packing=packing, rank=rank, world=world)

    def __iter__(self) -> Iterator[Sequence[MicroBatch]]:
        return self

    def __next__(self) -> Sequence[MicroBatch]:
        batch = next(self.stream)
        return [micro_batch(batch, start, start + self.micro_rows) for start in range(0, self.stream.rows, self.micro_rows)]

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)


def micro_batch(batch: Batch, start: int, end: int) -> MicroBatch:
    """Rows start .. end-1 of a batch, flat."""
    rows = slice(start, end)
    return from_rows(batch.tokens[rows], batch.targets[rows], batch.positions[rows])


def rows_of_a_rank(batch: BatchConfig, world: int) -> int:
    """Rows that one of `world` data-parallel ranks reads a step. Raises InputError when nothing divides."""
    if batch.rows % world:
        raise InputError(
            f"batch.rows = {batch.rows} does not divide among {world} data-parallel ranks",
            f"choose a multiple of {world}: it is the global batch",
            field="batch.rows",
        )
    rows = batch.rows // world
    if rows > batch.micro_rows and rows % batch.micro_rows:
        raise InputError(
            f"{rows} rows a rank (batch.rows = {batch.rows}) are no multiple of batch.micro_rows = {batch.micro_rows}",
            "choose a divisor; it decides memory, never the result",
            field="batch.micro_rows",
        )
    return rows
