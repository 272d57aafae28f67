"""Which drafts stand: those that the model draws itself, or, where a draft was drawn from a law of its own, those that rejection sampling lets stand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from armillary.serve.request import TokenLogprob
from armillary.serve.sampling import Row, SamplingError, law, score, uniform
from armillary.serve.speculation.rejection import accepted, recovered


def accept(
    rows: Sequence[Row], drawn: Sequence[TokenLogprob | SamplingError], logits: Tensor, seed: int | None
) -> tuple[TokenLogprob, ...] | SamplingError:
    """The tokens of a sequence whose logits after 0, 1, ... drafts are `logits` [1 + drafts, vocab] and what was `drawn` from them.

    The accepted drafts, and one token more. What cannot be drawn now is tried again without drafts.
    """
    drafts, laws = rows[-1].drafts, rows[0].request.draft_laws
    if len(laws) >= len(drafts) > 0:
        return _by_rejection(rows, drawn, logits, seed)
    tokens: list[TokenLogprob] = []
    for ahead, result in enumerate(drawn):
        if isinstance(result, SamplingError):
            return tuple(tokens) if tokens else result
        tokens.append(result)
        if ahead < len(drafts) and result.token != drafts[ahead]:
            break
    return tuple(tokens)


def _by_rejection(
    rows: Sequence[Row], drawn: Sequence[TokenLogprob | SamplingError], logits: Tensor, seed: int | None
) -> tuple[TokenLogprob, ...] | SamplingError:
    request, drafts = rows[0].request, rows[-1].drafts
    tokens: list[TokenLogprob] = []
    for draft, row, values in zip(drafts, rows, logits, strict=False):
        try:
            p, q = law(values.float(), row), request.draft_laws[len(tokens)]
        except SamplingError as error:
            return tuple(tokens) if tokens else error
        stands = accepted(p, q, draft, uniform(request, row.position, seed, "accept"))
        token = draft if stands else recovered(p, q, uniform(request, row.position, seed, "recover"))
        wanted = request.sampling.logprobs
        tokens.append(TokenLogprob(token) if wanted is None else score(values[None], [token], [wanted])[0])
        if not stands:
            return tuple(tokens)
    last = drawn[len(drafts)]
    return tuple(tokens) if isinstance(last, SamplingError) else (*tokens, last)
