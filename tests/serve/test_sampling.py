"""Sampling: every filter against its definition, every draw against the exact distribution."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation import logits_process as hf

from armillary.serve import sampling
from armillary.serve.request import Request, SamplingParams, TokenLogprob
from armillary.serve.sampling import Row, SamplingError, reshape, score

VOCAB = 50


def request(name: str = "r", prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **options: object) -> Request:
    made = Request(name, prompt, SamplingParams(**options))  # type: ignore[arg-type]
    made.output = list(output)
    return made


def sample(logits: torch.Tensor, requests: list[Request]) -> list[TokenLogprob | SamplingError]:
    return sampling.sample(logits, [Row(one) for one in requests])


def uniform(one: Request, seed: int | None = None) -> float:
    return sampling.uniform(one, one.known, seed)


def tokens(results: list[TokenLogprob | SamplingError]) -> list[int]:
    assert all(isinstance(result, TokenLogprob) for result in results), results
    return [result.token for result in results]  # type: ignore[union-attr]


def draws(row: torch.Tensor, count: int, **options: object) -> torch.Tensor:
    """How often each token is drawn in `count` draws with different seeds."""
    requests = [request(seed=i, **options) for i in range(count)]
    return torch.bincount(torch.tensor(tokens(sample(row.expand(count, -1), requests))), minlength=len(row))


def expected(row: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """The distribution by definition, in float64 and plain loops."""
    probability = (row.double() / temperature).softmax(0)
    order = sorted(range(len(row)), key=lambda i: -probability[i])
    if top_k:
        order = order[:top_k]
    total = sum(probability[i].item() for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += probability[i].item()
    kept = [i for i in kept if probability[i] >= min_p * probability[order[0]]]
    out = torch.zeros_like(probability)
    out[kept] = probability[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.2},
    ],
)
def test_draws_follow_the_exact_distribution(options: dict[str, float]) -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    law, count = expected(row, **options), 4000  # type: ignore[arg-type]
    counts = draws(row, count, **options)
    assert counts[law == 0].sum() == 0
    kept = law > 0
    # Tokens expected fewer than five times are pooled, as the test asks.
    rare = kept & (law * count < 5)
    observed = [*counts[kept & ~rare].tolist(), counts[rare].sum().item()]
    wanted = [*(law[kept & ~rare] * count).tolist(), (law[rare] * count).sum().item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted).pvalue > 1e-4


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from((0.01, 1.0, 8.0)),
    top_k=st.sampled_from((0, 1, 2, 7, 50, 1000)),
    top_p=st.sampled_from((1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)),
    min_p=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    temperature=st.sampled_from((0.1, 1.0, 2.0)),
)
def test_never_a_token_outside_the_kept_set(seed: int, scale: float, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    law = expected(row, temperature, top_k, top_p, min_p)
    counts = draws(row, 20, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # float32 logits can move a token across a filter's edge only when it lies on it to within rounding.
    slack = expected(row, temperature, top_k, min(1.0, top_p * (1 + 1e-6)), min_p * (1 - 1e-6))
    assert counts[(law == 0) & (slack == 0)].sum() == 0


def test_top_p_is_the_smallest_set_that_reaches_the_mass() -> None:
    row = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert (draws(row, 300, top_p=0.5) > 0).tolist() == [True, False, False, False]
    assert (draws(row, 300, top_p=0.51) > 0).tolist() == [True, True, False, False]
    assert (draws(row, 300, top_p=0.76) > 0).sum() == 3
    assert (draws(row, 300, top_p=0.9) > 0).sum() == 4


def test_top_p_on_a_flat_vocabulary_needs_the_whole_of_it() -> None:
    row = torch.zeros(5000)
    row[0] = 20.0  # the first look keeps one token, with little more than half of the mass at temperature 2.35
    law = expected(row, temperature=2.35, top_p=0.9)
    assert (law > 0).sum() > 1000
    counts = draws(row, 2000, temperature=2.35, top_p=0.9)
    assert counts[law == 0].sum() <= 2000 * 2e-4 * 5  # equal logits: which of them are kept is free, how many is not
    assert abs(counts[0].item() / 2000 - law[0].item()) < 0.05


def test_greedy_is_the_limit_of_low_temperature() -> None:
    rows = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(1))
    greedy = tokens(sample(rows, [request(temperature=0.0)] * 64))
    assert greedy == rows.argmax(-1).tolist()
    assert tokens(sample(rows, [request(temperature=1e-4, seed=i) for i in range(64)])) == greedy
    assert tokens(sample(rows, [request(temperature=2.0, top_k=1, seed=i) for i in range(64)])) == greedy
    assert tokens(sample(rows, [request(temperature=2.0, top_p=1e-9, seed=i) for i in range(64)])) == greedy
    assert tokens(sample(rows, [request(temperature=2.0, min_p=1.0, seed=i) for i in range(64)])) == greedy


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_filters_and_penalties_equal_hugging_face(seed: int) -> None:
    rng = random.Random(seed)
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    prompt, output = tuple(rng.choices(range(VOCAB), k=8)), tuple(rng.choices(range(VOCAB), k=rng.choice((0, 5))))
    penalty = rng.choice((0.7, 1.1, 2.0))
    ids = torch.tensor([[*prompt, *output]])
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None].clone())
    ours = reshape(row, Row(request(prompt=prompt, output=output, repetition_penalty=penalty)))
    torch.testing.assert_close(ours, theirs[0], atol=0, rtol=1e-6)

    temperature, top_k, top_p, min_p = rng.choice((0.5, 1.3)), rng.choice((1, 5, 30)), rng.choice((0.3, 0.8)), rng.choice((0.01, 0.3))
    for warper in (
        hf.TemperatureLogitsWarper(temperature),
        hf.TopKLogitsWarper(top_k),
        hf.TopPLogitsWarper(top_p),
        hf.MinPLogitsWarper(min_p),
    ):
        theirs = warper(ids, theirs)
    kept = theirs[0].isfinite()
    assert torch.equal(expected(ours, temperature, top_k, top_p, min_p) > 0, kept)


def test_presence_and_frequency_are_the_formula_of_the_openai_api() -> None:
    row = torch.arange(6.0)
    asked = request(prompt=(5,), output=(1, 1, 1, 4), presence_penalty=0.5, frequency_penalty=0.25)
    wanted = row - torch.tensor([0.0, 0.5 + 0.75, 0.0, 0.0, 0.5 + 0.25, 0.0])
    assert torch.equal(reshape(row, Row(asked)), wanted)
    assert torch.equal(row, torch.arange(6.0))


def test_bias_forbids_and_forces() -> None:
    row = torch.zeros(VOCAB)
    assert draws(row, 50, logit_bias=((7, 100.0),))[7] == 50
    assert draws(row, 300, logit_bias=((7, -100.0), (7, -5.0)))[7] == 0
    assert tokens(sample(torch.arange(4.0)[None], [request(temperature=0.0, logit_bias=((3, -100.0),))])) == [2]


def test_a_seeded_draw_does_not_depend_on_its_batch() -> None:
    rows = torch.randn(9, 3000, generator=torch.Generator().manual_seed(2))
    mixed = [
        request(f"{i}", seed=i, temperature=(0.0, 0.7, 1.3)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=(0, 40, 0, 7)[i % 4]) for i in range(9)
    ]
    together = tokens(sample(rows, mixed))
    assert tokens(sample(rows.flip(0), mixed[::-1])) == together[::-1]
    assert [tokens(sample(rows[i : i + 1], [mixed[i]]))[0] for i in range(9)] == together


def test_draws_are_keyed_by_seed_position_and_id() -> None:
    assert uniform(request("a", seed=5)) == uniform(request("b", seed=5), seed=9)
    assert uniform(request(seed=5)) != uniform(request(seed=5, output=(1,)))
    assert uniform(request("a"), 1) != uniform(request("b"), 1)
    assert uniform(request("a"), 1) != uniform(request("a"), 2)
    assert uniform(request("a"), 1) == uniform(request("a"), 1)
    values = [uniform(request(seed=i)) for i in range(4000)]
    assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error_of_one_request(bad: float, temperature: float) -> None:
    rows = torch.randn(3, VOCAB)
    clean = rows.clone()
    rows[1, 17] = bad
    asked = [request(f"{i}", temperature=temperature, seed=i, logprobs=2) for i in range(3)]
    results = sample(rows, asked)
    assert isinstance(results[1], SamplingError)
    assert "request '1'" in str(results[1])
    whole = sample(clean, asked)
    assert (results[0], results[2]) == (whole[0], whole[2])


def test_nothing_left_is_an_error_and_masked_tokens_are_not() -> None:
    rows = torch.full((2, 5), -math.inf)
    rows[1, 3] = 0.0
    for temperature in (0.0, 1.0):
        results = sample(rows, [request(temperature=temperature)] * 2)
        assert isinstance(results[0], SamplingError)
        assert isinstance(results[1], TokenLogprob)
        assert results[1].token == 3
    outside = sample(torch.zeros(1, 5), [request(logit_bias=((5, 1.0),))])
    assert isinstance(outside[0], SamplingError)
    assert "outside the vocabulary of 5" in str(outside[0])


def test_logprobs_are_of_the_model_not_of_the_filters() -> None:
    rows = torch.randn(4, VOCAB)
    exact = rows.double().log_softmax(-1)
    asked = [
        request(temperature=t, top_k=3, logit_bias=((4, 50.0),), seed=1, logprobs=n) for t, n in ((0.0, 0), (1.0, 1), (2.0, 7), (0.5, 500))
    ]
    for row, result, wanted in zip(exact, sample(rows, asked), (0, 1, 7, VOCAB), strict=True):
        assert isinstance(result, TokenLogprob)
        assert result.token == 4
        assert result.logprob == pytest.approx(row[4].item(), abs=1e-5)
        best = row.argsort(descending=True)[:wanted]
        assert [token for token, _ in result.top] == best.tolist()
        assert [value for _, value in result.top] == pytest.approx(row[best].tolist(), abs=1e-5)
    silent = sample(rows, [replace_logprobs(one) for one in asked])
    assert all(isinstance(result, TokenLogprob) and result.logprob is None and result.top == () for result in silent)


def replace_logprobs(one: Request) -> Request:
    return Request(one.id, one.prompt, replace(one.sampling, logprobs=None))


def test_scores_of_given_tokens() -> None:
    rows = torch.randn(2, VOCAB)
    exact = rows.double().log_softmax(-1)
    first, second = score(rows, [3, 9], [0, 2])
    assert first.logprob == pytest.approx(exact[0, 3].item(), abs=1e-5)
    assert first.top == ()
    assert second.token == 9
    assert [token for token, _ in second.top] == exact[1].argsort(descending=True)[:2].tolist()


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_row_after_drafts_is_the_row_of_a_request_that_knows_them(data: st.DataObject) -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    output = tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=6)))
    cut = data.draw(st.integers(0, len(output)))
    options = {"seed": 3, "temperature": data.draw(st.sampled_from([0.0, 1.0])), "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    known = Row(request(output=output, **options))
    drafted = Row(request(output=output[:cut], **options), output[cut:])
    assert sampling.sample(row[None], [known]) == sampling.sample(row[None], [drafted])


@given(allowed=st.sets(st.integers(0, VOCAB - 1), min_size=1), temperature=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 99))
def test_a_grammar_leaves_the_distribution_of_what_it_allows(allowed: set[int], temperature: float, seed: int) -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    mask = torch.from_numpy(words.view(np.int32))
    left = row.clone()
    left[[token for token in range(VOCAB) if token not in allowed]] = -math.inf
    asked = request(seed=seed, temperature=temperature, logprobs=1)
    [got], [wanted] = sampling.sample(row[None], [Row(asked, (), mask)]), sampling.sample(left[None], [Row(asked)])
    assert isinstance(got, TokenLogprob)
    assert isinstance(wanted, TokenLogprob)
    assert got.token == wanted.token
    assert got.logprob == score(row[None], [got.token], [0])[0].logprob, "the model's own, before the grammar"
