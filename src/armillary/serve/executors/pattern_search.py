"""Which pattern each head of a model is given for sparse prefill: found on a text, kept in a file (MInference, algorithm 1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from armillary.core.errors import FormatError
from armillary.kernels.attention import AttentionSpec, CausalAttend
from armillary.kernels.sparse_prefill import KINDS, Kind, search
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder

MAX_BYTES = 16 << 20


class _Searching:
    """An `Attend` of one whole sequence that searches each head's pattern as it goes; what comes out is dense attention's."""

    def __init__(self, length: int, sinks: int, local: int, budget: int) -> None:
        self._dense, self._sizes = CausalAttend([length]), (sinks, local, budget)
        self.kinds: list[list[Kind]] = []
        self.recalls: list[list[float]] = []

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        found = [search(q[:, head], k[:, head // group], spec.scale, *self._sizes) for head in range(q.shape[1])]
        self.kinds.append([pattern.kind for pattern, _ in found])
        self.recalls.append([recall for _, recall in found])
        return self._dense(spec, q, k, v)


def find_patterns(
    decoder: Decoder, tokens: Sequence[int], *, sinks: int, local: int, budget: int
) -> tuple[list[list[Kind]], list[list[float]]]:
    """Of each layer and head the kind that recalls most of the attention within `tokens`, and that recall."""
    searching = _Searching(len(tokens), sinks, local, budget)
    with torch.inference_mode():
        decoder.hidden(torch.tensor(list(tokens)), torch.arange(len(tokens)), searching)
    return searching.kinds, searching.recalls


def save_patterns(path: Path, kinds: Sequence[Sequence[Kind]]) -> None:
    path.write_text(json.dumps({"patterns": kinds}, indent=0) + "\n", encoding="utf-8")


def load_patterns(path: Path, config: ModelConfig) -> list[list[Kind]]:
    """[layers][heads]. Raises FormatError when the file is none of patterns, or of another model's shape."""
    fix = "make it with find_patterns and save_patterns for this model"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path} has {path.stat().st_size:,} bytes; patterns are less than {MAX_BYTES:,}", fix)
        found = json.loads(path.read_text(encoding="utf-8"))["patterns"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no file of attention patterns: {error}", fix) from error
    shape = [config.num_heads] * config.num_layers
    if not isinstance(found, list) or [len(layer) if isinstance(layer, list) else -1 for layer in found] != shape:
        raise FormatError(f"{path} is not of {config.num_layers} layers of {config.num_heads} heads", fix)
    unknown = {str(kind) for layer in found for kind in layer} - set(KINDS)
    if unknown:
        raise FormatError(f"{path} names the pattern {min(unknown)!r}", f"the patterns are {', '.join(KINDS)}")
    return found
