"""Which token comes next: logits in, one drawn token a row out.

The order of operations follows Hugging Face's processors: repetition penalty (over prompt and output), presence and
frequency penalties (over output), logit bias, grammar, temperature, top-k, top-p over what is left, min-p. Log-probabilities are
those of the model itself, before any of this, as the OpenAI API and vLLM report them.

A draw (`kernels.sample`) is the inverse of the cumulative distribution at one uniform number, a hash of (seed, position). So a
seeded request gives the same tokens whatever else is in its batch and however often it was preempted.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError
from armillary.kernels.sample import draw, reference, weights_of
from armillary.kernels.token_mask import allows, barred, best_allowed, only_allowed
from armillary.serve.request import Request, TokenLogprob

GREEDY_BELOW = 1e-5  # as in vLLM: below this temperature the division would only add rounding errors
_SALT = os.urandom(8)


class SamplingError(ArmillaryError):
    """One row of logits from which no token can be drawn; other rows are not affected."""


@dataclass(frozen=True, slots=True)
class Row:
    """Whose next token a row of logits decides: that of `request`, were `drafts` to follow what it knows.

    `allowed`: what its grammar lets through there, a bit a token (`Constraint.mask`).
    """

    request: Request
    drafts: tuple[int, ...] = ()
    allowed: Tensor | None = None

    @property
    def position(self) -> int:
        """Of the token that is drawn."""
        return self.request.known + len(self.drafts)

    @property
    def penalised(self) -> bool:
        """Whether penalties or a bias change the logits."""
        params = self.request.sampling
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        return penalised or bool(params.logit_bias)

    @property
    def reshaped(self) -> bool:
        """Whether the logits are changed before a token is drawn from them."""
        return self.penalised or self.allowed is not None

    @property
    def plain_greedy(self) -> bool:
        return self.request.sampling.temperature < GREEDY_BELOW and not self.reshaped


def sample(
    logits: Tensor, rows: Sequence[Row], seed: int | None = None, peaks: tuple[Tensor, Tensor] | None = None
) -> list[TokenLogprob | SamplingError]:
    """Draw a token from each row of `logits` [rows, vocab], on the logits' device.

    Requests without a seed of their own draw from `seed` and their id (None: from this process's own salt). `peaks` are the
    rows' largest logits (NaN where any is NaN) and the first tokens that have them, when whoever computed the logits found
    them on the way. A row with NaN or +inf, or without any finite value, gives a SamplingError in its place.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} draws")
    if not rows:
        return []
    logits = logits.float()
    # The plain maximum is vectorised and lets NaN through; max with indices is ten times slower.
    # Numbers of Python from here on: after an iteration of the kernels each small operation of torch takes 20 us and more.
    peak = (logits.amax(-1) if peaks is None else peaks[0]).tolist()
    bests = None if peaks is None else peaks[1].tolist()
    chosen: list[int | SamplingError] = [0] * len(rows)
    plain = [i for i, row in enumerate(rows) if row.plain_greedy]
    if bests is not None:
        for i in plain:
            chosen[i] = bests[i]
    elif plain:
        for i, token in zip(plain, (logits if len(plain) == len(rows) else logits[plain]).argmax(-1).tolist(), strict=True):
            chosen[i] = token
    shaped = [i for i, row in enumerate(rows) if not row.plain_greedy]
    if shaped:
        one = draw if peaks is not None else reference
        found = _draw(logits, peak, bests, shaped, rows, seed, one)
        for i, result in zip(shaped, found, strict=True):
            chosen[i] = result
    for i, value in enumerate(peak):
        if not math.isfinite(value):
            chosen[i] = _unusable(rows[i], value)
    scored = [i for i, row in enumerate(rows) if row.request.sampling.logprobs is not None and not isinstance(chosen[i], SamplingError)]
    scores: dict[int, TokenLogprob] = {}
    if scored:
        tops = [rows[i].request.sampling.logprobs or 0 for i in scored]
        scores = dict(zip(scored, score(logits[scored], [_token(chosen[i]) for i in scored], tops), strict=True))
    return [result if isinstance(result, SamplingError) else scores.get(i) or TokenLogprob(result) for i, result in enumerate(chosen)]


