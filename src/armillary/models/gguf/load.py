"""A GGUF file to a `Decoder`: every tensor is dequantised once, straight into its parameter's memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from armillary.models.decoder import Decoder
from armillary.models.gguf.mapping import check_tensors, deinterleave, interleaved_heads, stored_norm_offset
from armillary.models.gguf.metadata import gguf_config
from armillary.models.gguf.quant import dequantise_blocks
from armillary.models.gguf.reader import GGUFFile
from armillary.models.weights import assemble


def load_gguf(source: str | Path | GGUFFile, dtype: torch.dtype = torch.float32, threads: int | None = None) -> Decoder:
    """The model in a file, on the CPU, with parameters of `dtype`.

    Raises `FormatError` for a damaged or incomplete file, `InputError` for a model that this version cannot run.
    """
    file = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
    config = gguf_config(file)
    stored = {ours: theirs for theirs, ours in check_tensors(file, config).items()}

    def read(name: str) -> torch.Tensor:
        tensor = file.tensors[stored[name]]
        data = tensor.data
        if heads := interleaved_heads(config, tensor.name):
            # Whole rows move, so the stored bytes are put in order before they grow. A bias is one row of scalars.
            rows = data if len(tensor.shape) > 1 else data.reshape(tensor.shape[0], -1)
            data = deinterleave(rows, heads).reshape(data.shape)
        values = torch.empty(tensor.shape)
        dequantise_blocks(data, tensor.type, values.numpy().reshape(data.shape[0], -1), threads)
        if offset := stored_norm_offset(config, tensor.name):
            values -= offset
        return values.to(dtype)

    return assemble(config, stored, read)


def parameter_count(file: GGUFFile) -> int:
    """Elements of all tensors that are weights."""
    return sum(int(np.prod(tensor.shape, dtype=object)) for tensor in file.tensors.values() if tensor.name != "rope_freqs.weight")
