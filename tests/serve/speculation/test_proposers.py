"""Who proposes: n-grams against a plain search, draft models against the target, and lengths that follow what is accepted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, tiny

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.local import LocalExecutor
from armillary.serve.executors.native_forward import NativeForward
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.request import Request, SamplingParams
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.speculation.build import kept_layers
from armillary.serve.speculation.draft_model import DraftModel
from armillary.serve.speculation.ngram import NGram

BACKENDS = ("torch", *(("native",) if cpu_library.available() else ()))


def asked(prompt, output=(), name="r", **sampling):
    request = Request(name, tuple(prompt), SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **sampling}))
    request.output = list(output)
    return request


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=300)
def test_ngrams_propose_what_followed_the_longest_latest_match(known, shortest, more, count):
    def plain():
        for size in range(shortest + more, shortest - 1, -1):
            for start in range(len(known) - size - 1, -1, -1):
                if known[start : start + size] == known[-size:]:
                    text = list(known)
                    for _ in range(count):  # reading on into what is being proposed
                        text.append(text[start + size + len(text) - len(known)])
                    return tuple(text[len(known) :])
        return ()

    cut = random.Random(len(known)).randrange(1, len(known) + 1)
    proposer, request = NGram(shortest, shortest + more), asked(known[:cut])
    proposer.propose([request], [count])
    request.output = known[cut:]  # what it remembers is brought up to date
    assert proposer.propose([request], [count]) == [plain()]
    proposer.forget(request)
    assert proposer._known == {}


def forward_of(backend, decoder, blocks=40, block_size=4):
    if backend == "native":
        return NativeForward(decoder, num_blocks=blocks, block_size=block_size, threads=1)
    return TorchForward(decoder, num_blocks=blocks, block_size=block_size)


def served(decoder, backend, drafter, prompts, blocks=40, chunk=16, **sampling):
    config = EngineConfig(kv_blocks=blocks, block_size=4, max_batch_tokens=chunk)
    engine = Engine(LocalExecutor(forward_of(backend, decoder, blocks)), config, drafter=drafter)
    requests = [asked(prompt, name=f"{i}", **{"max_tokens": 14, "seed": i, **sampling}) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    return [request.output for request in requests], engine.stats, requests


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafting_model_changes_no_token_and_one_that_agrees_is_always_right(backend, temperature):
    decoder, rng = tiny(seed=3), random.Random(4)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for _ in range(5)]
    plain, _, _ = served(decoder, backend, None, prompts, temperature=temperature)

    same = DraftModel("same", forward_of(backend, decoder), num_blocks=40, block_size=4, context=64)
    got, stats, _ = served(decoder, backend, Adaptive(same, 4, VirtualClock()), prompts, temperature=temperature)
    assert got == plain
    assert stats.drafted_tokens > 20
    assert stats.accepted_tokens >= 0.9 * stats.drafted_tokens  # what is left are ties in the last bits
    assert same._pool.used_count == 0

    other = DraftModel("other", forward_of(backend, tiny(seed=9)), num_blocks=40, block_size=4, context=64)
    assert served(decoder, backend, Adaptive(other, 4, VirtualClock()), prompts, temperature=temperature)[0] == plain

    target = forward_of(backend, decoder)
    layers = DraftModel("layers", target.with_layers((0,)), num_blocks=40, block_size=4, context=64)
    # A pool in which sequences preempt each other, and whose prompts come in pieces.
    tight, stats, requests = served(
        decoder, backend, Adaptive(layers, 3, VirtualClock()), prompts, blocks=12, chunk=7, temperature=temperature
    )
    assert tight == plain
    assert any(request.preemptions for request in requests)
    assert stats.drafted_tokens > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_layers_are_the_model(backend):
    decoder = tiny(seed=2)
    target = forward_of(backend, decoder)
    whole = DraftModel("whole", target.with_layers(range(decoder.config.num_layers)), num_blocks=40, block_size=4, context=64)
    _, stats, _ = served(decoder, backend, Adaptive(whole, 4, VirtualClock()), [[1, 2, 3], [7] * 9])
    assert stats.accepted_tokens >= 0.9 * stats.drafted_tokens > 0


def test_a_draft_model_without_room_drafts_for_nobody():
    decoder = tiny(seed=3)
    small = DraftModel("small", forward_of("torch", decoder, 2), num_blocks=2, block_size=4, context=64)
    plain, _, _ = served(decoder, "torch", None, [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    got, stats, _ = served(decoder, "torch", Adaptive(small, 4, VirtualClock()), [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    assert got == plain
    assert stats.drafted_tokens < 20


class Fixed:
    name = "fixed"

    def __init__(self):
        self.asked = []

    def prepare(self, requests):
        pass

    def propose(self, requests, most):
        self.asked.append(tuple(most))
        return [(1,) * bound for bound in most]

    def laws(self, request):
        return ()

    def forget(self, request):
        pass


def test_who_is_cancelled_while_drafts_are_proposed_leaves_nothing_behind():
    decoder = tiny()
    model = DraftModel("draft", forward_of("torch", decoder), num_blocks=40, block_size=4, context=256)
    drafter = Adaptive(model, 3, VirtualClock())
    config = EngineConfig(kv_blocks=40, block_size=4, max_batch_tokens=16)
    executor = LocalExecutor(forward_of("torch", decoder), clock=VirtualClock())  # how long a draft is follows from times
    engine = Engine(executor, config, clock=VirtualClock(), drafter=drafter)
    requests = [asked(range(number, 9), name=f"{number}", temperature=1.0) for number in range(3)]
    prepare = model.prepare

    def cancel_first(asking):
        if asking and requests[0].finish_reason is None:
            engine.cancel("0")  # as another thread may
        prepare(asking)

    model.prepare = cancel_first
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    assert [request.finish_reason for request in requests] == ["cancelled", "length", "length"]
    assert engine.stats.drafted_tokens > 0
    assert (model._pool.used_count, model._sequences, drafter._evidence) == (0, {}, {})
    assert [request.draft_laws for request in requests] == [()] * 3  # a vocabulary each, and callers keep their requests


def test_a_drafter_that_fails_costs_the_drafts_and_no_answer(caplog):
    class Defective(Adaptive):
        def propose(self, requests, most):
            raise RuntimeError("no idea")

    decoder, prompts = tiny(), [(1, 2, 3), (4, 5)]
    expected, _, _ = served(decoder, "torch", None, prompts)
    outputs, stats, _ = served(decoder, "torch", Defective(NGram(), 3, VirtualClock()), prompts)
    assert (outputs, stats.drafted_tokens) == (expected, 0)
    assert "no idea" in caplog.text


def test_lengths_follow_what_is_accepted_and_drafting_is_tried_again():
    proposer = Fixed()
    drafter, request = Adaptive(proposer, 8, VirtualClock()), asked([1])
    for tokens in (1, 2, 8, 9) * 10:
        drafter.ran(tokens, 3_000_000 + 300_000 * tokens)
    for _ in range(20):
        [drafts] = drafter.propose([request], [100])
        drafter.verified(request, len(drafts), len(drafts))
    assert proposer.asked[-1] == (8,)
    lengths = []
    for _ in range(200):
        [drafts] = drafter.propose([request], [100])
        lengths.append(len(drafts))
        if drafts:
            drafter.verified(request, len(drafts), 0)
    assert lengths[0] == 8
    assert 0 < sum(map(bool, lengths[100:])) < 50, "what is never right is seldom tried, but it is"
    [drafts] = drafter.propose([request], [2])
    assert len(drafts) <= 2
    drafter.forget(request)
    assert drafter._evidence == {}


def test_a_self_draft_keeps_the_first_and_the_last_layer():
    assert kept_layers(30, 0.5) == (0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29)
    assert kept_layers(4, 0.5) == (0, 3)
    with pytest.raises(InputError, match="keeps 1 of 4 layers: keep from 2 to 3"):
        kept_layers(4, 0.2)
