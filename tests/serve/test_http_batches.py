"""The official openai client's files and batches."""

from __future__ import annotations

import errno
import json
import time

import httpx
import openai
import pytest
from http_world import GREETING, World

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.http.batch_line import LineError, parse_line, parse_lines
from armillary.serve.http.errors import APIError
from armillary.serve.http.file_store import FileStore
from armillary.serve.http.operations import Operations

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    operations = Operations(files=FileStore(200_000))
    world = World(tmp_path_factory.mktemp("world"), operations=operations, api_key="s3cret")
    world.drain = operations.drain
    world.http.headers["authorization"] = "Bearer s3cret"
    yield world
    world.close()


@pytest.fixture
def client(world):
    world.typist.delay = 0.0
    world.typist.reply = lambda request: GREETING
    with openai.OpenAI(base_url=world.url + "/v1", api_key="s3cret", max_retries=0, timeout=30) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)
    world.wait_idle()


def upload(client, *lines, url=CHAT):
    rows = [{"custom_id": str(index), "method": "POST", "url": url, "body": body} for index, body in enumerate(lines)]
    return client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")


def begun(client, file, endpoint=CHAT, **fields):
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def ended(client, batch, seconds=20):
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.01)
    return batch


def results(client, name):
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


def test_files_come_and_go(client):
    file = client.files.create(file=("ä.jsonl", b"{}\n"), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose, file.status) == ("file", 3, "ä.jsonl", "batch", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == b"{}\n"
    other = client.files.create(file=b"x", purpose="batch")
    assert [one.id for one in client.files.list(limit=1)] == [other.id, file.id]  # page by page
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_a_batchs_answers_are_those_of_the_endpoint_in_order(client, world):
    world.typist.reply = lambda request: world.tokenizer.decode(request.prompt)[-3:]
    bodies = [{"prompt": f"abc{number}", "max_tokens": 9} for number in range(80)]
    batch = ended(client, begun(client, upload(client, *bodies, url=COMPLETIONS), COMPLETIONS, metadata={"a": "b"}))
    assert (batch.status, batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        "completed",
        80,
        80,
        0,
    )
    assert (batch.metadata, batch.error_file_id, batch.object) == ({"a": "b"}, None, "batch")
    rows = results(client, batch.output_file_id)
    assert [row["custom_id"] for row in rows] == [str(number) for number in range(80)]
    for number, row in enumerate(rows):
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["choices"][0]["text"] == f"abc{number}"[-3:]
        assert row["response"]["request_id"] == row["response"]["body"]["id"]
    assert next(one.id for one in client.batches.list()) == batch.id


def test_lines_that_fail_are_in_the_error_file(client):
    batch = ended(client, begun(client, upload(client, HELLO, {**HELLO, "model": "other"}, {**HELLO, "temperature": 9})))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 2)
    assert [row["custom_id"] for row in results(client, batch.output_file_id)] == ["0"]
    errors = results(client, batch.error_file_id)
    assert [(row["custom_id"], row["response"]["status_code"]) for row in errors] == [("1", 404), ("2", 400)]
    assert errors[1]["response"]["body"]["error"]["param"] == "temperature"


def test_a_line_that_the_server_fails_at_fails_alone(client, world, monkeypatch):
    real = world.service.chat_tokens

    def defective(messages, **given):
        return real(messages, **given) if messages[0]["content"] == "Hi" else 1 // 0

    monkeypatch.setattr(world.service, "chat_tokens", defective)
    batch = ended(client, begun(client, upload(client, HELLO, {"messages": [{"role": "user", "content": "Ho"}]})))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    assert [row["response"]["status_code"] for row in results(client, batch.error_file_id)] == [500]


def test_results_that_cannot_be_written_fail_the_batch(client, world, monkeypatch):
    file = upload(client, HELLO)

    def full(*given):
        raise OSError("no space left")

    monkeypatch.setattr(FileStore, "put", full)
    batch = ended(client, begun(client, file))
    assert (batch.status, batch.errors.data[0].code) == ("failed", "server_error")


