"""With `deterministic` an answer is bit for bit the same alone, in company, preempted, and for any number of threads."""

import random

import pytest
from models import VOCABULARY, loaded, tiny

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.serve import llm
from armillary.serve.config import EngineConfig
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.service import Service

needs_native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")
MODEL = loaded(tiny("gemma2", max_context=1024, windows=(300, None)))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def answers(requests, **options):
    """Tokens and the exact log-probabilities of each request, by one engine, and how often any of them was preempted."""
    engine = build_engine(MODEL, EngineConfig(deterministic=True, **options), keep_weights=True)
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    assert all(request.finish_reason == "length" for request in requests), [request.finish_reason for request in requests]
    found = [[(one.token, one.logprob, one.top) for one in request.logprobs] for request in requests]
    return found, sum(request.preemptions for request in requests)


@needs_native
@pytest.mark.parametrize(("quantize", "kv_dtype"), [("none", "fp32"), ("fp16", "fp16"), ("int8", "fp8"), ("int4", "int8")])
def test_company_preemption_chunks_and_threads_change_no_bit(quantize, kv_dtype):
    rng = random.Random(7)
    asked = [
        (tuple(rng.randrange(VOCABULARY) for _ in range(length)), SamplingParams(24, temperature=temperature, seed=length, logprobs=3, ignore_eos=True))
        for length, temperature in ((601, 0.0), (19, 1.0), (1, 0.0), (130, 0.7), (300, 1.0))
    ]  # fmt: skip
    formats = {"quantize": quantize, "kv_dtype": kv_dtype}
    alone = [answers([Request("x", *one)], kv_blocks=64, threads=1, **formats)[0][0] for one in asked]
    for threads, budget, pool in ((3, 512, 400), (2, 37, 400), (1, 64, 160)):
        requests = [Request(str(i), *one) for i, one in enumerate(asked)]
        together, preempted = answers(requests, threads=threads, max_batch_tokens=budget, kv_blocks=pool, block_size=4, **formats)
        assert together == alone
        assert (preempted > 0) == (pool == 160)


@needs_native
def test_a_chat_without_a_seed_of_its_own_has_the_engines():
    model = loaded(tiny(), template=TEMPLATE)
    ask = [{"role": "user", "content": "hello"}]
    sampling = SamplingParams(12, temperature=1.0, ignore_eos=True)

    def chats(deterministic, seed=3):
        engine = build_engine(model, EngineConfig(deterministic=deterministic, seed=seed, kv_blocks=32), keep_weights=True)
        service = Service(engine, model)
        engine.start()
        try:
            return [[event.token for event in service.stream(ask, sampling, whole_context=False)] for _ in range(2)]
        finally:
            engine.stop()

    first, second = chats(True)
    assert first == second
    assert chats(True) == [first, first]  # another engine, another day
    assert chats(True, seed=4)[0] != first
    plain = chats(False)
    assert plain[0] != plain[1]


@pytest.mark.parametrize("wanted", [{"deterministic": True}, {"quantize": "int4"}, {"kv_dtype": "fp16"}])
def test_what_torch_cannot_promise_is_refused_before_anything_is_loaded(wanted, monkeypatch):
    (name,) = wanted
    with pytest.raises(ValueError, match=f"{name} needs the native backend, but the torch backend was asked for"):
        EngineConfig(backend="torch", **wanted)
    monkeypatch.setattr(llm, "unsupported", lambda config: "there is no compiler")
    with pytest.raises(InputError, match=f"{name} needs the native backend, but there is no compiler"):
        build_engine(MODEL, EngineConfig(kv_blocks=4, **wanted), keep_weights=True)
