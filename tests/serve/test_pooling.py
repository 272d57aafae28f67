"""A decoder's embeddings: the last hidden state of each input, computed in the engine's batches, equal to one plain pass."""

from __future__ import annotations

import copy

import openai
import pytest
import torch
from http_world import World
from models import FAMILIES, loaded, tiny
from torch.nn import functional

from armillary.kernels.attention import CausalAttend
from armillary.serve.config import EngineConfig
from armillary.serve.executors.native_forward import unsupported
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams


def last_state(decoder, tokens):
    with torch.no_grad():
        return decoder.hidden(torch.tensor(tokens), torch.arange(len(tokens)), CausalAttend([len(tokens)]))[-1]


def pooling(name, prompt):
    return Request(name, tuple(prompt), SamplingParams(max_tokens=0), pooling=True)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engines_hidden_states_are_the_decoders(backend, family):
    decoder = tiny(family)
    if backend == "native" and (why := unsupported(decoder.config)):
        pytest.skip(why)
    engine = build_engine(
        loaded(copy.deepcopy(decoder)),
        EngineConfig(backend=backend, kv_blocks=64, block_size=4, max_batch_tokens=16, threads=1),
        keep_weights=True,
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(90, (length,), generator=generator).tolist() for length in (1, 5, 40, 16, 17, 3)]
    prompts.append([*prompts[2][:30], 7, 8])  # begins as an earlier one: from the prefix cache
    requests = [pooling(f"p{index}", prompt) for index, prompt in enumerate(prompts)]
    talkers = [Request(f"t{index}", tuple(prompt), SamplingParams(max_tokens=6, temperature=0)) for index, prompt in enumerate(prompts[:3])]
    for request in [*requests[:3], *talkers, *requests[3:]]:
        engine.submit(request)
    engine.run_until_idle()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.finish_reason == "length"
        assert torch.allclose(request.pooled, last_state(decoder, prompt), atol=2e-5)
    alone = pooling("alone", prompts[-1])
    engine.submit(alone)
    engine.run_until_idle()
    assert alone.reused > 0
    assert torch.allclose(alone.pooled, requests[-1].pooled, atol=1e-5)
    assert all(len(talker.output) > 0 and talker.pooled is None for talker in talkers)


def test_over_http_they_have_length_1_and_rank_documents(tmp_path):
    decoder = tiny()
    world = World(tmp_path, loaded=loaded(copy.deepcopy(decoder)))
    try:
        with openai.OpenAI(base_url=world.url + "/v1", api_key="any", max_retries=0, timeout=30) as client:
            given = [[5, 6, 7], [9], [1, 2, 3, 4]]
            answer = client.embeddings.create(model="tiny", input=given)
            wanted = functional.normalize(torch.stack([last_state(decoder, tokens) for tokens in given]), dim=-1)
            assert torch.allclose(torch.tensor([entry.embedding for entry in answer.data]), wanted, atol=1e-5)
            assert answer.usage.prompt_tokens == 8
            with pytest.raises(openai.BadRequestError) as error:
                client.embeddings.create(model="tiny", input=[3] * 300)
            assert error.value.code == "context_length_exceeded"
        ranked = world.http.post("/rerank", json={"query": "AB", "documents": ["XYZ", "AB"]}).json()["results"]
        assert ranked[0] == {"index": 1, "relevance_score": pytest.approx(1.0, abs=1e-5)}
        world.wait_idle()
    finally:
        world.close()


def test_who_cannot_give_them_says_so_and_serves_on(tmp_path):
    world = World(tmp_path)  # the typist has no hidden states
    try:
        response = world.http.post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 400
        assert "hidden states" in response.json()["error"]["message"]
        assert world.http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        world.wait_idle()
    finally:
        world.close()
