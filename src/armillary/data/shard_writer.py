"""Documents of tokens to a folder of shards, in one pass, one document held at a time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike

from armillary.core.errors import InputError
from armillary.data.shard_manifest import FORMAT, MANIFEST, VERSION, Manifest, ShardFile
from armillary.data.tokenizer_identity import tokenizer_identity

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

DOCUMENTS: Final = "documents.bin"
MAX_SHARD_TOKENS: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """One document: its token ids and, where only a part of it is to be learnt, one flag a token."""

    tokens: ArrayLike  # [tokens] integers
    scored: ArrayLike | None = None  # [tokens] booleans


def write_shards(
    folder: str | Path,
    documents: Iterable[ArrayLike | TokenDocument],
    *,
    tokenizer: Tokenizer,
    eos: int | None = None,
    shard_tokens: int = 64 << 20,
    source: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes the documents as a folder of shards; `eos` is appended to each that does not end with it.

    Streams: one document is held at a time. Empty documents are left out. Raises `InputError` when the folder exists, when there is
    no document, for ids outside the vocabulary and for flags of another length; then nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already", "remove it, or choose another folder")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InputError(f"a shard of {shard_tokens:,} tokens is outside 1 .. {MAX_SHARD_TOKENS:,}", "choose a bound between")
    vocabulary = tokenizer.vocab_size
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        part = Path(temporary) / "shards"
        part.mkdir()
        writer = _Writer(part, vocabulary, eos, shard_tokens)
        try:
            for index, document in enumerate(documents):
                writer.add(index, document)
            files, scored, index_file, lengths = writer.finish()
        finally:
            writer.close()
        manifest = Manifest(
            documents=len(lengths),
            tokens=int(sum(lengths)),
            dtype=writer.dtype,
            vocab_size=vocabulary,
            tokenizer=tokenizer_identity(tokenizer),
            eos=eos,
            shards=files,
            scored=scored,
            index=index_file,
            source=dict(source or {}),
        )
        written = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
        with (part / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(written, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder)
    return manifest


class _Writer:
    """The open shard, and what has been written so far."""

    def __init__(self, folder: Path, vocabulary: int, eos: int | None, shard_tokens: int) -> None:
        self.folder, self.vocabulary, self.eos, self.shard_tokens = folder, vocabulary, eos, shard_tokens
        self.dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
        self.lengths: list[int] = []
        self.masked: bool | None = None
        self.tokens: list[ShardFile] = []
        self.scored: list[ShardFile] = []
        self._open: list[_HashedFile] = []
        self._filled = 0

    def add(self, index: int, document: ArrayLike | TokenDocument) -> None:
        whole = document if isinstance(document, TokenDocument) else TokenDocument(document)
        ids = np.asarray(whole.tokens)
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"document {index} is of shape {ids.shape} and type {ids.dtype}", "give a list of token ids")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise InputError(
                f"document {index} holds token {int(ids.max() if ids.min() >= 0 else ids.min())}; the vocabulary has {self.vocabulary:,}",
                "tokenize it with the tokenizer that is given",
            )
        flags = None if whole.scored is None else np.asarray(whole.scored).astype(np.uint8)
        if flags is not None and (flags.shape != ids.shape or flags.max(initial=0) > 1):
            raise InputError(f"document {index} has {ids.size} tokens and flags of shape {flags.shape}", "give one boolean a token")
        if self.masked is None:
            self.masked = flags is not None
        if self.masked != (flags is not None):
            raise InputError(
                f"document {index} has {'no ' if flags is None else ''}flags, unlike those before it", "give them to all or to none"
            )
        if self.eos is not None and ids[-1] != self.eos:
            ids = np.append(ids, self.eos)
            flags = None if flags is None else np.append(flags, flags[-1])
        if ids.size > MAX_SHARD_TOKENS:
            raise InputError(f"document {index} has {ids.size:,} tokens; at most {MAX_SHARD_TOKENS:,} fit a shard", "split it")
        if self._open and self._filled + ids.size > self.shard_tokens:
            self._close_shard()
        if not self._open:
            self._open_shard()
        self._open[0].write(ids.astype("<u2" if self.dtype == "uint16" else "<u4").tobytes())
        if flags is not None:
            self._open[1].write(flags.tobytes())
        self._filled += ids.size
        self.lengths.append(ids.size)

    def finish(self) -> tuple[tuple[ShardFile, ...], tuple[ShardFile, ...], ShardFile, list[int]]:
        if not self.lengths:
            raise InputError("there is no document to write", "check the files and the filters that were given")
        self._close_shard()
        index = _HashedFile(self.folder / DOCUMENTS)
        index.write(np.cumsum([0, *self.lengths], dtype="<i8").tobytes())
        return tuple(self.tokens), tuple(self.scored), index.finish(len(self.lengths) + 1), self.lengths

    def close(self) -> None:
        for file in self._open:
            file.close()

    def _open_shard(self) -> None:
        names = ["tokens", "scored"] if self.masked else ["tokens"]
        self._open = [_HashedFile(self.folder / f"{name}-{len(self.tokens):05d}.bin") for name in names]
        self._filled = 0

    def _close_shard(self) -> None:
        for file, files in zip(self._open, (self.tokens, self.scored), strict=False):
            files.append(file.finish(self._filled))
        self._open = []


class _HashedFile:
    """A file that knows its SHA-256 when it is complete, and is on the disk then."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._bytes = path, hashlib.sha256(), 0
        self._file: IO[bytes] = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self, tokens: int) -> ShardFile:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardFile(self._path.name, tokens, self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()
