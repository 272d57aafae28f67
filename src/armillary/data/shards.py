"""Tokens on disk: a folder of memory-mapped shards, documents kept apart, and a manifest that says what they are.

    manifest.json       counts, the tokenizer's identity, the SHA-256 of every file, where the text came from
    documents.bin       int64 [documents + 1]: where each document begins, counted in tokens over all shards
    tokens-00000.bin    uint16 or uint32 little-endian, whole documents one after another
    scored-00000.bin    uint8, one a token: 1 where a loss may be taken (only in data that has masks, such as chats)

Written beside its place and renamed into it, so that a folder is whole or absent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.data.shard_manifest import FIX, MANIFEST, Manifest, ShardFile, read_manifest


class TokenShards:
    """The documents of a folder, read through memory maps. Made by `open`."""

    def __init__(self, folder: Path, manifest: Manifest, offsets: NDArray[np.int64], tokens: list[Any], scored: list[Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.offsets = offsets  # [documents + 1]
        self._lengths = np.diff(offsets)
        self._tokens, self._scored = tokens, scored
        self._starts = np.cumsum([0, *(shard.tokens for shard in manifest.shards)])  # [shards + 1], in tokens

    @classmethod
    def open(cls, folder: str | Path, split: str | None = None, *, verify: bool = True) -> TokenShards:
        """The shards in `folder`, or in its subfolder `split` ('train', 'validation').

        With `verify`, every file's SHA-256 is compared (about a second a GB); without it only sizes and offsets are, and ids are
        checked against the vocabulary as they are read. Raises `NotFoundError`, or `FormatError` for damaged or foreign files.
        """
        folder = Path(folder)
        if split is not None:
            folder = folder / split
        if not (folder / MANIFEST).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
            hint = f"it has the splits {', '.join(inside)}: name one" if inside else "make them with: armillary data prepare"
            raise NotFoundError(f"{folder} holds no token shards (no {MANIFEST})", hint)
        manifest = read_manifest(folder)
        for file in (manifest.index, *manifest.shards, *manifest.scored):
            _check_file(folder, file, verify)
        # Read whole: small, and a change on disk cannot move a document's bounds later.
        offsets = np.fromfile(folder / manifest.index.name, dtype="<i8")
        if offsets[0] != 0 or offsets[-1] != manifest.tokens or (np.diff(offsets) < 1).any():
            raise FormatError(f"{folder / manifest.index.name}: the documents' offsets do not cover the tokens in order", FIX)
        starts = np.cumsum([shard.tokens for shard in manifest.shards])
        if not np.isin(starts, offsets).all():
            raise FormatError(f"{folder / manifest.index.name}: a document lies across two shards", FIX)
        dtype = "<u2" if manifest.dtype == "uint16" else "<u4"
        tokens = [np.memmap(folder / shard.name, dtype=dtype, mode="r") for shard in manifest.shards]
        scored = [np.memmap(folder / file.name, dtype=np.uint8, mode="r") for file in manifest.scored]
        return cls(folder, manifest, offsets, tokens, scored)

    @property
    def documents(self) -> int:
        return self.manifest.documents

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def tokenizer(self) -> str:
        """The identity of the tokenizer that made the tokens (`tokenizer_identity`)."""
        return self.manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document: [documents]."""
        return self._lengths

    def document(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """The tokens `begin` to `end` of one document (all of them): a view of [tokens] uint16 or uint32.

        Raises `FormatError` for an id beyond the vocabulary.
        """
        tokens: NDArray[Any] = self._slice(self._tokens, index, begin, end)
        if tokens.max(initial=0) >= self.vocab_size:
            raise FormatError(
                f"{self.folder}: document {index} holds token {int(tokens.max()):,}; the vocabulary has {self.vocab_size:,}", FIX
            )
        return tokens

    def scored(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[np.uint8] | None:
        """One flag for each of these tokens (may a loss be taken on it?), None when all count."""
        return self._slice(self._scored, index, begin, end) if self._scored else None

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
        """The documents of an epoch in the order in which they are read: a pure function of its arguments."""
        if not shuffle:
            return np.arange(self.documents)
        return np.random.default_rng([seed, epoch, 0xD0C]).permutation(self.documents)

    def _slice(self, files: list[Any], index: int, begin: int, end: int | None) -> Any:
        if not 0 <= index < self.documents:
            raise InputError(f"document {index} is outside 0 .. {self.documents - 1}", "give the number of a document that is there")
        start, length = int(self.offsets[index]), int(self._lengths[index])
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        start -= int(self._starts[shard])
        return files[shard][start + begin : start + (length if end is None else min(end, length))]


def _check_file(folder: Path, file: ShardFile, verify: bool) -> None:
    path = folder / file.name
    if not path.is_file():
        raise FormatError(f"{path} is missing", "copy the whole folder, or prepare the data again")
    size = path.stat().st_size
    if size != file.bytes:
        raise FormatError(
            f"{path} has {size:,} bytes; the manifest says {file.bytes:,}", "the file was cut or replaced: prepare the data again"
        )
    if verify:
        with path.open("rb") as opened:
            have = hashlib.file_digest(opened, "sha256").hexdigest()
        if have != file.sha256:
            raise FormatError(f"{path} is damaged: its SHA-256 is {have[:16]}..., the manifest says {file.sha256[:16]}...", FIX)
