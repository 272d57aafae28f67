"""Where torch.distributed.checkpoint puts tensors: a safetensors file a rank and one JSON manifest. No pickle is written or read.

DCP plans which rank writes and reads which block of which tensor, under global names; here is only what a block becomes on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from armillary.core.errors import ArmillaryError, FormatError

MANIFEST: Final = "manifest.json"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 30
_STAGED_PIECE: Final = 1 << 22  # bytes hashed and written at a time
_NAMES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}


class CheckpointError(ArmillaryError):
    """A checkpoint that could not be written, or cannot be used."""


def part_file(rank: int) -> str:
    """The file of the blocks that a rank wrote."""
    return f"part-{rank:05}.safetensors"


class Staging(StorageWriter):
    """Takes this rank's share of a plan as copies in memory; nothing touches the disk. `tensors` on the coordinator says where all blocks go."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.blocks: dict[str, Tensor] = {}  # this rank's, by key
        self.tensors: dict[str, Any] = {}  # name -> dtype, shape, chunks [offsets, sizes, rank]; empty on other ranks

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            value: Any = planner.resolve_data(item)
            block = value.detach().to("cpu", copy=True).contiguous()
            self.blocks[_key(item.index)] = block
            results.append(WriteResult(item.index, block.nbytes, self.rank))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        owner = {result.index: result.storage_data for rank in results for result in rank}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), name  # all that is given to DCP are tensors
            chunks = [[list(c.offsets), list(c.sizes), owner[MetadataIndex(name, c.offsets)]] for c in stored.chunks]
            self.tensors[name] = {"dtype": _NAMES[stored.properties.dtype], "shape": list(stored.size), "chunks": chunks}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def write_part(path: Path, blocks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Blocks as a safetensors file that is on the disk when this returns. Returns its size and checksum. Raises OSError."""
    header: dict[str, Any] = {}
    offset = 0
    for key, block in blocks.items():
        header[key] = {"dtype": _NAMES[block.dtype], "shape": list(block.shape), "data_offsets": [offset, offset + block.nbytes]}
        offset += block.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    checksum = hashlib.sha256()
    with path.open("wb") as file:
        _put(file, checksum, memoryview(len(raw).to_bytes(8, "little") + raw))
        for block in blocks.values():
            if block.numel():
                _put(file, checksum, block.reshape(-1).view(torch.uint8).numpy().data)
        synchronise(file)
    return {"bytes": 8 + len(raw) + offset, "sha256": checksum.hexdigest()}


def _put(file: BinaryIO, checksum: Any, data: memoryview) -> None:
    for start in range(0, len(data), _STAGED_PIECE):
        piece = data[start : start + _STAGED_PIECE]
        checksum.update(piece)
        file.write(piece)


def synchronise(file: Any) -> None:
    """What was written is on the disk, not in a buffer."""
    file.flush()
    os.fsync(file.fileno())


def synchronise_folder(folder: Path) -> None:
    """The names in a folder are on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """The last file of a checkpoint, with a checksum of itself."""
    text = json.dumps(body, sort_keys=True)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"version": VERSION, "sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}))
        synchronise(file)
    synchronise_folder(folder)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself. tensors: as `Staging.tensors`; parts: file -> bytes, sha256; pieces: JSON state by name."""

    folder: Path
    step: int
    world: int
    optimizer: str
    tensors: Mapping[str, Any]
    parts: Mapping[str, Any]
    pieces: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises FormatError, naming the file, for one that is damaged or of another version."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ValueError("it is larger than any manifest")
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["version"] != VERSION:
                raise FormatError(
                    f"{path} has version {str(raw['version'])[:20]}; this Armillary reads {VERSION}", "use the one that wrote it"
                )
            if hashlib.sha256(raw["body"].encode()).hexdigest() != raw["sha256"]:
                raise ValueError("its checksum does not match")
            body = json.loads(raw["body"])
            return cls(folder, *(body[name] for name in ("step", "world", "optimizer", "tensors", "parts", "pieces")))
        except FormatError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is damaged ({str(error)[:100]})", _fix(folder)) from error

    def check(self, part: str) -> None:
        """Raises FormatError unless a part is byte for byte what was written."""
        path, told = self.folder / part, self.parts[part]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise FormatError(f"{path} is missing", _fix(self.folder)) from error
        if size != told["bytes"]:
            raise FormatError(f"{path} has {size:,} bytes, not the {told['bytes']:,} that were written", _fix(self.folder))
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                raise FormatError(f"{path} is damaged: its checksum does not match the manifest's", _fix(self.folder))


def _fix(folder: Path) -> str:
    return f"remove {folder} to go on from the checkpoint before it"


class Parts(StorageReader):
    """The blocks of a checkpoint, whatever layout wrote them and whatever layout asks."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        stored: dict[str, Any] = {}
        places: dict[MetadataIndex, int] = {}
        for name, tensor in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in tensor["chunks"]]
            properties = TensorProperties(_DTYPES[tensor["dtype"]])
            stored[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
            places |= {MetadataIndex(name, offsets): rank for offsets, _, rank in tensor["chunks"]}
        return Metadata(stored, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[int, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(self._places[item.storage_index], []).append(item)
        for rank, items in wanted.items():
            path = self.manifest.folder / part_file(rank)
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for item in items:
                        target = planner.resolve_tensor(item).detach()
                        key = _key(item.storage_index)
                        ranges = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                        target.copy_(file.get_slice(key)[ranges] if ranges else file.get_tensor(key))
                        planner.commit_tensor(item, target)
            except SafetensorError as error:
                raise FormatError(f"{path} cannot be read ({str(error)[:100]})", _fix(self.manifest.folder)) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"