def test_responses_are_possible_and_remembered(client):
    batch = ended(client, begun(client, upload(client, {"input": "Hi"}, url=RESPONSES), RESPONSES))
    body = results(client, batch.output_file_id)[0]["response"]["body"]
    assert client.responses.retrieve(body["id"]).output_text == GREETING


def test_a_bad_line_fails_the_batch_before_any_is_answered(client, world):
    before = world.engine.stats.iterations
    good = {"custom_id": "a", "url": CHAT, "body": HELLO}
    bad = [good, good, {**good, "custom_id": "b", "url": COMPLETIONS}, {**good, "custom_id": "c", "body": {**HELLO, "stream": True}}, 3]
    file = client.files.create(file=b"\n".join(json.dumps(line).encode() for line in bad), purpose="batch")
    batch = ended(client, begun(client, file))
    assert batch.status == "failed"
    assert [(one.line, one.param) for one in batch.errors.data] == [(2, "custom_id"), (3, "url"), (4, "body.stream"), (5, None)]
    empty = ended(client, begun(client, client.files.create(file=b"\n\n", purpose="batch")))
    assert empty.errors.data[0].code == "empty_file"
    assert world.engine.stats.iterations == before


def test_a_cancelled_batch_keeps_what_it_has(client, world):
    long = "z" * 400
    world.typist.reply = lambda request: long if len(request.prompt) > 22 else GREETING
    world.typist.delay = 0.02
    quick, slow = HELLO, {"messages": [{"role": "user", "content": "slow"}]}
    batch = begun(client, upload(client, quick, *[slow] * 100))
    while client.batches.retrieve(batch.id).request_counts.completed < 1:
        time.sleep(0.01)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    kept, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert [row["custom_id"] for row in (*kept, *errors)] == [str(number) for number in range(101)]
    assert errors
    assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
    world.typist.delay = 0.0
    world.wait_idle()  # those under way have left the engine
    assert client.batches.cancel(batch.id).status == "cancelled"
    again = ended(client, begun(client, upload(client, *[quick] * 70)))  # no place was lost
    assert again.request_counts.completed == 70
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.batches.cancel(again.id)


def test_a_draining_server_does_not_wait_for_its_batches(client, world):
    with world.typist.hold():
        batch = begun(client, upload(client, HELLO))
        while not world.engine.snapshot()["running"]:
            time.sleep(0.01)
        assert world.drain.in_flight == 0
        background = client.responses.create(input="Hi", background=True)
        assert world.drain.in_flight == 1  # its client comes back for it
    assert ended(client, batch).status == "completed"
    client.responses.delete(background.id)


def test_what_is_refused_for_now_is_asked_again(client, world, monkeypatch):
    from armillary.serve.operations.refusal import Refused

    gate, refusals = world.service.gate, []

    def sometimes(group):
        if len(refusals) < 2:
            refusals.append(group)
            raise Refused("full", "come back", code="over_capacity", retry_after=0.01)
        gate(group)

    monkeypatch.setattr(world.service, "gate", sometimes)
    assert ended(client, begun(client, upload(client, HELLO, HELLO))).request_counts.completed == 2
    assert len(refusals) == 2


