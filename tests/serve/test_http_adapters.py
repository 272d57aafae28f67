"""Adapters over HTTP: each a model by its name, loaded and dropped while the server runs, from one directory only."""

import os

import pytest
from adapters import adapter, merged, write
from http_world import World
from models import greedy, loaded, tiny

from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.http.operations import Operations
from armillary.serve.llm import build_engine
from armillary.serve.service import Service

BASE = tiny("llama", seed=11)
MADE = {"one": adapter(BASE.config, 1, rank=3), "two": adapter(BASE.config, 2, rank=18)}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = [5, 70, 33, 12, 8]
ASK = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
MODEL = loaded(BASE, TEMPLATE)
SETTINGS = {"kv_blocks": 64, "weight_cache": "off", "max_loras": 3}


def text_of(name):
    decoder = merged(BASE, MADE[name]) if name else BASE
    tokens, gap = greedy(decoder, PROMPT, 8)
    assert gap > 1e-3
    return MODEL.tokenizer.decode(tokens)


@pytest.fixture
def folders(tmp_path):
    return {name: str(write(tmp_path / "allowed" / name, BASE.config, low)) for name, low in MADE.items()}


@pytest.fixture
def world(tmp_path, folders):
    world = World(
        tmp_path,
        loaded=MODEL,
        config={**SETTINGS, "lora": {"one": folders["one"]}},
        operations=Operations(adapter_directory=tmp_path / "allowed"),
    )
    yield world
    world.close()


def test_an_adapter_is_a_model_of_every_endpoint(world):
    cards = world.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("one", "tiny")]
    assert world.http.get("/v1/models/one").json()["id"] == "one"
    for name in ("one", None):
        answer = world.http.post("/v1/completions", json={**ASK, **({"model": name} if name else {})}).json()
        assert answer["choices"][0]["text"] == text_of(name)
        assert answer["model"] == (name or "tiny")
    assert text_of("one") != text_of(None)
    chat = {"model": "one", "messages": [{"role": "user", "content": "AB"}], "max_tokens": 4, "temperature": 0}
    assert world.http.post("/v1/chat/completions", json=chat).json()["model"] == "one"
    assert world.http.post("/v1/messages", json=chat).json()["model"] == "one"
    response = {"model": "one", "input": "AB", "max_output_tokens": 4, "temperature": 0}
    assert world.http.post("/v1/responses", json=response).json()["model"] == "one"
    assert world.http.post("/tokenize", json={"model": "one", "prompt": "AB"}).status_code == 200
    stream = world.http.post("/v1/completions", json={**ASK, "model": "one", "stream": True, "n": 2, "temperature": 1, "seed": 1}).text
    assert '"model":"one"' in stream.replace(" ", "")
    adapters = world.wait_idle()["features"]["adapters"]
    assert [(row["name"], row["running"]) for row in adapters["adapters"]] == [("one", 0)]
    assert adapters["adapters"][0]["requests"] == 5
    metrics = world.http.get("/metrics").text
    assert 'armillary_adapters_loaded{model_name="tiny"} 1.0' in metrics
    assert 'armillary_adapter_requests_unfinished{adapter="one",model_name="tiny"} 0.0' in metrics


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_an_unknown_model_is_404_with_the_closest(world, path):
    body = {**(ASK if path == "/v1/completions" else {"prompt": "A"}), "model": "onf"}
    answer = world.http.post(path, json=body)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "did you mean 'one'" in error["message"]
    assert "ask for 'tiny', 'one'" in world.http.get("/v1/models/elephant").json()["error"]["message"]


def test_adapters_come_and_go(world):
    def load(**body):
        return world.http.post("/v1/load_lora_adapter", json=body)

    assert load(lora_name="two", lora_path="two").text == "Success: LoRA adapter 'two' added successfully."
    assert world.http.post("/v1/completions", json={**ASK, "model": "two"}).json()["choices"][0]["text"] == text_of("two")
    taken = load(lora_name="one", lora_path="two")
    assert taken.status_code == 400
    assert "load_inplace" in taken.json()["error"]["message"]
    assert load(lora_name="one", lora_path="two", load_inplace=True).status_code == 200
    assert world.http.post("/v1/completions", json={**ASK, "model": "one"}).json()["choices"][0]["text"] == text_of("two")
    gone = world.http.post("/v1/unload_lora_adapter", json={"lora_name": "one", "lora_int_id": 1})
    assert gone.text == "Success: LoRA adapter 'one' removed successfully."
    assert gone.headers["x-armillary-ignored"] == "lora_int_id"
    assert world.http.post("/v1/completions", json={**ASK, "model": "one"}).status_code == 404
    again = world.http.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "lora_name")
    assert [card["id"] for card in world.http.get("/v1/models").json()["data"]] == ["tiny", "two"]


def test_only_what_lies_below_the_directory_is_loaded(world, tmp_path):
    outside = write(tmp_path / "outside", BASE.config, MADE["two"])
    os.symlink(outside, tmp_path / "allowed" / "link")
    for path in (str(outside), "../outside", "link", ".", "", "/etc", "two/../../outside", "a\0b", "x" * 5000):
        answer = world.http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path})
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"] == "lora_path", path
    inside = str(tmp_path / "allowed" / "two")
    assert world.http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": inside}).status_code == 200


def test_what_is_wrong_with_an_adapter_is_told(world, tmp_path):
    def load(name, path):
        answer = world.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        return answer.status_code, answer.json()["error"]["message"]

    write(tmp_path / "allowed" / "dora", BASE.config, MADE["one"], use_dora=True)
    write(tmp_path / "allowed" / "other", tiny(num_layers=3).config, adapter(tiny(num_layers=3).config, 0))
    assert load("a", "nothing")[0] == 404
    for name in ("a b", "../x", "a/../b", ".x", "/x", "x/", "-x", "a//b", "é"):
        status, message = load(name, "two")
        assert (status, message.partition(":")[0]) == (400, f"{name!r} is no name for an adapter"), name
    assert load("tiny", "two")[0] == 400
    base = world.http.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"})
    assert (base.status_code, base.json()["error"]["param"]) == (400, "lora_name")
    assert "cannot be unloaded" in base.json()["error"]["message"]
    status, words = load("a", "dora")
    assert status == 400
    assert "use_dora" in words
    assert load("a", "other")[0] == 400
    assert [card["id"] for card in world.http.get("/v1/models").json()["data"]] == ["tiny", "one"]


def test_loading_is_off_unless_it_was_allowed(tmp_path, folders):
    world = World(tmp_path, loaded=MODEL, config={**SETTINGS, "lora": {"one": folders["one"]}})
    try:
        for path, body in (("load", {"lora_name": "two", "lora_path": folders["two"]}), ("unload", {"lora_name": "one"})):
            answer = world.http.post(f"/v1/{path}_lora_adapter", json=body)
            assert answer.status_code == 403
            assert "--allow-lora-loading" in answer.json()["error"]["message"]
    finally:
        world.close()


def test_an_adapter_may_not_have_the_models_name(folders):
    engine = build_engine(MODEL, EngineConfig(**SETTINGS, lora={"tiny": folders["one"]}), keep_weights=True)
    with pytest.raises(InputError, match="model's own name"):
        Service(engine, MODEL)
