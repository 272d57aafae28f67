"""What a drawn token means for its request: text, scores, and whether it was the last."""

from __future__ import annotations

from collections.abc import Collection

from armillary.serve.request import Event, FinishReason, Request, TokenLogprob


def extend(request: Request, sampled: TokenLogprob, eos_ids: Collection[int], at: int) -> Event:
    """Append a drawn token to `request`; the event says with `finish_reason` when nothing follows."""
    token, sampling = sampled.token, request.sampling
    request.output.append(token)
    if request.first_token is None:
        request.first_token = at
    request.last_token = at
    if request.constraint is not None:
        request.constraint.accept(token)
    logprob = sampled if sampling.logprobs is not None else None
    if logprob is not None:
        request.logprobs.append(logprob)
    reason: FinishReason | None = None
    text = ""
    if token in sampling.stop_token_ids or (token in eos_ids and not sampling.ignore_eos):
        reason = "stop"  # the token itself is no text
    elif request.text is not None:
        text = request.text.push(token)
        if request.text.stopped:
            reason = "stop"
    if reason is None and request.constraint is not None and request.constraint.finished:
        reason = "stop"
    if reason is None and len(request.output) >= sampling.max_tokens:
        reason = "length"
    if reason is not None and request.text is not None and not request.text.stopped:
        text += request.text.finish()
    return Event(request.id, token, text, logprob, reason, at)


def keep_prompt_scores(request: Request, start: int, scores: tuple[TokenLogprob, ...]) -> None:
    """Store the scores of positions start+1, start+2, ...; what a recomputation scores again is kept once."""
    kept = request.prompt_logprobs
    if not kept:
        kept.append(None)  # nothing predicts the first token
    kept.extend(scores[len(kept) - (start + 1) :])
