"""`armillary bfcl`: how well a model calls functions, by the categories of the Berkeley Function Calling Leaderboard."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, Json, settle

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.serve.tools.bfcl import Calls, Case

IN_FLIGHT = 64
NOTE_SECONDS = 10.0
KEY_VARIABLE = "OPENAI_API_KEY"
_PATH = "/v1/chat/completions"

Ask = Callable[[str, bytes], Awaitable[tuple[int, Any]]]
"""A case's id and a body to the status and the JSON of what answers it."""


def bfcl(
    questions: Annotated[Path, Parameter(help="A question file of the benchmark (JSON lines), or the folder with all of them.")],
    model: Annotated[
        str | None, Parameter(help="A name (smollm2), a .gguf file or a model folder; with --server what it calls it.")
    ] = None,
    /,
    *,
    answers: Annotated[
        Path | None, Parameter(help="The accepted answers, file or folder (default: possible_answer beside the questions).")
    ] = None,
    category: Annotated[
        str, Parameter(show_default=False, help="Only these of a folder, separated by commas: simple_python,multiple.")
    ] = "",
    limit: Annotated[int | None, Parameter(show_default=False, help="Only the first so many cases of each category.")] = None,
    server: Annotated[str | None, Parameter(help=f"Ask this server (http://127.0.0.1:8000), with the key in {KEY_VARIABLE}.")] = None,
    results: Annotated[Path | None, Parameter(help="Score this result file of the leaderboard; nothing is asked.")] = None,
    tool_choice: Annotated[str, Parameter(help="auto, or required: then answers are held to calls that are valid.")] = "auto",
    max_tokens: Annotated[int, Parameter(help="Most tokens of an answer.")] = 512,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="File for what was answered and what is wrong with it, one JSON line each.")
    ] = None,
    config: ConfigFile = None,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> int:
    """Accuracy of a model's calls by category (AST check); exit status 1 where a category of a folder is not scored here."""
    from armillary.cli.main import FAILED
    from armillary.cli.terminal import print_json, table
    from armillary.core.errors import InputError
    from armillary.serve.tools.bfcl import Score, score
    from armillary.serve.tools.bfcl_files import category as category_of
    from armillary.serve.tools.bfcl_files import not_scored, question_files, read_results

    if tool_choice not in ("auto", "required"):
        raise InputError(f"there is no tool choice {tool_choice!r}", "choose auto or required", field="tool_choice")
    for name, number in (("limit", limit), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            raise InputError(f"--{name.replace('_', '-')} is {number}", "give at least 1", field=name)
    if server is not None and results is not None:
        raise InputError("--server asks, and --results has what was answered", "give one of them", field="results")
    wanted = [one.strip() for one in category.split(",") if one.strip()]
    files = question_files(questions, wanted)
    left_out = {category_of(file): why for file in files if not wanted and questions.is_dir() and (why := not_scored(category_of(file)))}
    read = {category_of(file): _cases(file, answers, limit) for file in files if category_of(file) not in left_out}
    cases = [case for of_category in read.values() for case in of_category]
    if results is not None:
        given = read_results(results)
        outputs: dict[str, Calls | None] = {case.id: given.get(case.id) for case in cases}
        texts: dict[str, str] = {}
        refused, named = {case.id: "there is no result" for case in cases if case.id not in given}, str(results)
    else:
        with _server(server, model) if server is not None else _engine(settle(model, engine, None, config)) as (ask, named):
            outputs, texts, refused = asyncio.run(_answers(ask, cases, named if server is not None else None, tool_choice, max_tokens))
    wrong: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for name, of_category in read.items():
        lost = {case.id: refused[case.id] for case in of_category if case.id in refused}  # of irrelevance too: it is no answer
        scored = Score(len(of_category), {**score(of_category, outputs).errors, **lost})
        wrong |= scored.errors
        rows.append(
            {
                "category": name,
                "cases": scored.total,
                "right": scored.total - len(scored.errors),
                "accuracy": scored.accuracy,
                "unanswered": len(lost),
            }
        )
    if output is not None:
        _write(output, cases, outputs, texts, wrong)
    if json:
        told = {"model": named, "tool_choice": tool_choice if results is None else None, "categories": rows}
        print_json({**told, "not_scored": left_out, "unanswered": next(iter(refused.values()), None)})
    else:
        shown = [(row["category"], row["cases"], row["right"], f"{100 * row['accuracy']:.1f} %", row["unanswered"]) for row in rows]
        table(("category", "cases", "right", "accuracy", "unanswered"), shown, title=f"{named}: BFCL, AST check")
        for name, why in left_out.items():
            print(f"not scored: {name}: {why}")
        if refused:
            print(f"unanswered, such as {next(iter(refused))}: {next(iter(refused.values()))}")
    return FAILED if left_out else 0


def _cases(file: Path, answers: Path | None, limit: int | None) -> list[Case]:
    from armillary.serve.tools.bfcl_files import answer_file, read_cases

    return read_cases(file, answer_file(file, answers))[:limit]


async def _answers(
    ask: Ask, cases: list[Case], model: str | None, tool_choice: str, max_tokens: int
) -> tuple[dict[str, Calls | None], dict[str, str], dict[str, str]]:
    """By case: the calls that were made, the text, and why there is no answer where there is none."""
    from pydantic_core import to_json

    from armillary.cli.terminal import note

    outputs: dict[str, Calls | None] = {}
    texts: dict[str, str] = {}
    refused: dict[str, str] = {}
    gate, noted = asyncio.Semaphore(IN_FLIGHT), time.monotonic()

    async def one(case: Case) -> None:
        nonlocal noted
        body = {
            **({"model": model} if model is not None else {}),
            "messages": case.messages,
            "tools": case.tools(),
            "tool_choice": tool_choice,
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        async with gate:
            status, answer = await ask(case.id, to_json(body))
        if status == 200:
            outputs[case.id], texts[case.id] = _made(answer["choices"][0]["message"])
        else:
            refused[case.id] = f"{status}: {answer['error']['message'] if 'error' in answer else answer}"
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            note(f"{len(outputs) + len(refused)} of {len(cases)} cases answered")

    await asyncio.gather(*map(one, cases))
    return outputs, texts, refused


def _made(message: Mapping[str, Any]) -> tuple[Calls | None, str]:
    """The calls of an answer (None for arguments that are no object: they were cut off) and its text."""
    from json import loads

    calls = []
    for call in message.get("tool_calls") or ():
        try:
            arguments = loads(call["function"]["arguments"] or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            return None, str(call["function"]["arguments"])
        calls.append((str(call["function"]["name"]), arguments))
    return calls, message.get("content") or ""


@contextmanager
def _engine(settled: Resolved[Any]) -> Iterator[tuple[Ask, str]]:
    """The endpoints of the model, in this process, while its engine runs."""
    from armillary.cli.launch import launch
    from armillary.serve.http.app import endpoints_alone
    from armillary.serve.http.batch_line import Line, answer_line

    running = launch(settled)
    app = endpoints_alone(running.service)

    async def ask(name: str, body: bytes) -> tuple[int, Any]:
        response = (await answer_line(app, Line(name, _PATH, body)))["response"]
        return response["status_code"], response["body"]

    running.engine.start()
    try:
        yield ask, running.service.model_name
    finally:
        running.engine.stop()


@contextmanager
def _server(address: str, model: str | None) -> Iterator[tuple[Ask, str]]:
    """A server's endpoint. Raises InputError where none is."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from pydantic_core import from_json

    from armillary.core.errors import InputError

    key = os.environ.get(KEY_VARIABLE)
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    base = address.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise InputError(f"{address!r} is no server's address", "give one like http://127.0.0.1:8000", field="server")

    def fetch(path: str, body: bytes | None) -> tuple[int, Any]:
        while True:
            try:
                with urlopen(Request(base + path, body, headers)) as response:
                    return response.status, from_json(response.read())
            except HTTPError as error:
                if error.code not in (429, 503):
                    return error.code, _json(error.read())
                time.sleep(1.0)
            except (URLError, OSError) as error:
                raise InputError(f"{base} does not answer ({error})", "start a server: armillary serve", field="server") from None

    async def ask(name: str, body: bytes) -> tuple[int, Any]:
        return await asyncio.to_thread(fetch, _PATH, body)

    if model is None:
        status, listed = fetch("/v1/models", None)
        if status != 200:
            raise InputError(f"{base} answers {status} to /v1/models", f"name the model, or set {KEY_VARIABLE}", field="server")
        model = listed["data"][0]["id"]
    yield ask, model


def _json(raw: bytes) -> Any:
    from pydantic_core import from_json

    try:
        return from_json(raw)
    except ValueError:
        return raw[:200].decode("utf-8", "replace")


def _write(path: Path, cases: list[Case], outputs: Mapping[str, Calls | None], texts: Mapping[str, str], wrong: Mapping[str, str]) -> None:
    """The leaderboard's result format, which `--results` reads, with what is wrong beside it."""
    from json import dumps

    from armillary.serve.tools.bfcl_files import result_row

    rows = [{**result_row(case.id, outputs.get(case.id), texts.get(case.id, "")), "wrong": wrong.get(case.id)} for case in cases]
    path.write_text("".join(dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
