"""Drafts do not change the distribution of what is drawn, whatever the proposer believes (Leviathan et al., theorem A.1)."""

import math

import pytest
import torch
from scipy import stats

from armillary.serve.request import Request, SamplingParams
from armillary.serve.sampling import Row, SamplingError, law, sample, uniform
from armillary.serve.speculation.rejection import drawn as draw_from
from armillary.serve.speculation.verification import accept

DRAWS = 6_000
CASES = {
    "alike": ((0.5, 0.3, 0.2), (0.5, 0.3, 0.2)),
    "unlike": ((0.6, 0.3, 0.1), (0.1, 0.2, 0.7)),
    "zeros in q": ((0.4, 0.4, 0.2), (1.0, 0.0, 0.0)),
    "zeros in p": ((0.0, 0.3, 0.7), (0.4, 0.3, 0.3)),
    "disjoint": ((0.0, 0.25, 0.75), (1.0, 0.0, 0.0)),
}


def drawn(law, position_of):
    """A token of each of DRAWS requests, from the distribution `law` at position `position_of`."""
    logits = torch.tensor([math.log(p) if p else -math.inf for p in law]).expand(DRAWS, -1)
    rows = [Row(Request(str(seed), (0,) * position_of, SamplingParams(seed=seed))) for seed in range(DRAWS)]
    return [result.token for result in sample(logits, rows)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_verified_by_the_draw_itself_is_distributed_as_without_drafts(case):
    p, q = CASES[case]
    target, draft = drawn(p, 3), drawn(q, 3)  # the same random number decides both
    emitted = target  # accepted where equal; where not, the target's own draw stands in its place
    counts = [emitted.count(token) for token in range(3)]
    possible = [token for token in range(3) if p[token]]
    assert sum(counts[token] for token in possible) == DRAWS
    if len(possible) > 1:
        assert stats.chisquare([counts[token] for token in possible], [p[token] * DRAWS for token in possible]).pvalue > 1e-3
    # The rate of acceptance is the overlap of the two laws' quantiles, and at most 1 - TV, which rejection sampling reaches.
    edges = lambda law: [(sum(law[:token]), sum(law[: token + 1])) for token in range(3)]  # noqa: E731
    overlap = sum(max(0.0, min(b, d) - max(a, c)) for (a, b), (c, d) in zip(edges(p), edges(q), strict=True))
    rate = sum(a == b for a, b in zip(target, draft, strict=True)) / DRAWS
    assert rate == pytest.approx(overlap, abs=0.03)
    assert overlap <= sum(min(a, b) for a, b in zip(p, q, strict=True)) + 1e-12


def test_a_draft_named_outright_is_accepted_as_often_as_it_is_likely():
    p = (0.55, 0.3, 0.15)
    for token in range(3):
        rate = sum(one == token for one in drawn(p, 5)) / DRAWS
        assert rate == pytest.approx(p[token], abs=0.03)


def verified(p, q, drafts, count):
    """What `count` requests without a seed get after `drafts` drafts drawn from q, where p is the target's law everywhere."""
    logits = torch.tensor([math.log(x) if x else -math.inf for x in p]).expand(drafts + 1, -1)
    q = torch.tensor(q, dtype=torch.float64)
    for name in range(count):
        request = Request(str(name), (0, 0), SamplingParams())
        request.drafts = tuple(draw_from(q, uniform(request, 2 + ahead, 5, "draft")) for ahead in range(drafts))
        request.draft_laws = (q,) * drafts
        rows = [Row(request, request.drafts[:ahead]) for ahead in range(drafts + 1)]
        yield [one.token for one in accept(rows, sample(logits, rows, 5), logits, 5)]


@pytest.mark.parametrize("case", CASES)
def test_rejection_sampling_leaves_the_targets_law_and_accepts_what_the_laws_share(case):
    p, q = CASES[case]
    answers = list(verified(p, q, 2, 2_500))
    for place in range(2):  # the first token, and those that followed an accepted draft
        tokens = [answer[place] for answer in answers if len(answer) > place]
        possible = [token for token in range(3) if p[token]]
        assert set(tokens) <= set(possible)
        if len(possible) > 1 and len(tokens) > 200:
            counts = [tokens.count(token) for token in possible]
            assert stats.chisquare(counts, [p[token] * len(tokens) for token in possible]).pvalue > 1e-3
    shared = sum(min(a, b) for a, b in zip(p, q, strict=True))
    assert sum(len(answer) > 1 for answer in answers) / len(answers) == pytest.approx(shared, abs=0.035)
    assert sum(map(len, answers)) / len(answers) == pytest.approx(1 + shared + shared**2, abs=0.07)


def test_a_law_is_what_is_drawn_from_and_nothing_to_draw_is_an_error():
    row = torch.randn(40, generator=torch.Generator().manual_seed(1))
    asked = Request("r", (1,), SamplingParams(temperature=0.8, top_k=9, top_p=0.8, frequency_penalty=0.5))
    asked.output = [3, 3, 7]
    found = law(row, Row(asked))
    assert found.sum() == pytest.approx(1)
    many = [Request(str(i), (1,), SamplingParams(temperature=0.8, top_k=9, top_p=0.8, frequency_penalty=0.5, seed=i)) for i in range(3_000)]
    for one in many:
        one.output = [3, 3, 7]
    counts = torch.bincount(torch.tensor([r.token for r in sample(row.expand(3_000, -1), [Row(one) for one in many])]), minlength=40)
    kept = found > 0
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept].numpy(), (found[kept] * 3_000).numpy()).pvalue > 1e-3
    with pytest.raises(SamplingError, match="nothing but -inf"):
        law(torch.full((5,), -math.inf), Row(Request("r", (1,), SamplingParams())))
