"""The official openai client, and rerank requests, against an encoder behind its server."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
import torch

from armillary.models.encoder import load_encoder
from armillary.serve.embedder import EncoderService
from armillary.serve.http.encoder_app import create_encoder_app
from armillary.serve.http.server import Server

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from encoders import tiny_bert


class Held:
    """The encoder, held between batches when a test wants to see who waits."""

    def __init__(self, encoder):
        self._embed = encoder.embed
        self.go = threading.Event()
        self.go.set()
        self.batches: list[int] = []
        self.failure: Exception | None = None

    def __call__(self, sequences):
        self.batches.append(len(sequences))
        assert self.go.wait(30)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self._embed(sequences)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    loaded = load_encoder(str(tiny_bert(tmp_path_factory.mktemp("tiny") / "tiny")))
    held = Held(loaded.encoder)
    loaded.encoder.embed = held
    service = EncoderService(loaded, max_batch_tokens=64, max_queue=100)
    service.model_name = "tiny"
    service.start()
    with Server(create_encoder_app(service, api_key="s3cret"), port=0, grace_seconds=1) as server:
        yield service, held, server.url
    service.stop()


@pytest.fixture
def client(world):
    with openai.OpenAI(base_url=world[2] + "/v1", api_key="s3cret", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def http(world):
    with httpx.Client(base_url=world[2], headers={"authorization": "Bearer s3cret"}, timeout=30) as http:
        yield http


def vectors(world, *texts):
    service, held, _ = world
    return held._embed([service.text_tokens(text) for text in texts])


def test_embeddings_are_the_encoders_in_either_format(world, client):
    expected = vectors(world, "the sun", "a")
    for fields in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 32}):
        answer = client.embeddings.create(model="tiny", input=["the sun", "a"], **fields)
        assert [entry.index for entry in answer.data] == [0, 1]
        found = [entry.embedding for entry in answer.data]
        if fields.get("encoding_format") == "base64":
            import base64

            found = [torch.frombuffer(bytearray(base64.b64decode(one)), dtype=torch.float32).tolist() for one in found]
        assert torch.allclose(torch.tensor(found), expected, atol=1e-6)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (7, 7, "tiny")


def test_a_string_or_tokens_are_inputs_too(world, client):
    ids = list(world[0].text_tokens("the sun"))
    expected = vectors(world, "the sun")[0].tolist()
    for given in ("the sun", ids, [ids], ["the sun"]):
        assert client.embeddings.create(model="tiny", input=given).data[0].embedding == pytest.approx(expected, abs=1e-6)


def test_documents_come_back_in_the_order_of_their_likeness(world, http):
    documents = ["a b c", "the sun", "the moon", "x"]
    query, *others = vectors(world, "the sun", *documents)
    scores = torch.stack(others) @ query
    order = scores.argsort(descending=True).tolist()
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = http.post(path, json={"model": "tiny", "query": "the sun", "documents": documents}).json()
        assert [result["index"] for result in answer["results"]] == order
        assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert answer["results"][0] == {"index": 1, "relevance_score": pytest.approx(1.0, abs=1e-5)}
    body = {"query": "the sun", "documents": [{"text": text} for text in documents], "top_n": 2, "return_documents": True}
    answer = http.post("/rerank", json=body).json()
    assert [result["document"]["text"] for result in answer["results"]] == [documents[index] for index in order[:2]]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"dimensions": 16}, "dimensions", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [[1], "a", 3]}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": [9999]}, "input", "invalid_value"),
        ({"input": "a " * 30}, "input", "context_length_exceeded"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"extra_body": {"truncate_prompt_tokens": 5}}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"extra_body": {"dimension": 5}}, "dimension", "unknown_parameter"),
    ],
)
def test_bad_fields_are_refused_by_name(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(**{"model": "tiny", "input": "a", **fields})
    assert (error.value.param, error.value.code) == (param, code)


def test_both_numbers_of_an_input_that_is_too_long_are_told(client):
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] has 32 tokens.*24"):
        client.embeddings.create(model="tiny", input=["a", "a " * 30])


@pytest.mark.parametrize("body", [{"query": "a"}, {"query": "", "documents": ["a"]}, {"query": "a", "documents": [""]},
    {"query": "a", "documents": []}, {"query": "a", "documents": ["a"], "top_n": 0}, {"query": "a", "documents": ["a"], "rank_fields": ["x"]},
    {"query": "a", "documents": [{"text": "a", "title": "b"}]}, {"query": "a", "documents": ["a " * 30]}])  # fmt: skip
def test_bad_rerank_requests_are_refused(http, body):
    response = http.post("/rerank", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"]


def test_other_models_keys_and_paths_are_refused(world, client, http):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert httpx.get(world[2] + "/v1/models").status_code == 401
    assert http.get("/v1/models/tiny").json()["dimensions"] == 32
    assert http.get("/health").json() == {"status": "ok"}
    assert "armillary_embedded_sequences_total" in http.get("/metrics").text


def test_who_waits_shares_batches_and_who_leaves_is_not_computed(world, http):
    service, held, url = world
    held.batches.clear()

    async def crowd():
        async with httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer s3cret"}, timeout=30) as client:

            def ask(text):
                return asyncio.create_task(client.post("/v1/embeddings", json={"input": text}))

            held.go.clear()
            first = ask("a")
            while held.batches != [1]:
                await asyncio.sleep(0.005)
            staying = [ask("b c") for _ in range(12)]
            leaving = ask(["x"] * 50)
            while service.waiting < 62:
                await asyncio.sleep(0.005)
            over = await client.post("/v1/embeddings", json={"input": ["y"] * 60})
            leaving.cancel()
            await asyncio.wait([leaving])
            while sum(not job.future.cancelled() for job in service._queue) > 12:
                await asyncio.sleep(0.005)
            held.go.set()
            return over, [await task for task in (first, *staying)]

    try:
        over, answers = asyncio.run(crowd())
    finally:
        held.go.set()
    assert over.status_code == 503
    assert all(answer.status_code == 200 for answer in answers)
    assert held.batches == [1, 12]  # 12 inputs of 4 tokens fit 64; the 50 that left were passed by
    assert len({str(answer.json()["data"]) for answer in answers[1:]}) == 1


def test_a_failure_is_told_to_its_batch_alone(world, client):
    world[1].failure = RuntimeError("a secret of the server")
    with pytest.raises(openai.InternalServerError) as error:
        client.embeddings.create(model="tiny", input="a")
    assert "secret" not in str(error.value)
    assert client.embeddings.create(model="tiny", input="a").data


def test_stopping_tells_those_who_wait(tmp_path):
    loaded = load_encoder(str(tiny_bert(tmp_path / "tiny")))
    held = loaded.encoder.embed = Held(loaded.encoder)
    service = EncoderService(loaded)
    service.start()

    async def ask():
        held.go.clear()
        running = asyncio.create_task(service.embed([(2, 3)]))
        while not held.batches:
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(service.embed([(2, 3)]))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(service.stop))
        while not service._stopping:
            await asyncio.sleep(0.005)
        held.go.set()
        await stopping
        return await asyncio.gather(running, waiting, return_exceptions=True)

    done, refused = asyncio.run(ask())
    assert isinstance(done[0], torch.Tensor)
    assert "stopping" in str(refused)
