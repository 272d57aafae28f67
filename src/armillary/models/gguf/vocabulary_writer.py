"""A tokenizer's backend to GGUF metadata: the inverse of `vocabulary`, checked by reading it back.

GGUF names a way of splitting words instead of carrying its expression, and derives SentencePiece merges from scores. So the kind is found
by its behaviour, scores are made from merge ranks, and the result must encode a set of probes as the original does, or it is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.core.errors import InputError
from armillary.models.gguf.pretokenizer import KINDS
from armillary.models.gguf.vocabulary import BYTE, CONTROL, END_NAMES, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

_PROBES = (
    "The quick brown fox can't jump over 1234567890 lazy dogs; I'LL say 'tis 3.14!",
    "  two  spaces,   three\ttab\n\n  newline\r\n\r\n x  ",
    "naïve café e\u0301 ﬁne Straße ÅNGSTRÖM İstanbul camelCaseHTTPServer",
    "日本語のテキスト、中文字符。한국어 ไทย हिन्दी العربية 🎉👩‍👩‍👧 ½²Ⅳ٣",
    "def f(x):\n    return x**2  # c\n\nhttps://a.b/c?d=%20&e=_f_ {\"k\": [1, 2]}//**--",
    " leading", "trailing ", "", " ", "\n", "a", "...!!!???", "\u00a0nb\u2003sp",
)  # fmt: skip


def vocabulary_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizer.*` keys for a byte-level or SentencePiece-like BPE tokenizer. Raises `InputError` when GGUF would change its ids."""
    raw = json.loads(tokenizer.backend.to_str())
    model = raw["model"]
    if model.get("type") != "BPE":
        raise InputError(f"a {model.get('type')} tokenizer cannot be written as GGUF", "write a Hugging Face folder instead")
    size = tokenizer.vocab_size
    tokens = [tokenizer.token_text(i) or f"[PAD{i}]" for i in range(size)]
    types = np.full(size, NORMAL, np.int32)
    types[[i for i in range(size) if not tokenizer.token_text(i)]] = UNUSED
    for token in raw["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": tokenizer.add_eos,
    }
    if tokenizer.byte_level:
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _kind(tokenizer, model)}
        keys["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    else:
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        keys["tokenizer.ggml.scores"] = _scores(tokenizer, merges)
        keys["tokenizer.ggml.add_space_prefix"] = tokenizer.space_prefix
        for i in range(size):
            if types[i] == NORMAL and len(tokens[i]) == 6 and tokens[i].startswith("<0x") and tokens[i].endswith(">"):
                types[i] = BYTE
        unknown = tokenizer.id_of(model.get("unk_token") or "")
        if unknown is not None:
            types[unknown] = UNKNOWN
            keys["tokenizer.ggml.unknown_token_id"] = unknown
    for name, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        if token is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = token
    # Readers know some tokens that end a text by their names; the key is for one that they do not.
    further = sorted(tokenizer.stop_ids - {tokenizer.eos}, key=lambda token: tokens[token] in END_NAMES)
    if further:
        keys["tokenizer.ggml.eot_token_id"] = further[0]
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    _check(tokenizer, keys)
    return keys


def _kind(tokenizer: Tokenizer, model: dict[str, Any]) -> str:
    """The name of the pre-tokenizer that splits every probe as this one does."""
    own, normalizer = tokenizer.backend.pre_tokenizer, tokenizer.backend.normalizer
    for name, kind in KINDS.items():
        built = kind.build()
        if kind.ignore_merges != bool(model.get("ignore_merges")) or own is None:
            continue
        if (normalizer is not None) != kind.nfc or (normalizer is not None and normalizer.normalize_str("e\u0301 \u0041") != "é A"):
            continue
        if all(_words(own, probe) == _words(built, probe) for probe in _PROBES):
            return name
    raise InputError("GGUF has no name for the way in which this tokenizer splits words", "write a Hugging Face folder instead")


def _words(splitter: Any, text: str) -> list[str]:
    return [word for word, _ in splitter.pre_tokenize_str(text)]


def _scores(tokenizer: Tokenizer, merges: list[list[str]]) -> np.ndarray:
    """Minus the rank of the first merge that makes a token; what no merge makes comes after all of them."""
    scores = np.full(tokenizer.vocab_size, -float(len(merges) + 1), np.float32)
    rank = 0
    seen: set[int] = set()
    for left, right in merges:
        token = tokenizer.id_of(left + right)
        if token is not None and token not in seen:
            seen.add(token)
            scores[token] = -rank
            rank += 1
    return scores


def _check(tokenizer: Tokenizer, keys: dict[str, Any]) -> None:
    back = read_vocabulary(keys, "the tokenizer")
    special = [tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)[:8]]
    probes = [*_PROBES, *(f"a{token}b {token} c" for token in special)]
    changed = next((p for p in probes if back.backend.encode(p, add_special_tokens=False).ids != tokenizer.encode(p, special=False)), None)
    if changed is not None:
        raise InputError(f"GGUF would encode {changed[:40]!r} differently than this tokenizer", "write a Hugging Face folder instead")
    if missing := tokenizer.stop_ids - back.stop_ids:
        raise InputError(
            f"GGUF cannot name all {len(tokenizer.stop_ids)} tokens that end a text ({sorted(missing)} would be lost)",
            "write a Hugging Face folder instead",
        )
