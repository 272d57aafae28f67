"""A GGUF file's weights: as blocks for the kernels that take them, as floats, or all of them as a `Decoder`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from armillary.core.errors import InputError
from armillary.kernels.packed_weight import Blocks, takes_straight
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.file_stamp import FileStamp
from armillary.models.gguf.mapping import check_tensors, deinterleave, interleaved_heads, stored_norm_offset
from armillary.models.gguf.metadata import gguf_config
from armillary.models.gguf.quant import READABLE, dequantise_blocks
from armillary.models.gguf.reader import GGUFFile
from armillary.models.weights import assemble


class GGUFWeights:
    """`models.stored.Weights` of an open file.

    Raises `FormatError` for a damaged or incomplete file, `InputError` for a model that this version cannot run.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.config: ModelConfig = gguf_config(file)
        self.files: Sequence[FileStamp] = (file.stamp,) if file.stamp is not None else ()
        self._stored = {ours: file.tensors[theirs] for theirs, ours in check_tensors(file, self.config).items()}
        for tensor in self._stored.values():
            if tensor.type.name not in READABLE:
                raise InputError(
                    f"tensor {tensor.name} is of type {tensor.type.name}, which cannot be dequantised",
                    f"convert the model to one of {', '.join(READABLE)}",
                )

    def kind(self, name: str) -> str:
        return self._stored[name].type.name

    def blocks(self, name: str) -> Blocks | None:
        tensor = self._stored[name]
        if len(tensor.shape) != 2 or not takes_straight(tensor.type.name):
            return None
        return Blocks(tensor.type.name, self._in_order(name))

    def tensor(self, name: str) -> torch.Tensor:
        """float32."""
        with ThreadPoolExecutor(_threads()) as pool:
            return self._floats(name, pool)

    def release(self, name: str) -> None:
        """The file keeps it."""

    def decoder(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """On the CPU, with parameters of `dtype`: every tensor is dequantised once, straight into its parameter's memory."""
        with ThreadPoolExecutor(_threads()) as pool:
            return assemble(self.config, self._stored, lambda name: self._floats(name, pool).to(dtype))

    def _in_order(self, name: str) -> np.ndarray:
        """The stored bytes [rows, row_bytes], rows as the decoder has them. Whole rows move, so it is done before they grow."""
        tensor = self._stored[name]
        heads = interleaved_heads(self.config, tensor.name)
        if not heads:
            return tensor.data
        # A bias is one row of scalars.
        rows = tensor.data if len(tensor.shape) > 1 else tensor.data.reshape(tensor.shape[0], -1)
        return deinterleave(rows, heads).reshape(tensor.data.shape)

    def _floats(self, name: str, pool: Executor) -> torch.Tensor:
        tensor = self._stored[name]
        data = self._in_order(name)
        values = torch.empty(tensor.shape)
        dequantise_blocks(data, tensor.type, values.numpy().reshape(data.shape[0], -1), pool)
        if offset := stored_norm_offset(self.config, tensor.name):
            values -= offset
        return values


def load_gguf(source: str | Path | GGUFFile, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model in a file, on the CPU, with parameters of `dtype`. Raises as `GGUFWeights`."""
    return GGUFWeights(source if isinstance(source, GGUFFile) else GGUFFile.open(source)).decoder(dtype)


def _threads() -> int:
    return min(4, os.cpu_count() or 1)
