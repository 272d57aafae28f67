"""Whether two tokenizers are the same one: a hash of what a vocabulary's ids mean and of how it cuts text.

By behaviour, not by file: the same tokenizer has one identity whether it was read from `tokenizer.json` or from GGUF.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

from armillary.core.errors import InputError

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

# Words, spacing, case, numbers, contractions, code, scripts: where pre-tokenizers and merges differ.
_PROBE = (
    "The quick brown fox's 12345 jumps;  it doesn't\n\n\tSTOP -- naïve café, Straße\r\n"
    "def f(x): return x**2 + 0.5e-3  # 你好，世界 こんにちは Привет مرحبا 🙂👩‍💻 a" + " " * 9 + "b"
)


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) over the bytes behind every id and the ids of a fixed probe text."""
    digest = hashlib.sha256(b"armillary tokenizer 1")
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        digest.update(struct.pack("<I", len(piece)) + piece)
    for line in _PROBE.split("\n"):
        ids: list[int] = tokenizer.backend.encode(line, add_special_tokens=False).ids
        digest.update(struct.pack(f"<I{len(ids)}I", len(ids), *ids))
    return digest.hexdigest()


def require_tokenizer(expected: str, tokenizer: Tokenizer, what: str) -> None:
    """Raises `InputError` unless `tokenizer` is the one whose identity `what` (tokens on disk) carries."""
    have = tokenizer_identity(tokenizer)
    if have != expected:
        raise InputError(
            f"{what} was tokenized by another tokenizer (identity {expected[:12]}..., the model's is {have[:12]}...)",
            "prepare the data with the model's own tokenizer: armillary data prepare ... --tokenizer MODEL",
        )