def score(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of `tokens[i]` under row i of `logits` [rows, vocab], with the `tops[i]` likeliest alternatives.

    Natural logarithms of the model's own distribution, without temperature, penalties or filters.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(tops, default=0), logits.shape[-1])
    if most == 0:
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    best, indices = logprobs.topk(most)
    return [
        TokenLogprob(token, logprob, tuple(zip(names[:top], values[:top], strict=True)))
        for token, logprob, top, names, values in zip(tokens, chosen, tops, indices.tolist(), best.tolist(), strict=True)
    ]


def law(logits: Tensor, row: Row) -> Tensor:
    """The distribution from which `row`'s token is drawn, float64 [vocab], from its logits [vocab] (temperature over 0).

    Raises SamplingError where nothing can be drawn.
    """
    params = row.request.sampling
    values = reshape(logits, row) if row.reshaped else logits
    peak = float(values.max())
    if not math.isfinite(peak):
        raise _unusable(row, peak)
    weights = weights_of(values, peak, params.temperature, params.top_k, params.top_p, params.min_p).double()
    return weights / weights.sum()


def uniform(request: Request, position: int, seed: int | None = None, purpose: str = "") -> float:
    """The number in [0, 1) that decides `request`'s draw of the token at `position`: a hash of (seed, position), 53 bits.

    Numbers for another `purpose` are independent of it.
    """
    own = request.sampling.seed
    shared = _SALT.hex() if seed is None else f"engine {seed}"
    key = f"{shared} {request.id}" if own is None else f"seed {own}"
    digest = hashlib.blake2b(f"{key} {position}{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def reshape(logits: Tensor, row: Row) -> Tensor:
    """One row of logits [vocab] with the request's penalties, bias and grammar applied; `logits` itself is left alone."""
    values = _penalise(logits, row)
    return values if row.allowed is None else barred(values, row.allowed)


def _penalise(logits: Tensor, row: Row) -> Tensor:
    """One row of logits [vocab] with the request's penalties and bias applied.

    Repetition: Keskar et al. 2019 (positive logits divided, negative multiplied, once for each token seen in prompt or
    output). Presence and frequency: the OpenAI API (subtracted once, and once for each occurrence, in the output).
    """
    params, prompt, output = row.request.sampling, row.request.prompt, [*row.request.output, *row.drafts]
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*prompt, *output], device=logits.device)
        old = logits[seen]
        logits[seen] = torch.where(old < 0, old * params.repetition_penalty, old / params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        tokens = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
        logits.index_add_(0, tokens, torch.tensor([bias for _, bias in params.logit_bias], device=logits.device))
    return logits


def _draw(
    logits: Tensor,
    peaks: Sequence[float],
    bests: Sequence[int] | None,
    chosen: Sequence[int],
    rows: Sequence[Row],
    seed: int | None,
    one: Callable[[Tensor, float, float, int, float, float, float], int],
) -> list[int | SamplingError]:
    """The `chosen` rows, which need more than an argmax of the raw logits. `peaks` are those of all rows, `bests` where they are; `one` draws from one."""
    results: list[int | SamplingError] = []
    for i in chosen:
        row, request = rows[i], rows[i].request
        params = request.sampling
        values, peak, best = logits[i], peaks[i], -1 if bests is None else bests[i]
        try:
            if row.penalised:
                values, best = _penalise(values, row), -1
                peak = values.max().item() if row.allowed is None else math.nan
        except IndexError:
            results.append(
                SamplingError(
                    f"request '{request.id}' names a token outside the vocabulary of {logits.shape[-1]}",
                    "check prompt tokens and logit_bias",
                )
            )
            continue
        greedy = params.temperature < GREEDY_BELOW
        if row.allowed is not None:
            if not greedy:
                values, peak = only_allowed(values, row.allowed)
            elif best < 0 or not allows(row.allowed, best):  # what is best of all is best of what is allowed
                best, peak = best_allowed(values, row.allowed)
        if not math.isfinite(peak):
            results.append(_unusable(row, peak))
        elif greedy:
            results.append(best if best >= 0 else _first_best(values))
        else:
            u = uniform(request, row.position, seed)
            results.append(one(values, peak, params.temperature, params.top_k, params.top_p, params.min_p, u))
    return results


def _first_best(values: Tensor) -> int:
    """The first token with the largest of `values` [vocab]: torch's own way takes five times as long on a CPU."""
    return int(values.numpy().argmax()) if values.device.type == "cpu" else int(values.argmax())


def _unusable(row: Row, peak: float) -> SamplingError:
    what = "NaN" if math.isnan(peak) else ("+inf" if peak > 0 else "nothing but -inf")
    return SamplingError(
        f"the logits of request '{row.request.id}' contain {what} at position {row.position}",
        "check the model's weights, or the request's logit_bias and grammar",
    )


def _token(result: int | SamplingError) -> int:
    assert isinstance(result, int)
    return result
