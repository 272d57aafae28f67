"""Tokens on disk: a folder of memory-mapped shards, documents kept apart, and a manifest that says what they are.

    manifest.json       counts, the tokenizer's identity, the SHA-256 of every file, where the text came from
    documents.bin       int64 [documents + 1]: where each document begins, counted in tokens over all shards
    tokens-00000.bin    uint16 or uint32 little-endian, whole documents one after another
    scored-00000.bin    uint8, one a token: 1 where a loss may be taken (only in data that has masks, such as chats)

Written beside its place and renamed into it, so that a folder is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.data.tokenizer_identity import tokenizer_identity
from armillary.models.fields import read_json

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

FORMAT: Final = "armillary-tokens"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
DOCUMENTS: Final = "documents.bin"
MAX_MANIFEST_BYTES: Final = 64 * 1024 * 1024
MAX_DOCUMENTS: Final = 1 << 40
MAX_SHARD_TOKENS: Final = 1 << 31
MAX_VOCABULARY: Final = 1 << 24
_FIX: Final = "prepare the data again"


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """One document: its token ids and, where only a part of it is to be learnt, one flag a token."""

    tokens: ArrayLike  # [tokens] integers
    scored: ArrayLike | None = None  # [tokens] booleans


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
        manifest = _read_manifest(folder)
        for file in (manifest.index, *manifest.shards, *manifest.scored):
            _check_file(folder, file, verify)
        # Read whole: small, and a change on disk cannot move a document's bounds later.
        offsets = np.fromfile(folder / manifest.index.name, dtype="<i8")
        if offsets[0] != 0 or offsets[-1] != manifest.tokens or (np.diff(offsets) < 1).any():
            raise FormatError(f"{folder / manifest.index.name}: the documents' offsets do not cover the tokens in order", _FIX)
        starts = np.cumsum([shard.tokens for shard in manifest.shards])
        if not np.isin(starts, offsets).all():
            raise FormatError(f"{folder / manifest.index.name}: a document lies across two shards", _FIX)
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
                f"{self.folder}: document {index} holds token {int(tokens.max()):,}; the vocabulary has {self.vocab_size:,}", _FIX
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


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    raw = read_json(path, MAX_MANIFEST_BYTES)
    if raw.get("format") != FORMAT:
        raise FormatError(
            f"{path} is not a manifest of token shards (format {str(raw.get('format'))[:40]!r})",
            "give a folder that armillary data prepare made",
        )
    if raw.get("version") != VERSION:
        raise FormatError(f"{path} has version {str(raw.get('version'))[:20]!r}; this Armillary reads {VERSION}", _FIX)

    def integer(values: Mapping[str, Any], key: str, high: int, low: int = 1) -> int:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise FormatError(f"{path}: {key!r} is {str(value)[:40]!r}, not an integer in {low:,} .. {high:,}", _FIX)
        return value

    def text(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        if not isinstance(value, str) or len(value) > 256:
            raise FormatError(f"{path}: {key!r} is {str(value)[:40]!r}, not a short text", _FIX)
        return value

    def shard_file(value: Any, high: int) -> ShardFile:
        if not isinstance(value, dict):
            raise FormatError(f"{path}: a file is listed as {str(value)[:40]!r}", _FIX)
        name = text(value, "name")
        if Path(name).name != name or name.startswith("."):
            raise FormatError(f"{path}: {name!r} is not the name of a file in the folder", _FIX)
        return ShardFile(name, integer(value, "tokens", high), integer(value, "bytes", 1 << 62), text(value, "sha256"))

    def shard_files(key: str) -> tuple[ShardFile, ...]:
        values = raw.get(key)
        if not isinstance(values, list) or len(values) > 1 << 20:
            raise FormatError(f"{path}: {key!r} is {str(values)[:40]!r}, not a list of files", _FIX)
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
        raise FormatError(f"{path}: the sizes of its files contradict its counts", _FIX)
    return manifest


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
            raise FormatError(f"{path} is damaged: its SHA-256 is {have[:16]}..., the manifest says {file.sha256[:16]}...", _FIX)
