"""Texts or chats to a folder that a trainer reads: `tokenizer/`, `train/` and `validation/` shards, with where it all came from."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers

from armillary.core.errors import InputError
from armillary.data.bpe import train_bpe
from armillary.data.near_duplicates import NearDuplicates, find_near_duplicates
from armillary.data.readers import read_records, texts
from armillary.data.shards import Manifest, TokenDocument, write_shards
from armillary.models.hf_tokenizer import write_tokenizer
from armillary.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what is going on, documents done, documents in all
_BATCH: Final = 256  # texts encoded at once


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare_text` wrote."""

    folder: Path
    tokenizer: Tokenizer
    train: Manifest
    validation: Manifest | None
    duplicates: NearDuplicates | None


def prepare_text(
    files: Sequence[Path],
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocabulary: int | None = None,
    field: str = "text",
    validation: float = 0.1,
    seed: int = 0,
    duplicates_from: float | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Prepared:
    """Reads the files' texts, splits them by document, and writes tokens; with `vocabulary`, a byte-level BPE is learnt from the training split.

    `validation` is the share of the characters that is held out, whole documents drawn by `seed`; 0 holds out nothing. Every document
    ends with the tokenizer's eos. With `duplicates_from`, of near duplicates at or above that
    Jaccard similarity only the first is kept, before the split, so that no text is in both. Texts are held in memory. Raises `InputError` when the folder exists, or the documents are too few to hold one out.
    """
    folder = Path(folder)
    report = progress or (lambda stage, done, total: None)
    if folder.exists():
        raise InputError(f"{folder} exists already", "remove it, or choose another folder")
    if (tokenizer is None) == (vocabulary is None):
        raise InputError("the tokens' vocabulary is not settled", "give either a tokenizer or the size of one to learn")
    if not 0 <= validation < 1:
        raise InputError(f"a validation share of {validation} is outside 0 .. 1", "give a share below 1, such as 0.1")
    documents = []
    for text in texts(read_records(files), field):
        if text.strip():
            documents.append(text)
        report("reading", len(documents), 0)
    duplicates = None
    if duplicates_from is not None:
        duplicates = find_near_duplicates(documents, threshold=duplicates_from, progress=report)
        documents = [documents[index] for index in duplicates.kept]
    held_out = split_documents([len(text) for text in documents], validation, seed)
    parts = {"train": [t for t, out in zip(documents, held_out, strict=True) if not out]}
    if validation:
        parts["validation"] = [t for t, out in zip(documents, held_out, strict=True) if out]
    source: dict[str, Any] = {
        "name": name,
        "files": [file.name for file in files][:1000],
        "sha256": _sha256(documents),
        "documents_read": len(documents) + (len(duplicates.removed) if duplicates else 0),
        "near_duplicates_removed": len(duplicates.removed) if duplicates else 0,
        "duplicates_from": duplicates_from,
        "validation": validation,
        "seed": seed,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        part = Path(temporary) / "data"
        part.mkdir()
        if tokenizer is None:
            report("learning the vocabulary", 0, len(parts["train"]))
            tokenizer = train_bpe(parts["train"], part / "tokenizer", vocabulary=vocabulary or 0)
        else:
            (part / "tokenizer").mkdir()
            write_tokenizer(tokenizer, part / "tokenizer")
        manifests = {}
        for split, kept in parts.items():
            encoded = encode_documents(kept, tokenizer, report, f"tokenizing {split}")
            manifests[split] = write_shards(
                part / split, encoded, tokenizer=tokenizer, eos=tokenizer.eos, source={**source, "split": split}
            )
        os.replace(part, folder)
    return Prepared(folder, tokenizer, manifests["train"], manifests.get("validation"), duplicates)


def split_documents(lengths: Sequence[int], share: float, seed: int) -> list[bool]:
    """Which documents are held out: in an order drawn by `seed`, each that still fits into `share` of the total length.

    At least one is held out when `share` is above 0 (the shortest, when none fits), and one is always left. Raises `InputError`
    for fewer documents than that takes.
    """
    if not lengths or (share > 0 and len(lengths) < 2):
        raise InputError(f"{len(lengths)} documents are too few to hold out {share:.0%}", "give more documents, or hold out nothing")
    held, room = [False] * len(lengths), share * sum(lengths)
    for index in np.random.default_rng([seed, 0x5711]).permutation(len(lengths)).tolist():
        if 0 < lengths[index] <= room and sum(held) < len(lengths) - 1:
            held[index] = True
            room -= lengths[index]
    if share > 0 and not any(held):
        held[min(range(len(lengths)), key=lengths.__getitem__)] = True
    return held


def encode_documents(
    documents: Sequence[str], tokenizer: Tokenizer, report: Progress | None = None, stage: str = "tokenizing"
) -> Iterator[TokenDocument]:
    """The tokens of each text, opened with bos where the tokenizer's model wants that.

    Control tokens that are written in a text are text here: no document can end another or speak as the assistant. Warns when the
    vocabulary lacks bytes that the texts have.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    opening = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    lost = 0
    for start in range(0, len(documents), _BATCH):
        if report is not None:
            report(stage, start, len(documents))
        batch = documents[start : start + _BATCH]
        if tokenizer.missing_bytes:
            raw = "".join(batch).encode()
            lost += len(raw) - len(raw.translate(None, tokenizer.missing_bytes))
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield TokenDocument(np.array(opening + encoding.ids, dtype=np.int64))
    if lost:
        warnings.warn(f"the vocabulary has no token for {lost:,} bytes of the texts, which are left out", stacklevel=2)
    if report is not None:
        report(stage, len(documents), len(documents))


def _sha256(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
