"""A `tokenizers` backend from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece-like BPE with scores (`llama`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from armillary.core.errors import FormatError, InputError
from armillary.models.gguf.pretokenizer import PreTokenizer, pretokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_VOCABULARY = 1 << 21
MAX_TOKEN_CHARACTERS = 4096
# Tokens that end a turn or a text by their name, where a file names only one of them (the list that llama.cpp uses).
END_NAMES = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<EOT>",
        "<end_of_utterance>",
    ]
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `Tokenizer` needs: the backend, every token's text and type, and the ids with a meaning."""

    backend: Tokenizer
    tokens: list[str]
    types: np.ndarray  # [vocabulary], the numbers above
    byte_level: bool
    space_prefix: bool
    bos: int | None
    eos: int | None
    stop_ids: frozenset[int]
    add_bos: bool
    add_eos: bool


def read_vocabulary(metadata: Mapping[str, Any], source: str = "GGUF") -> Vocabulary:
    """Raises `FormatError` for missing, inconsistent or out-of-range keys, `InputError` for kinds that are not supported."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise InputError(f"{source}: tokenizer model {str(model)[:40]!r} is not supported", "choose a model with 'gpt2' or 'llama'")
    tokens, types = _tokens(metadata, source)
    if model == "gpt2":
        kind, backend = _byte_level(metadata, tokens, types, source)
        add_bos, space_prefix = kind.add_bos, False
    else:
        space_prefix = _flag(metadata, "add_space_prefix", True, source)
        backend = _sentencepiece(metadata, tokens, types, space_prefix, source)
        add_bos = True
    bos, eos = _id(metadata, "bos", len(tokens), source), _id(metadata, "eos", len(tokens), source)
    stops = {eos, _id(metadata, "eot", len(tokens), source), _id(metadata, "eom", len(tokens), source)}
    stops |= {i for i in np.flatnonzero(types == CONTROL).tolist() if tokens[i] in END_NAMES}
    return Vocabulary(
        backend=backend,
        tokens=tokens,
        types=types,
        byte_level=model == "gpt2",
        space_prefix=space_prefix,
        bos=bos,
        eos=eos,
        stop_ids=frozenset(i for i in stops if i is not None),
        add_bos=_flag(metadata, "add_bos_token", add_bos, source) and bos is not None,
        add_eos=_flag(metadata, "add_eos_token", False, source) and eos is not None,
    )


def _tokens(metadata: Mapping[str, Any], source: str) -> tuple[list[str], np.ndarray]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FormatError(f"{source}: key 'tokenizer.ggml.tokens' is missing or not a list of strings", "fetch the file again")
    if len(tokens) > MAX_VOCABULARY:
        raise FormatError(f"{source}: the vocabulary has {len(tokens):,} tokens; at most {MAX_VOCABULARY:,} are allowed", "fetch it again")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_CHARACTERS:
        raise FormatError(f"{source}: a token has {longest:,} characters; at most {MAX_TOKEN_CHARACTERS:,} are allowed", "fetch it again")
    # Padded vocabularies repeat or leave out texts; every id keeps its own.
    seen: set[str] = set()
    out = []
    for index, token in enumerate(tokens):
        text = token or f"[EMPTY_{index}]"
        if text in seen:
            text = f"[DUPLICATE_{index}]"
        seen.add(text)
        out.append(text)
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(out), NORMAL, np.int32)
    if not isinstance(types, np.ndarray) or types.shape != (len(out),) or types.dtype.kind not in "iu":
        raise FormatError(f"{source}: key 'tokenizer.ggml.token_type' does not give an integer for each token", "fetch the file again")
    return out, types.astype(np.int64)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray, source: str) -> tuple[PreTokenizer, Tokenizer]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise FormatError(f"{source}: key 'tokenizer.ggml.merges' is missing or not a list of strings", "fetch the file again")
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        warnings.warn(f"{source} does not name its pre-tokenizer; 'default' is used and its answers may suffer", stacklevel=4)
        name = "default"
    kind = pretokenizer(str(name))
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise FormatError(f"{source}: merge {index} ({merge[:40]!r}) names a token that is not in the vocabulary", "fetch it again")
        pairs.append((left, right))
    backend = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=kind.ignore_merges))
    backend.pre_tokenizer = kind.build()
    if kind.nfc:
        backend.normalizer = kind.normalizer()
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, types)
    return kind, backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray, space_prefix: bool, source: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),) or not np.isfinite(scores).all():
        raise FormatError(f"{source}: key 'tokenizer.ggml.scores' does not give a finite number for each token", "fetch the file again")
    unknown = _id(metadata, "unknown", len(tokens), source)
    ids = {token: index for index, token in enumerate(tokens)}
    mergeable = {tokens[i]: i for i in np.flatnonzero((types == NORMAL) | (types == UNUSED)).tolist()}
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_from_scores(mergeable, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_prefix else replace
    strip = [decoders.Strip(content=" ", left=1)] if space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_special(backend, tokens, types)
    return backend


def _merges_from_scores(ids: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best: every split of a token into two tokens is a merge of its rank."""
    ranked = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-float(scores[index]), index, cut, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special(backend: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    """Control and user-defined tokens are found in the text before anything else; only control tokens count as special."""
    # One call a kind: adding tokens rebuilds the matcher each time.
    control = np.flatnonzero((types == CONTROL) | (types == UNKNOWN)).tolist()
    user = np.flatnonzero(types == USER_DEFINED).tolist()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in user])


def _id(metadata: Mapping[str, Any], name: str, size: int, source: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise FormatError(f"{source}: {name}_token_id is {str(value)[:40]}; the vocabulary has {size:,} tokens", "fetch the file again")
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise FormatError(f"{source}: key 'tokenizer.ggml.{name}' is not a boolean", "fetch the file again")
    return value
