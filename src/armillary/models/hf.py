"""Hugging Face folders in and out: config.json, safetensors (one file or shards with an index), generation_config.json."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.models.config_file import read_config
from armillary.models.decoder import Decoder
from armillary.models.families import to_hf
from armillary.models.fields import read_json
from armillary.models.hf_tokenizer import write_tokenizer
from armillary.models.weights import assemble, hf_parameters

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 * 1024 * 1024
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder in a folder. Weights are memory-mapped; `dtype` None keeps the stored one, and then nothing is copied.

    Raises as `read_config`, and FormatError when a file is damaged, a shard leaves the folder, or tensors and
    config do not belong together (naming the tensor).
    """
    folder = Path(folder)
    config = read_config(folder)
    with opened_tensors(folder) as (names, read):
        return assemble(config, names, read, dtype)


@contextlib.contextmanager
def opened_tensors(folder: Path) -> Iterator[tuple[Collection[str], Callable[[str], Tensor]]]:
    """The names of a folder's tensors, and how to read one; memory-mapped as long as the files are open."""
    with contextlib.ExitStack() as stack:
        files, weight_map = _shards(folder)
        places = {file: stack.enter_context(_opened(folder / file)) for file in files}
        where = _where(places, weight_map)

        def read(name: str) -> Tensor:
            try:
                tensor: Tensor = places[where[name]].get_tensor(name)
            except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                raise FormatError(f"tensor {name} in {where[name]} cannot be read ({str(error)[:100]})", "fetch the file again") from error
            return tensor

        yield where, read


def save_hf(
    decoder: Decoder,
    folder: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` and `load_hf` load. Weights past `max_shard_bytes` are split into shards.

    `tokenizer` is a `Tokenizer`, or a folder whose tokenizer files are copied. Raises InputError when the folder
    holds weights already (unless `overwrite`), or when the family's config.json cannot express the model.
    """
    folder = Path(folder)
    parameters = hf_parameters(decoder)
    stored = dtype or next(iter(parameters.values())).dtype
    if stored not in DTYPES:
        raise InputError(f"weights of {stored} cannot be saved", f"choose one of {', '.join(DTYPES.values())}", field="dtype")
    config = to_hf(decoder.config) | {"torch_dtype": DTYPES[stored], "dtype": DTYPES[stored]}
    old = [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]
    if old and not overwrite:
        raise InputError(f"{folder} holds {old[0].name} already", "choose an empty folder, or overwrite it on purpose")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split({name: parameter.numel() * stored.itemsize for name, parameter in parameters.items()}, max_shard_bytes)
    files = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: parameters[name].detach().to("cpu", stored).contiguous() for name in names}
        part = folder / f"{file}.part"
        part.touch()
        mode = part.stat().st_mode  # as the reader's umask wants it: safetensors lets nobody else read
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(mode)
    for path in old:
        path.unlink()
    for file in files:
        os.replace(folder / f"{file}.part", folder / file)
    if len(shards) > 1:
        total = sum(parameter.numel() for parameter in parameters.values()) * stored.itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    _write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files, by name, and the index (None for a single file), which is followed only to plain names in the folder."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], None
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise InputError(
                f"{folder} holds pickled weights only", "pickle can run code and is never read: convert the model to safetensors"
            )
        raise NotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}", "fetch the model's weights")
    weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{INDEX} has no weight_map from tensor names to file names", "fetch the file again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if file != Path(file).name or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise FormatError(f"{INDEX} names the shard {file[:80]!r}", "a shard is a .safetensors file in the same folder")
        if not (folder / file).is_file():
            raise FormatError(f"{INDEX} names the shard {file[:80]!r}, which is not in the folder", "fetch the missing shard")
    return files, weight_map


def _where(places: dict[str, Any], weight_map: dict[str, str] | None) -> dict[str, str]:
    """Tensor name to file name; an index must say the same as the files."""
    where: dict[str, str] = {}
    for file, handle in places.items():
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            if name in where:
                raise FormatError(
                    f"tensor {name} is in {where[name]} and in {file}", "a tensor belongs in one shard: fetch the model again"
                )
            where[name] = file
    if weight_map is not None:
        for name, file in weight_map.items():
            if where.get(name) != file:
                raise FormatError(f"{INDEX} places tensor {name[:200]} in {file}, which does not hold it", "fetch index and shards again")
        if extra := next((name for name in where if name not in weight_map), None):
            raise FormatError(f"tensor {extra} in {where[extra]} is not in {INDEX}", "fetch index and shards again")
    return where


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file: its header (bounded at 100 MB by the format) is checked against the file before any tensor is read."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path.name} is not a whole safetensors file ({str(error)[:100]})", "fetch the file again") from error
    with handle as opened:
        yield opened


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, grouped so that each group stays within `limit` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
