"""A GGUF file to a `Decoder`: every tensor is dequantised once, straight into its parameter's memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from armillary.models.decoder import Decoder
from armillary.models.gguf.mapping import check_tensors, deinterleave, interleaved_heads, stored_norm_offset
from armillary.models.gguf.metadata import gguf_config
from armillary.models.gguf.quant import dequantise_blocks
from armillary.models.gguf.reader import GGUFFile
from armillary.models.weights import assemble


def load_gguf(source: str | Path | GGUFFile, dtype: torch.dtype = torch.float32) -> Decoder:
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
        dequantise_blocks(data, tensor.type, values.numpy().reshape(data.shape[0], -1), pool)
        if offset := stored_norm_offset(config, tensor.name):
            values -= offset
        return values.to(dtype)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return assemble(config, stored, read)
