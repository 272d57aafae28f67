"""How well a model, as it is served, predicts a text: perplexity, and what a weight format adds to it.

The tokens are cut into windows that do not overlap, each computed from an empty cache as a prompt would be. Every token of a
window is scored but the first, which nothing predicts; where the tokenizer opens texts with bos, bos takes the place of each
window's first token, as in llama.cpp. Perplexity is exp of the mean of -ln p over all scored tokens of all windows.

llama.cpp's `perplexity` differs in one thing: it scores only the second half of a window (positions context/2 + 1 and later),
so its numbers are lower. `Scores.second_half` is that number, from the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError, InputError
from armillary.serve.executors.forward import FlatBatch, Forward, Span

_CHUNK = 256  # tokens a batch: their logits, and not a window's, are in memory at once


@dataclass(frozen=True)
class Scores:
    """-ln p of every scored token, float64 [windows, context - 1]."""

    losses: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())

    @property
    def error(self) -> float | None:
        """Standard error of `perplexity`, windows being the independent samples; None for a single window."""
        error = _standard_error(self.losses)
        return None if error is None else self.perplexity * error

    @property
    def second_half(self) -> float:
        """Perplexity as llama.cpp defines it."""
        return math.exp(self.losses[:, (self.losses.shape[1] + 1) // 2 :].mean())

    def excess(self, base: Scores) -> tuple[float, float | None]:
        """By what share perplexity is above that of `base` on the same windows, and the standard error of that share.

        The error is that of the paired differences, far below those of the two perplexities: both found the same text hard.
        """
        differences = self.losses - base.losses
        ratio, error = math.exp(differences.mean()), _standard_error(differences)
        return ratio - 1.0, None if error is None else ratio * error


def windows(tokens: Sequence[int], context: int, bos: int | None = None) -> list[list[int]]:
    """`tokens` in whole windows of `context`; what is left over is dropped. `bos`: what replaces each window's first token.

    Raises InputError for a context below 4 (two halves of at least one scored token), or when there is not one whole window.
    """
    if context < 4:
        raise InputError(f"a window of {context} tokens is too short to score", "give a context of at least 4", field="context")
    if len(tokens) < context:
        raise InputError(f"the text has {len(tokens):,} tokens, less than one window of {context:,}", "give more text or a smaller context")
    cut = [list(tokens[start : start + context]) for start in range(0, len(tokens) - context + 1, context)]
    return cut if bos is None else [[bos, *window[1:]] for window in cut]


def score(forward: Forward, cut: Sequence[Sequence[int]], block_size: int, progress: Callable[[int, int], None] | None = None) -> Scores:
    """Compute windows of equal length one after another; `progress(done, total)` counts tokens.

    `forward` needs KV blocks, of `block_size` tokens, for one window.

    Raises ArmillaryError when a logit is not a number.
    """
    context = len(cut[0])
    losses = torch.empty(len(cut), context - 1, dtype=torch.float64)
    table = list(range(-(-context // block_size)))
    with torch.inference_mode():
        for index, window in enumerate(cut):
            for start in range(0, context, _CHUNK):
                end = min(start + _CHUNK, context)
                targets = torch.tensor(window[start + 1 : end + 1])
                rows = range(len(targets))  # the last token of a window predicts nothing that is there
                batch = FlatBatch(window[start:end], range(start, end), [Span(start, end - start, table)], rows)
                logits = forward.logits(batch).values.float()
                chosen = logits.gather(1, targets[:, None]).squeeze(1)
                losses[index, start : start + len(targets)] = logits.logsumexp(-1) - chosen
                if progress is not None:
                    progress(index * context + end, len(cut) * context)
    if not bool(losses.isfinite().all()):
        raise ArmillaryError(f"{forward.name} gives logits that are not numbers", "check the model's weights")
    return Scores(losses)


def _standard_error(values: Tensor) -> float | None:
    """Of the mean of `values` [windows, tokens]."""
    if values.shape[0] < 2:
        return None
    return float(values.mean(1).std() / math.sqrt(values.shape[0]))
