"""`armillary bfcl`: a small folder in the benchmark's format, answered in this process, by a server, and from a file of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from armillary.cli.main import FAILED, MISUSED, run

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

FUNCTION = {
    "name": "geo.find",
    "description": "Find a place.",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string", "enum": ["Ulm"]}, "radius": {"type": "float", "enum": [1.5]}},
        "required": ["city", "radius"],
    },
}
ANSWER = {"geo.find": {"city": ["Ulm"], "radius": [1.5]}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with four cases of three categories, of which one is not scored."""
    folder = tmp_path / "data"
    (folder / "possible_answer").mkdir(parents=True)

    def write(category: str, count: int, answers: list[object] | None) -> None:
        name = f"BFCL_v4_{category}.json"
        turn = [{"role": "user", "content": "Where is Ulm?"}]
        rows = [{"id": f"{category}_{index}", "question": [turn], "function": [FUNCTION]} for index in range(count)]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
        if answers is not None:
            truth = [{"id": row["id"], "ground_truth": answers} for row in rows]
            (folder / "possible_answer" / name).write_text("\n".join(map(json.dumps, truth)))

    write("simple_python", 2, [ANSWER])
    write("irrelevance", 2, None)
    write("simple_java", 1, [ANSWER])
    return folder


def test_a_model_that_is_held_to_calls_makes_the_only_one_there_is(
    tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: held calls are NOT tested")
    asked = ["bfcl", data, tiny_model, "--tool-choice", "required", "--limit", "1", "--threads", "1", "--json"]
    assert run([*map(str, asked)]) == FAILED
    told = json.loads(capsys.readouterr().out)
    rows = {row["category"]: (row["cases"], row["right"], row["unanswered"]) for row in told["categories"]}
    assert rows == {"simple_python": (1, 1, 0), "irrelevance": (1, 0, 0)}
    assert told["not_scored"] == {"simple_java": "its values are written in Java"}


def test_a_servers_answers_are_scored_and_scored_again_from_their_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from http_world import World

    call = '<tool_call>\n{"name": "geo_find", "arguments": {"city": "ulm", "radius": 1.5}}\n</tool_call>'
    world = World(tmp_path, config={"kv_blocks": 1024, "context": 4096}, max_context=4096)
    order: list[str] = []

    def reply(request: Any) -> str:
        """A call to every second request."""
        if request.id not in order:
            order.append(request.id)
        return call if order.index(request.id) % 2 else "I do not know."

    world.typist.reply = reply
    try:
        asked = ["bfcl", data, "--category", "simple_python,irrelevance", "--server", world.url, "-o", tmp_path / "out.jsonl"]
        assert run([*map(str, asked)]) == 0
    finally:
        world.close()
    table = capsys.readouterr().out
    assert table.startswith("typist: BFCL")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    called = [row["id"] for row in rows if row["result"] != "I do not know."]
    right = [row["id"] for row in rows if row["wrong"] is None]
    assert len(called) == 2
    assert right == [row["id"] for row in rows if (row["id"] in called) == row["id"].startswith("simple")]
    again = ["bfcl", data, "--category", "simple_python,irrelevance", "--results", tmp_path / "out.jsonl"]
    assert run([*map(str, again)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == table.splitlines()[1:]


def test_a_category_that_was_asked_for_and_is_not_scored_is_an_error_before_anything_is_loaded(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, why in (
        ([data, "--category", "simple_java"], "written in Java"),
        ([data / "BFCL_v4_simple_java.json"], "written in Java"),
        ([data, "--category", "multi_turn_base"], "no category"),
        ([data, "--tool-choice", "maybe"], "auto or required"),
        ([data, "--limit", "0"], "at least 1"),
        ([data, "--category", "irrelevance", "--server", "http://127.0.0.1:9"], "does not answer"),
    ):
        assert run(["bfcl", *map(str, arguments)]) == MISUSED
        assert why in capsys.readouterr().err
