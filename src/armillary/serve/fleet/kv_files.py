"""A sequence's keys and values in a file of shared memory: left by the worker that computed its prompt, fetched by the one that goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from armillary.core.errors import InputError
from armillary.serve.executors.forward import Forward


class KVFiles:
    """`host.Files` for a model's pool of blocks of `block_size` tokens."""

    address = ""  # a path says it all

    def __init__(self, forward: Forward, block_size: int) -> None:
        self._forward, self._block_size = forward, block_size

    def leave(self, place: str) -> LeaveFile:
        return LeaveFile(self._forward, self._block_size, Path(place))

    def fetch(self, place: str, tokens: int, size: int) -> FetchFile:
        """Raises OSError when it is not there, InputError when it is not what was announced."""
        return FetchFile(self._forward, -(-tokens // self._block_size), Path(place), tokens, size)

    def free(self, place: str) -> None:
        """Files are removed by the router."""


class LeaveFile:
    """Writes the blocks of a sequence when its prompt has been computed."""

    def __init__(self, forward: Forward, block_size: int, path: Path) -> None:
        self._forward, self._block_size, self._path = forward, block_size, path
        self.left: dict[str, int] | None = None

    def write(self, table: Sequence[int], tokens: int) -> None:
        """Whole or not at all, and not if the memory is full: the next worker then computes the prompt itself."""
        data = self._forward.read_blocks(table[: -(-tokens // self._block_size)])
        part = self._path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                data.contiguous().numpy().tofile(file)
            part.rename(self._path)
        except OSError:
            part.unlink(missing_ok=True)
            return
        self.left = {"tokens": tokens, "bytes": data.numel()}


class FetchFile:
    """Opened when the request comes, so that nobody can take it away; read when the pool has blocks for it."""

    def __init__(self, forward: Forward, blocks: int, path: Path, tokens: int, size: int) -> None:
        self.tokens = tokens
        self._forward, self._blocks = forward, blocks
        self._file = path.open("rb")
        if os.fstat(self._file.fileno()).st_size != size or size % blocks:
            self.close()
            raise InputError(f"{path} does not hold the {size:,} bytes of {blocks} KV blocks", "is a worker of another version?")

    def into(self, table: Sequence[int]) -> None:
        """Put the keys and values into the first blocks of a sequence's table."""
        data = torch.from_numpy(np.memmap(self._file, np.uint8, "c")).reshape(self._blocks, -1)
        self._forward.write_blocks(table[: self._blocks], data)

    def close(self) -> None:
        self._file.close()
