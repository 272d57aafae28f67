"""Which token comes next: logits in, one drawn token a row out.

The order of operations follows Hugging Face's processors: repetition penalty (over prompt and output), presence and
frequency penalties (over output), logit bias, temperature, top-k, top-p over what is left, min-p. Log-probabilities are
those of the model itself, before any of this, as the OpenAI API and vLLM report them.

A draw (`kernels.sample`) is the inverse of the cumulative distribution at one uniform number, a hash of (seed, position). So a
seeded request gives the same tokens whatever else is in its batch and however often it was preempted.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError
from armillary.kernels.sample import draw, reference
from armillary.serve.request import Request, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # as in vLLM: below this temperature the division would only add rounding errors
_SALT = os.urandom(8)


class SamplingError(ArmillaryError):
    """One row of logits from which no token can be drawn; other rows are not affected."""


def sample(
    logits: Tensor, requests: Sequence[Request], seed: int | None = None, peaks: tuple[Tensor, Tensor] | None = None
) -> list[TokenLogprob | SamplingError]:
    """Draw the next token of each request from its row of `logits` [rows, vocab], on the logits' device.

    The draw is for position `request.known`. Requests without a seed of their own draw from `seed` and their id (None:
    from this process's own salt). `peaks` are the rows' largest logits (NaN where any is NaN) and the first tokens that have
    them, when whoever computed the logits found them on the way. A row with NaN or +inf, or without any finite value, gives a SamplingError in its place.
    """
    if logits.shape[0] != len(requests):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(requests)} requests")
    if not requests:
        return []
    logits = logits.float()
    # The plain maximum is vectorised and lets NaN through; max with indices is ten times slower.
    peak = logits.amax(-1) if peaks is None else peaks[0]
    healthy = torch.isfinite(peak)
    chosen: list[int | SamplingError] = [0] * len(requests)
    plain = [i for i, request in enumerate(requests) if _is_plain_greedy(request.sampling)]
    if plain:
        if peaks is None:
            best = (logits if len(plain) == len(requests) else logits[plain]).argmax(-1)
        else:
            best = peaks[1] if len(plain) == len(requests) else peaks[1][plain]
        for i, token in zip(plain, best.tolist(), strict=True):
            chosen[i] = token
    shaped = [i for i, request in enumerate(requests) if not _is_plain_greedy(request.sampling)]
    for i, result in zip(
        shaped, _draw(logits, peak.tolist(), shaped, requests, seed, draw if peaks is not None else reference), strict=True
    ):
        chosen[i] = result
    if not bool(healthy.all()):
        for i, ok in enumerate(healthy.tolist()):
            if not ok:
                chosen[i] = _unusable(requests[i], float(peak[i]))
    scored = [i for i, request in enumerate(requests) if request.sampling.logprobs is not None and not isinstance(chosen[i], SamplingError)]
    scores: dict[int, TokenLogprob] = {}
    if scored:
        tops = [requests[i].sampling.logprobs or 0 for i in scored]
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


def uniform(request: Request, seed: int | None = None) -> float:
    """The number in [0, 1) that decides `request`'s next draw: a hash of (seed, position), 53 bits."""
    own = request.sampling.seed
    shared = _SALT.hex() if seed is None else f"engine {seed}"
    key = f"{shared} {request.id}" if own is None else f"seed {own}"
    digest = hashlib.blake2b(f"{key} {request.known}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def penalise(row: Tensor, request: Request) -> Tensor:
    """One row of logits [vocab] with the request's penalties and bias applied; `row` itself is left alone.

    Repetition: Keskar et al. 2019 (positive logits divided, negative multiplied, once for each token seen in prompt or
    output). Presence and frequency: the OpenAI API (subtracted once, and once for each occurrence, in the output).
    """
    params = request.sampling
    row = row.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*request.prompt, *request.output], device=row.device)
        old = row[seen]
        row[seen] = torch.where(old < 0, old * params.repetition_penalty, old / params.repetition_penalty)
    if request.output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.unique(torch.tensor(request.output, device=row.device), return_counts=True)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        tokens = torch.tensor([token for token, _ in params.logit_bias], device=row.device)
        row.index_add_(0, tokens, torch.tensor([bias for _, bias in params.logit_bias], device=row.device))
    return row


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW and not _reshapes(params)


def _reshapes(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or bool(params.logit_bias)


def _draw(
    logits: Tensor,
    peaks: Sequence[float],
    rows: Sequence[int],
    requests: Sequence[Request],
    seed: int | None,
    one: Callable[[Tensor, float, float, int, float, float, float], int],
) -> list[int | SamplingError]:
    """The rows that need more than an argmax of the raw logits. `peaks` are those of all rows; `one` draws from a row."""
    results: list[int | SamplingError] = []
    for i in rows:
        request = requests[i]
        params = request.sampling
        try:
            row = penalise(logits[i], request) if _reshapes(params) else logits[i]
            peak = row.max().item() if _reshapes(params) else peaks[i]
        except IndexError:
            results.append(
                SamplingError(
                    f"request '{request.id}' names a token outside the vocabulary of {logits.shape[-1]}",
                    "check prompt tokens and logit_bias",
                )
            )
            continue
        if not math.isfinite(peak):
            results.append(_unusable(request, peak))
        elif params.temperature < GREEDY_BELOW:
            results.append(int(row.argmax()))
        else:
            u = uniform(request, seed)
            results.append(one(row, peak, params.temperature, params.top_k, params.top_p, params.min_p, u))
    return results


def _unusable(request: Request, peak: float) -> SamplingError:
    what = "NaN" if math.isnan(peak) else ("+inf" if peak > 0 else "nothing but -inf")
    return SamplingError(
        f"the logits of request '{request.id}' contain {what} at position {request.known}",
        "check the model's weights, or the request's logit_bias",
    )


def _token(result: int | SamplingError) -> int:
    assert isinstance(result, int)
    return result
