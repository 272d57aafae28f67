"""What is made with one key is for every other key not there: files, batches and their results, stored responses."""

import json
import select
import socket
import time

import openai
import pytest
from http_world import GREETING, World

from armillary.serve.http.errors import APIError
from armillary.serve.http.file_store import FileStore
from armillary.serve.http.operations import Operations
from armillary.serve.operations.keys import KeyRing

KEYS = ("of-alice", "of-bob")
RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def world(tmp_path_factory, folder):
    world = World(tmp_path_factory.mktemp("world"), operations=Operations(files=FileStore(300_000, folder)), api_key=KeyRing.of(KEYS))
    yield world
    world.close()


@pytest.fixture(scope="module")
def clients(world):
    made = [openai.OpenAI(base_url=world.url + "/v1", api_key=key, max_retries=0, timeout=30) for key in KEYS]
    yield made
    for one in made:
        one.close()


def absent(call, *given, **fields):
    """It is refused in the words for what never was."""
    with pytest.raises(openai.NotFoundError) as error:
        call(*given, **fields)
    assert "there is no" in error.value.message
    return error.value


def batch_of(client, *lines):
    rows = [{"custom_id": str(index), "method": "POST", "url": RESPONSES, "body": body} for index, body in enumerate(lines)]
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")
    deadline = time.monotonic() + 20
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.01)
    assert batch.status == "completed"
    return batch


def test_files_and_batches_belong_to_a_key(world, clients, folder):
    alice, bob = clients
    batch = batch_of(alice, {"input": "Hi"}, {"input": 3})
    own = batch_of(bob, {"input": "Hi"})
    for name in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
            absent(call, name)
        assert alice.files.retrieve(name).id == name
    for call in (bob.batches.retrieve, bob.batches.cancel):
        absent(call, batch.id)
    absent(bob.files.list, after=batch.input_file_id)
    absent(bob.batches.list, after=batch.id)
    asked = {"endpoint": RESPONSES, "completion_window": "24h"}
    assert absent(bob.batches.create, input_file_id=batch.input_file_id, **asked).param == "input_file_id"
    assert [one.id for one in bob.batches.list()] == [own.id]
    assert {one.id for one in bob.files.list()} == {own.input_file_id, own.output_file_id}
    assert {one.id for one in alice.files.list()} == {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    again = FileStore(300_000, folder)  # after a restart
    assert [one["id"] for one in again.records("key-2")] == [own.id]
    assert again.get(batch.input_file_id, "key-1")["id"] == batch.input_file_id
    assert not again.files()
    assert again.used == sum(one.bytes for client in clients for one in client.files.list())


def test_responses_belong_to_a_key(clients):
    alice, bob = clients
    answer = alice.responses.create(input="Hi")
    batched = batch_of(alice, {"input": "Hi"})
    (row,) = map(json.loads, alice.files.content(batched.output_file_id).text.splitlines())
    for name in (answer.id, row["response"]["body"]["id"]):
        for call in (bob.responses.retrieve, bob.responses.cancel, bob.responses.delete, bob.responses.input_items.list):
            absent(call, name)
        assert absent(bob.responses.create, input="And?", previous_response_id=name).code == "previous_response_not_found"
        assert alice.responses.retrieve(name).output_text == GREETING
        assert alice.responses.create(input="And?", previous_response_id=name).status == "completed"


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: 400000"])
def test_an_upload_that_has_no_room_is_refused_while_it_comes(world, length):
    """At once where its length is announced, and without one when too much has come: this body never ends."""
    with socket.create_connection(("127.0.0.1", world.server.port), timeout=20) as client:
        client.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer of-bob\r\n{length}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
        )
        piece = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while "chunked" in length and not select.select([client], [], [], 0)[0]:
            try:
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            except (BrokenPipeError, ConnectionResetError):
                break
            piece = b"x" * 60_000
        assert b" 413 " in client.recv(4096).split(b"\r\n")[0]


def test_files_on_their_way_share_the_room_and_hold_up_nobody(tmp_path):
    for store in (FileStore(10), FileStore(10, tmp_path)):
        with store.room("one") as one:
            one.grow(6)
            with pytest.raises(APIError, match="7 are kept for files on their way"), store.room("another") as other:
                other.grow(5)
            store.put("a", "batch", [b"1234"])

        def pieces(store=store):
            for piece in (b"12", b"34"):
                assert [file["filename"] for file in store.files()] == ["a"]  # the books are open while it is written
                yield piece

        kept = store.put("b", "batch", pieces())
        with pytest.raises(APIError, match="delete some"):
            store.put("c", "batch", [b"12", b"34"])
        assert store.content(kept["id"]) == b"1234"
        for file in store.files():
            store.delete(file["id"])
        store.delete(store.put("whole", "batch", [b"1" * 10])["id"])
        assert store.used == 0
    assert not list(tmp_path.iterdir())
