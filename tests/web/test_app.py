"""What the page is made of, and the live state that it asks for."""

from __future__ import annotations

import re

import pytest
from http_world import World

from armillary.web.app import create_app


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("page"), app=create_app)
    yield world
    world.close()


def test_everything_the_page_refers_to_is_served_from_here(world):
    seen, todo = set(), ["/"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        response = world.http.get(path)
        assert response.status_code == 200, path
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "script-src 'self'" in response.headers["content-security-policy"]
        text = response.text
        todo += re.findall(r'(?:src|href)="(/[^"#]*)"', text)
        todo += ["/static/" + name for name in re.findall(r'(?:from|import\() ?"\./([^"]+)"', text)]
        # Offline: nothing is fetched from elsewhere (a namespace is not fetched).
        assert not re.findall(r"(?:src|href|from|import|url)\W{1,3}https?://", text)
    kinds = {name.rpartition(".")[2] for name in seen if "." in name}
    assert kinds == {"css", "js", "svg"}


def test_no_script_writes_html(world):
    """What a model says can only become text nodes when no script has a way to parse HTML."""
    scripts = set(
        re.findall(
            r'"\./([\w.]+)"|/static/([\w.]+\.js)', " ".join(world.http.get(f"/static/{name}").text for name in ("main.js", "live.js"))
        )
    )
    names = {name for pair in scripts for name in pair if name} | {"main.js", "markdown.js", "chat.js", "theme.js"}
    for name in names:
        text = world.http.get(f"/static/{name}").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser", text), name


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "..%2fapp.py", "%2e%2e/app.py", "app.py"])
def test_no_other_file_can_be_read(world, name):
    response = world.http.get(f"/static/{name}")
    assert response.status_code == 404
    assert set(response.json()) == {"error"}


def test_live_gives_only_what_is_new(world):
    world.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10})
    state = world.http.get("/live").json()
    assert state["model"] == {"name": "typist", "description": "a typist", "context": 512}
    indices = [iteration["index"] for iteration in state["iterations"]]
    assert indices == list(range(state["iteration"] - len(indices), state["iteration"]))
    newer = world.http.get("/live", params={"since": indices[-3]}).json()["iterations"]
    assert [iteration["index"] for iteration in newer] == indices[-2:]
    assert world.http.get("/live", params={"since": state["iteration"]}).json()["iterations"] == []


@pytest.mark.parametrize("since", ["x", "-2", str(2**60), ""])
def test_live_refuses_what_is_no_iteration(world, since):
    response = world.http.get("/live", params={"since": since})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "since"


def test_a_request_can_be_explained(world):
    answer = world.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).json()
    (told,) = world.http.get(f"/requests/{answer['id']}").json()["requests"]
    assert "21 tokens" in told["events"][0]
    assert any("ended: length" in event for event in told["events"])
    assert world.http.get("/requests/nobody").status_code == 404


def test_with_a_key_the_page_loads_and_the_engine_stays_hidden(tmp_path):
    world = World(tmp_path, app=create_app, api_key="k")
    assert world.http.get("/").status_code == 200
    assert world.http.get("/static/main.js").status_code == 200
    assert world.http.get("/live").status_code == 401
    assert world.http.get("/requests/x").status_code == 401
    assert world.http.get("/live", headers={"authorization": "Bearer k"}).status_code == 200
    world.close()
