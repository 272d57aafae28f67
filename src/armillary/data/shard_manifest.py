"""What a folder of token shards says of itself, bounded and checked before anything in it is believed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import FormatError
from armillary.models.fields import read_json

FORMAT: Final = "armillary-tokens"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 64 * 1024 * 1024
MAX_DOCUMENTS: Final = 1 << 40
MAX_VOCABULARY: Final = 1 << 24
FIX: Final = "prepare the data again"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file of the folder, as the manifest lists it. Sizes in tokens and bytes."""

    name: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds. `source` is JSON data about where the text came from and how it was made."""

    documents: int
    tokens: int
    dtype: str  # "uint16" or "uint32"
    vocab_size: int
    tokenizer: str  # the tokenizer's identity
    eos: int | None  # the token that ends every document, None when none was written
    shards: tuple[ShardFile, ...]
    scored: tuple[ShardFile, ...]  # empty, or one a shard
    index: ShardFile
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the contents: equal for folders that give a trainer the same tokens."""
        files = [file.sha256 for file in (self.index, *self.shards, *self.scored)]
        return hashlib.sha256("\n".join([self.dtype, str(self.vocab_size), self.tokenizer, *files]).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises FormatError, naming the file and the key, for what is foreign, out of bounds or contradicts itself."""
    path = folder / MANIFEST
    raw = read_json(path, MAX_MANIFEST_BYTES)
    if raw.get("format") != FORMAT:
        raise FormatError(
            f"{path} is not a manifest of token shards (format {str(raw.get('format'))[:40]!r})",
            "give a folder that armillary data prepare made",
        )
    if raw.get("version") != VERSION:
        raise FormatError(f"{path} has version {str(raw.get('version'))[:20]!r}; this Armillary reads {VERSION}", FIX)

    def integer(values: Mapping[str, Any], key: str, high: int, low: int = 1) -> int:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise FormatError(f"{path}: {key!r} is {str(value)[:40]!r}, not an integer in {low:,} .. {high:,}", FIX)
        return value

    def text(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        if not isinstance(value, str) or len(value) > 256:
            raise FormatError(f"{path}: {key!r} is {str(value)[:40]!r}, not a short text", FIX)
        return value

    def shard_file(value: Any, high: int) -> ShardFile:
        if not isinstance(value, dict):
            raise FormatError(f"{path}: a file is listed as {str(value)[:40]!r}", FIX)
        name = text(value, "name")
        if Path(name).name != name or name.startswith("."):
            raise FormatError(f"{path}: {name!r} is not the name of a file in the folder", FIX)
        return ShardFile(name, integer(value, "tokens", high), integer(value, "bytes", 1 << 62), text(value, "sha256"))

    def shard_files(key: str) -> tuple[ShardFile, ...]:
        values = raw.get(key)
        if not isinstance(values, list) or len(values) > 1 << 20:
            raise FormatError(f"{path}: {key!r} is {str(values)[:40]!r}, not a list of files", FIX)
        return tuple(shard_file(value, 1 << 40) for value in values)

    source = raw.get("source")
    manifest = Manifest(
        documents=integer(raw, "documents", MAX_DOCUMENTS),
        tokens=integer(raw, "tokens", 1 << 50),
        dtype=text(raw, "dtype"),
        vocab_size=integer(raw, "vocab_size", MAX_VOCABULARY),
        tokenizer=text(raw, "tokenizer"),
        eos=None if raw.get("eos") is None else integer(raw, "eos", MAX_VOCABULARY, low=0),
        shards=shard_files("shards"),
        scored=shard_files("scored"),
        index=shard_file(raw.get("index"), MAX_DOCUMENTS + 1),
        source=source if isinstance(source, dict) else {},
    )
    if manifest.dtype not in ("uint16", "uint32"):
        raise FormatError(f"{path}: tokens of type {manifest.dtype!r}", "uint16 and uint32 are read")
    width = 2 if manifest.dtype == "uint16" else 4
    consistent = (
        sum(shard.tokens for shard in manifest.shards) == manifest.tokens
        and all(shard.bytes == width * shard.tokens for shard in manifest.shards)
        and manifest.index.tokens == manifest.documents + 1
        and manifest.index.bytes == 8 * manifest.index.tokens
        and all(file.bytes == file.tokens for file in manifest.scored)
        and (not manifest.scored or [f.tokens for f in manifest.scored] == [s.tokens for s in manifest.shards])
    )
    if not consistent:
        raise FormatError(f"{path}: the sizes of its files contradict its counts", FIX)
    return manifest
