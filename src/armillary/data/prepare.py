"""Texts or chats to a folder that a trainer reads: `tokenizer/`, `train/` and `validation/` shards, with where it all came from."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import tokenizers

from armillary.core.errors import CapacityError, InputError
from armillary.data.bpe import train_bpe
from armillary.data.chat import ChatEncoder, chat_documents
from armillary.data.near_duplicates import NearDuplicates, find_near_duplicates
from armillary.data.readers import read_records, texts
from armillary.data.shard_manifest import Manifest
from armillary.data.shard_writer import TokenDocument, write_shards
from armillary.models.hf_tokenizer import write_tokenizer
from armillary.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what is going on, documents done, documents in all
T = TypeVar("T")
_BATCH: Final = 256  # texts encoded at once


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was written. `duplicates` is None where none were looked for; `empty` texts were left out."""

    folder: Path
    tokenizer: Tokenizer
    train: Manifest
    validation: Manifest | None
    duplicates: NearDuplicates | None
    empty: int = 0


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
    """Reads the files' texts, splits them by document, and writes tokens; `vocabulary` learns a byte-level BPE from the training split.

    `validation` is the share of the characters that is held out, whole documents drawn by `seed`; 0 holds out nothing. Every document
    ends with the tokenizer's eos. Of near duplicates at or above the similarity `duplicates_from` only the first is kept, before the
    split, so that no text is on both sides. Texts are held in memory. Raises `InputError` when the folder exists and when the documents
    are too few to hold one out, and what the readers raise; then nothing is left behind.
    """
    if (tokenizer is None) == (vocabulary is None):
        raise InputError("the tokens' vocabulary is not settled", "give either a tokenizer or the size of one to learn")
    report = progress or (lambda stage, done, total: None)
    with _made(Path(folder), validation, seed) as part:
        report("reading", 0, 0)
        found = list(texts(read_records(files), field))
        documents = [text for text in found if text.strip()]
        empty = len(found) - len(documents)
        if not documents:
            raise InputError(f"there is no text: of {len(found):,} that were read, all are empty", "check the files and the field")
        duplicates = None
        if duplicates_from is not None:
            duplicates = find_near_duplicates(documents, threshold=duplicates_from, progress=report)
            documents = [documents[index] for index in duplicates.kept]
        splits = _split(documents, [len(text) for text in documents], validation, seed)
        if tokenizer is None:
            report("learning the vocabulary", 0, len(splits["train"]))
            tokenizer = train_bpe(splits["train"], part / "tokenizer", vocabulary=vocabulary or 0)
        else:
            (part / "tokenizer").mkdir()
            write_tokenizer(tokenizer, part / "tokenizer")
        digest = hashlib.sha256()
        for text in documents:
            digest.update(hashlib.sha256(text.encode()).digest())
        source = _source(files, name, validation, seed) | {
            "documents_read": len(documents) + (len(duplicates.removed) if duplicates else 0),
            "empty": empty,
            "near_duplicates_removed": len(duplicates.removed) if duplicates else 0,
            "duplicates_from": duplicates_from,
            "sha256": digest.hexdigest(),
        }
        manifests = {
            split: write_shards(
                part / split,
                encode_documents(kept, tokenizer, report, f"tokenizing {split}"),
                tokenizer=tokenizer,
                eos=tokenizer.eos,
                source={**source, "split": split},
            )
            for split, kept in splits.items()
        }
    return Prepared(Path(folder), tokenizer, manifests["train"], manifests.get("validation"), duplicates, empty)


def prepare_chats(
    files: Sequence[Path],
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    template: str | None = None,
    field: str = "messages",
    validation: float = 0.1,
    seed: int = 0,
    name: str = "",
    progress: Progress | None = None,
) -> Prepared:
    """Reads the files' conversations, renders each with the model's chat template, and writes tokens that know which are the assistant's.

    `template` is Jinja source, by default the tokenizer's own. `validation` is the share of the tokens that is held out, whole
    conversations. Pack them with `BatchStream(packing="documents")`. Raises as `prepare_text` does, and for a conversation that
    `ChatEncoder.encode` refuses, naming its place.
    """
    source = template or tokenizer.chat_template
    if source is None:
        raise InputError("the tokenizer has no chat template", "give one, or the tokenizer of a model that was trained to chat")
    report = progress or (lambda stage, done, total: None)
    with _made(Path(folder), validation, seed) as part:
        report("reading and tokenizing", 0, 0)
        documents = list(chat_documents(read_records(files), ChatEncoder(source, tokenizer), field))
        splits = _split(documents, [np.size(document.tokens) for document in documents], validation, seed)
        (part / "tokenizer").mkdir()
        write_tokenizer(tokenizer, part / "tokenizer")
        (part / "tokenizer" / "chat_template.jinja").write_text(source, "utf-8")
        about = _source(files, name, validation, seed) | {"chat_template": hashlib.sha256(source.encode()).hexdigest()}
        manifests = {
            split: write_shards(part / split, kept, tokenizer=tokenizer, source={**about, "split": split}) for split, kept in splits.items()
        }
    return Prepared(Path(folder), tokenizer, manifests["train"], manifests.get("validation"), None)


@contextmanager
def _made(folder: Path, validation: float, seed: int) -> Iterator[Path]:
    """A folder beside `folder` that becomes it when all went well, and otherwise goes."""
    if folder.exists():
        raise InputError(f"{folder} exists already", "remove it, or choose another folder")
    if not 0 <= validation < 1:
        raise InputError(f"a validation share of {validation} is outside 0 .. 1", "give a share below 1, such as 0.1")
    if seed < 0:
        raise InputError(f"the seed is {seed}", "give 0 or more")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        part = Path(temporary) / "data"
        part.mkdir()
        try:
            yield part
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CapacityError(f"{folder} could not be written ({error.strerror})", "free disk space, or choose another folder") from error
        os.replace(part, folder)


def _split(documents: Sequence[T], lengths: Sequence[int], validation: float, seed: int) -> dict[str, list[T]]:
    held_out = split_documents(lengths, validation, seed)
    splits = {"train": [document for document, out in zip(documents, held_out, strict=True) if not out]}
    if validation:
        splits["validation"] = [document for document, out in zip(documents, held_out, strict=True) if out]
    return splits


def _source(files: Sequence[Path], name: str, validation: float, seed: int) -> dict[str, Any]:
    return {"name": name, "files": [file.name for file in files[:1000]], "validation": validation, "seed": seed}


def split_documents(lengths: Sequence[int], share: float, seed: int) -> list[bool]:
    """Which documents are held out: in an order drawn by `seed`, each that still fits into `share` of the total length.

    At least one is held out when `share` is above 0 (the shortest, when none fits), and one is always left. Raises `InputError`
    for fewer documents than that takes.
    """
    if not lengths or (share > 0 and len(lengths) < 2):
        count = f"{len(lengths)} document{' is' if len(lengths) == 1 else 's are'}"
        raise InputError(
            f"{count} too few to hold out {share:.0%}: whole documents are",
            "give more documents (such as one a line of a .jsonl), or hold out nothing (--validation 0)",
        )
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
