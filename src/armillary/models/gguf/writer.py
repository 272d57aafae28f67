"""A `Decoder` to a GGUF file that llama.cpp and this package read: F32, F16, Q8_0 or Q4_0 matrices, F32 vectors."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from armillary.core.errors import InputError
from armillary.models.decoder import Decoder
from armillary.models.gguf.mapping import interleave, interleaved_heads, stored_norm_offset, tensor_names, tensor_shape
from armillary.models.gguf.metadata import check_representable, config_metadata
from armillary.models.gguf.quant import WRITABLE, quantise
from armillary.models.gguf.reader import DEFAULT_ALIGNMENT, MAGIC
from armillary.models.gguf.rope_factors import llama3_factors
from armillary.models.gguf.types import BY_NAME, TensorType
from armillary.models.tokenizer import Tokenizer
from armillary.models.weights import hf_parameters

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}  # general.file_type: what most tensors are
_QUANTISATION_VERSION = 2
_ARRAY_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}

# name, row-major shape, type, and what gives the bytes when their turn comes: one tensor is in memory at a time
Entry = tuple[str, tuple[int, ...], TensorType, Callable[[], np.ndarray]]


def write_gguf(
    decoder: Decoder,
    path: str | Path,
    kind: str = "F16",
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model, with the tokenizer's keys and any further `metadata`; an interrupted write leaves no file.

    Matrices are stored as `kind`; vectors always as F32. Raises `InputError` for a kind, a row length or a config that GGUF cannot hold.
    """
    if kind not in WRITABLE:
        raise InputError(f"tensors cannot be written as {kind}", f"choose one of {', '.join(WRITABLE)}")
    config = decoder.config
    names = tensor_names(config)
    parameters = hf_parameters(decoder)
    keys = config_metadata(config) | {"general.file_type": FILE_TYPES[kind], "general.quantization_version": _QUANTISATION_VERSION}
    check_representable(config, keys, {name: tensor_shape(config, name) for name in names})
    if tokenizer is not None:
        keys |= tokenizer.gguf_metadata()
    keys |= dict(metadata or {})

    def entry(name: str) -> Entry:
        shape = tensor_shape(config, name)
        stored = kind if len(shape) > 1 else "F32"

        def read() -> np.ndarray:
            values = parameters[names[name]].detach().to("cpu", torch.float32).numpy()
            if heads := interleaved_heads(config, name):
                values = interleave(values, heads)
            if offset := stored_norm_offset(config, name):
                values = values + np.float32(offset)
            return quantise(values.reshape(-1, shape[-1]), stored)

        return name, shape, BY_NAME[stored], read

    entries = [entry(name) for name in names]
    for name, shape, stored, _ in entries:
        if shape[-1] % stored.block:
            raise InputError(f"{name} has rows of {shape[-1]} elements; {stored.name} stores {stored.block} at a time", "write it as F16")
    if config.rope.kind == "llama3":
        factors = llama3_factors(config.rope, config.head_dim)
        entries.append(("rope_freqs.weight", factors.shape, BY_NAME["F32"], lambda: factors.view(np.uint8)))
    return write_file(path, keys, entries)


def write_file(path: str | Path, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> Path:
    """A GGUF v3 file of these keys and tensors, moved into place once complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(key, value)
    offset = 0
    for name, shape, kind, _ in entries:
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.id, offset)
        offset += _padded(_stored_bytes(shape, kind))
    header += b"\0" * (_padded(len(header)) - len(header))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for entry in entries:
                _write_tensor(file, entry)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    name, shape, kind, read = entry
    data = np.ascontiguousarray(read())
    size = _stored_bytes(shape, kind)
    if data.nbytes != size:
        raise InputError(f"tensor {name} gave {data.nbytes:,} bytes; {kind.name} of {shape} takes {size:,}", "give the tensor's own bytes")
    file.write(data.data)
    file.write(b"\0" * (_padded(size) - size))


def _stored_bytes(shape: tuple[int, ...], kind: TensorType) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * kind.row_bytes(shape[-1])


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Type and bytes of one value: integers become uint32 where they fit, floats float32, lists arrays of their first element's type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return struct.pack("<II", 4, value)
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    array = np.asarray(value)
    if isinstance(value, list):
        array = array.astype({"i": np.int32, "f": np.float32}.get(array.dtype.kind, array.dtype))
    kind = _ARRAY_KINDS.get(array.dtype.str[1:])
    if array.ndim != 1 or kind is None:
        raise InputError(f"key {key!r} holds a value that GGUF cannot store", "give a number, a string, or a list of one kind of them")
    return struct.pack("<IIQ", 9, kind, len(array)) + np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
