"""The local executor computes what the plan says, scores what was asked, and lets one bad sequence fail alone."""

import pytest
import torch
from models import VOCABULARY, logits_of, tiny

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.local import LocalExecutor
from armillary.serve.executors.native_forward import NativeForward
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.kv_pool import kv_bytes_per_token, kv_capacity
from armillary.serve.request import Request, SamplingParams
from armillary.serve.sampling import SamplingError
from armillary.serve.schedule import Entry, Plan, Reason, Schedule

BACKENDS = ("torch", *(("native",) if cpu_library.available() else ()))


def executor_of(backend, decoder, blocks=16, block_size=4, **options):
    if backend == "native":
        return LocalExecutor(NativeForward(decoder, num_blocks=blocks, block_size=block_size, threads=1), **options)
    return LocalExecutor(TorchForward(decoder, num_blocks=blocks, block_size=block_size), **options)


def plan(*parts):
    """(request, start, count, blocks) -> a plan; samples where the last known token is computed."""
    entries = [
        Entry(request.id, start, count, start + count == request.known, len(blocks), Reason.PROMPT)
        for request, start, count, blocks in parts
    ]
    return Plan(Schedule(0, tuple(entries)), tuple(part[0] for part in parts), tuple(part[3] for part in parts))


def greedy(name, prompt, **options):
    return Request(name, tuple(prompt), SamplingParams(temperature=0.0, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outcomes_keep_the_plans_order_whatever_the_batchs(backend):
    decoder = tiny()
    executor = executor_of(backend, decoder)
    long, short, chunked = greedy("long", range(11)), greedy("short", (5, 9)), greedy("chunked", range(20, 30))
    executor.run(plan((long, 0, 10, [0, 1, 2]), (short, 0, 1, [9])))
    # A chunk that does not sample, then a decode at position 10, a whole prompt and a decode at position 1.
    whole = greedy("whole", (1, 2, 3))
    outcome = executor.run(plan((chunked, 0, 6, [5, 4]), (long, 10, 1, [0, 1, 2]), (whole, 0, 3, [7]), (short, 1, 1, [9])))
    wanted = [(), *((int(logits_of(decoder, request.prompt)[-1].argmax()),) for request in (long, whole, short))]
    assert [tuple(one.token for one in sampled) for sampled in outcome.sampled] == wanted
    assert outcome.prompt_logprobs == ((),) * 4
    assert outcome.failed == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4, 12, 64])
def test_prompt_scores_are_the_models_however_the_prompt_was_cut(backend, chunk):
    decoder = tiny("qwen2")
    prompt = [(7 * i) % VOCABULARY for i in range(12)]
    exact = logits_of(decoder, prompt).double().log_softmax(-1)
    request, other = greedy("r", prompt, prompt_logprobs=2, max_tokens=2), greedy("other", prompt[::-1], max_tokens=3)
    engine = Engine(executor_of(backend, decoder), EngineConfig(kv_blocks=16, block_size=4, max_batch_tokens=max(chunk, 2)))
    engine.submit(other)
    engine.submit(request)
    engine.run_until_idle()
    first, *rest = request.prompt_logprobs
    assert first is None
    assert [one.token for one in rest] == prompt[1:]
    for position, one in enumerate(rest, start=1):
        assert one.logprob == pytest.approx(exact[position - 1, prompt[position]].item(), abs=1e-4)
        assert [token for token, _ in one.top] == exact[position - 1].topk(2).indices.tolist()
    assert other.prompt_logprobs == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_that_is_not_finite_fails_alone(backend):
    decoder = tiny()
    with torch.no_grad():
        decoder.embed_tokens.weight[13] = float("nan")
    requests = [
        greedy(str(i), prompt, max_tokens=6, ignore_eos=True) for i, prompt in enumerate(((1, 2, 3), (4, 13, 5), (6, 7), (13,), (8,) * 9))
    ]
    engine = Engine(executor_of(backend, decoder), EngineConfig(kv_blocks=16, block_size=4, max_batch_tokens=16))
    errors = {}
    for request in requests:
        request.on_event = lambda event: event.error is not None and errors.setdefault(event.request_id, event.error)
        engine.submit(request)
    engine.run_until_idle()
    assert [request.finish_reason for request in requests] == ["length", "error", "length", "error", "length"]
    assert all(isinstance(error, SamplingError) and "NaN" in str(error) for error in errors.values())
    clean = tiny()
    for request in (requests[0], requests[2], requests[4]):
        known = list(request.prompt)
        for token in request.output:
            assert token == int(logits_of(clean, known)[-1].argmax())
            known.append(token)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_a_failed_sequence_serve_the_next(backend):
    """The cache keeps its NaN until it is overwritten: whoever gets the blocks must not read it."""
    decoder = tiny()
    with torch.no_grad():
        decoder.embed_tokens.weight[13] = float("nan")
    engine = Engine(executor_of(backend, decoder, blocks=3), EngineConfig(kv_blocks=3, block_size=4))
    bad, good, small = (
        greedy("bad", (13,) * 10, max_tokens=1),
        greedy("good", (1, 2, 3, 4, 5), max_tokens=4),
        greedy("small", (9,), max_tokens=3),
    )
    engine.submit(bad)
    engine.run_until_idle()
    engine.submit(good)
    engine.submit(small)
    engine.run_until_idle()
    assert (bad.finish_reason, good.finish_reason, small.finish_reason) == ("error", "length", "length")
    assert good.output[0] == int(logits_of(tiny(), good.prompt)[-1].argmax())


def test_the_given_decoder_is_left_as_it_was():
    decoder = tiny("qwen3")
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    forward = TorchForward(decoder, num_blocks=4, block_size=4)
    LocalExecutor(forward).run(plan((greedy("r", (1, 2, 3)), 0, 3, [0])))
    assert before.keys() == decoder.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    assert forward.decoder.embed_tokens.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_in_place_packing_holds_the_weights_once():
    decoder = tiny()
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    forward = TorchForward(decoder, num_blocks=4, block_size=4, in_place=True)
    assert forward.decoder is decoder
    assert forward.weight_bytes == total


def test_time_is_the_executors_clock_and_threads_are_set():
    clock = VirtualClock(500)
    executor = executor_of("torch", tiny(), clock=clock, threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outcome = executor.run(plan((greedy("r", (1,)), 0, 1, [0])))
        assert (outcome.start, outcome.end) == (500, 500)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_empty_plan_gives_an_empty_outcome():
    outcome = executor_of("torch", tiny()).run(Plan(Schedule(0), (), ()))
    assert (outcome.sampled, outcome.prompt_logprobs, outcome.failed) == ((), (), ())


def test_capacity_in_closed_form():
    config = tiny().config  # 2 layers x (k, v) x 2 heads x 16 x 4 bytes = 512 bytes a token
    assert config.kv_bytes_per_token() == 512
    assert kv_capacity(config, 512 * 16 * 10, 16) == 10
    assert kv_capacity(config, 512 * 16 * 10 - 1, 16) == 9
    assert kv_capacity(config, 512 * 16 * 10, 16, "fp16") == 20
    assert kv_bytes_per_token(config, "int8") == 2 * 2 * 2 * (16 + 4)  # a byte a number, and a scale a head
    with pytest.raises(InputError, match="do not hold one KV block"):
        kv_capacity(config, 511, 1)
