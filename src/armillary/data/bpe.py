"""A byte-level BPE tokenizer learnt from text, saved as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from armillary.core.errors import InputError
from armillary.models.tokenizer import Tokenizer

END_OF_TEXT: Final = "<|endoftext|>"
MAX_VOCABULARY: Final = 1 << 20
MAX_WORD_BYTES: Final = 1024  # learning takes time with the square of a word's length; a run without a break is learnt in pieces


def train_bpe(
    texts: Iterable[str], folder: str | Path, *, vocabulary: int, special: Sequence[str] = (END_OF_TEXT,), chat_template: str | None = None
) -> Tokenizer:
    """Learns `vocabulary` tokens (the special ones, the 256 bytes, then merges) and writes them to `folder`; gives the tokenizer read back.

    GPT-2's way of cutting words (Radford et al. 2019), so any text comes back exactly as it was; `special[0]` ends a text. The same
    texts give the same tokenizer. Texts too small for that many merges give fewer tokens, which the result's `vocab_size` tells.
    Raises `InputError` for a vocabulary that is out of bounds and for texts that hold nothing.
    """
    folder = Path(folder)
    low = 256 + len(special)
    if not low <= vocabulary <= MAX_VOCABULARY:
        raise InputError(
            f"a vocabulary of {vocabulary:,} is outside {low:,} .. {MAX_VOCABULARY:,}", "256 bytes and the special tokens must fit"
        )
    if not special or len(set(special)) != len(special) or not all(special):
        raise InputError(f"the special tokens are {list(special)}", "give at least the one that ends a text, each once")
    if (folder / "tokenizer.json").exists():
        raise InputError(f"{folder} holds a tokenizer already", "remove it, or choose another folder")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{MAX_WORD_BYTES}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    _interruptible(lambda: backend.train_from_iterator(counted(), trainer))
    backend.pre_tokenizer = words
    if not seen:
        raise InputError("there is no text to learn a tokenizer from", "check the files that were given")
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": special[0],
        "additional_special_tokens": list(special[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, "utf-8")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_json(folder)


def _interruptible(work: Callable[[], object]) -> None:
    """`work` on a thread, so that Ctrl-C ends the wait for a library that never looks at signals."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="learn-vocabulary", daemon=True).start()
    done.result()