def test_bad_requests_are_refused_by_name(client, world):
    file = upload(client, HELLO)
    for fields, param in (
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"extra_body": {"output_expires_after": {}}}, "output_expires_after"),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.batches.create(**{"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields})
        assert error.value.param == param
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=b"x", purpose="fine-tune")
    assert error.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    assert world.http.post("/v1/files", json={}).status_code == 415
    assert world.http.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"}).status_code == 400
    broken = world.http.post("/v1/files", content=b"nonsense", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400
    assert httpx.post(world.url + "/v1/files", files={"file": b"x"}).status_code == 401


def test_the_store_is_bounded(client):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=b"x" * 300_000, purpose="batch")
    assert error.value.status_code == 413
    kept = client.files.create(file=b"x" * 150_000, purpose="batch")
    with pytest.raises(openai.APIStatusError, match="delete some") as error:
        client.files.create(file=b"x" * 60_000, purpose="batch")
    assert (error.value.status_code, error.value.code) == (413, "files_full")
    client.files.delete(kept.id)
    client.files.create(file=b"x" * 60_000, purpose="batch")


def test_results_that_find_no_room_fail_the_batch(client):
    file = upload(client, *[HELLO] * 30)
    filler = client.files.create(file=b"x" * (200_000 - file.bytes - 100), purpose="batch")
    batch = ended(client, begun(client, file))
    assert (batch.status, batch.errors.data[0].code) == ("failed", "files_full")
    client.files.delete(filler.id)


def test_a_folder_keeps_files_and_batches_over_a_restart(tmp_path):
    store = FileStore(1000, tmp_path / "files")
    file = store.put("a.jsonl", "batch", [b"con", b"tent"])
    gone = store.put("b.jsonl", "batch", [b"other"])
    store.delete(gone["id"])
    for name, status in (("batch_1", "in_progress"), ("batch_2", "completed")):
        store.keep({"id": name, "object": "batch", "status": status, "created_at": 5})
    world = World(tmp_path, operations=Operations(files=FileStore(1000, tmp_path / "files")))
    try:
        assert [row["id"] for row in world.http.get("/v1/files").json()["data"]] == [file["id"]]
        assert world.http.get(f"/v1/files/{file['id']}/content").content == b"content"
        left = world.http.get("/v1/batches/batch_1").json()
        assert (left["status"], left["errors"]["data"][0]["code"]) == ("failed", "server_stopped")
        assert world.http.get("/v1/batches/batch_2").json()["status"] == "completed"
    finally:
        world.close()
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_a_full_disk_is_said_and_stops_nothing(world, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileStore, "put", full)
    answer = world.http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "batch"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert world.http.get("/v1/files").status_code == 200


def test_a_folder_of_files_has_one_server(tmp_path):
    store, other = FileStore(1000, tmp_path), FileStore(1000, tmp_path)
    store.claim()
    with pytest.raises(InputError, match="is another server's"):
        other.claim()
    del store
    other.claim()


def test_a_store_that_cannot_be_read_is_named(tmp_path):
    for foreign in ("{", "{}", "[]"):
        (tmp_path / "x.json").write_text(foreign)
        with pytest.raises(InputError, match="--files"):
            FileStore(100, tmp_path)
    store = FileStore(10)
    with pytest.raises(APIError, match="larger --files-limit"):
        store.put("a", "batch", [b"x"] * 11)
    with pytest.raises(NotFoundError):
        store.content("file-none")


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ' + b"[" * 300 + b"]" * 300 + b"}}", None),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}', None),
        (b'{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}', None),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"top_p": NaN}}', None),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {}, "x": 1}', "x"),
        (b'{"custom_id": "", "url": "/v1/completions", "body": {}}', "custom_id"),
        (b'{"custom_id": 1, "url": "/v1/completions", "body": {}}', "custom_id"),
        (b'{"custom_id": "a", "url": "/metrics", "body": {}}', "url"),
        (b'{"custom_id": "a", "url": ["x"], "body": {}}', "url"),
        (b'{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}', "method"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": []}', "body"),
        (b'{"custom_id": "a", "url": "/v1/responses", "body": {"background": true}}', "body.background"),
    ],
)
def test_lines_that_are_no_request(line, param):
    with pytest.raises(LineError) as error:
        parse_line(line)
    assert error.value.param == param
    assert len(str(error.value)) < 300


def test_only_the_first_hundred_problems_are_listed():
    _, problems = parse_lines(b"{\n" * 1000)
    assert len(problems) == 100
