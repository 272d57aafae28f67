"""`armillary batch`: a file of requests answered without a server, by the endpoints that a server has."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, Json, settle

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from armillary.core.config import Resolved
    from armillary.serve.http.batch_line import Line

MAX_INPUT_BYTES = 1 << 30
IN_FLIGHT = 256  # lines; the engine queues what it cannot run at once
NOTE_SECONDS = 10.0


def batch(
    input: Annotated[Path, Parameter(help="JSON lines: custom_id, method, url and body, as OpenAI's batches have them.")],
    model: Annotated[str | None, Parameter(help="A name (smollm2, minilm), a .gguf file or a model folder.")] = None,
    /,
    *,
    output: Annotated[
        Path, Parameter(name=["--output", "-o"], help="File for the results, one JSON line each, in the order of the input.")
    ],
    overwrite: Annotated[bool, Parameter(negative=(), show_default=False, help="Replace the output file if there is one.")] = False,
    config: ConfigFile = None,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 (frozen)
    json: Json = False,
) -> int:
    """Answer a file of requests; exit status 1 when some of them failed. Nothing is loaded for a file with a bad line."""
    from armillary.cli.main import FAILED
    from armillary.cli.terminal import print_json
    from armillary.core.errors import InputError

    settled = settle(model, engine, None, config)
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists", "choose another --output, or say --overwrite", field="output")
    lines = _read(input)
    part = output.with_name(output.name + ".part")
    try:
        with part.open("wb") as file:
            begin = time.perf_counter()
            with _endpoints(settled) as app:
                done, failed = asyncio.run(_answer(app, lines, file))
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    if json:
        print_json({"output": str(output), "lines": done, "failed": failed, "seconds": round(seconds, 3)})
    else:
        print(f"{output}: {done} answers, {failed} of them errors, in {seconds:.1f} s with loading")
    return FAILED if failed else 0


def _read(path: Path) -> list[Line]:
    from armillary.core.errors import FormatError
    from armillary.serve.http.batch_line import parse_lines

    if (size := path.stat().st_size) > MAX_INPUT_BYTES:
        raise FormatError(f"{path} has {size:,} bytes; at most {MAX_INPUT_BYTES:,} are read", "split it")
    lines, problems = parse_lines(path.read_bytes())
    if problems:
        first = problems[0]
        where = f"line {first['line']}: " if first["line"] is not None else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise FormatError(
            f"{path}: {where}{first['message']}{more}", "each line is {custom_id, method: POST, url, body}", field=first["param"]
        )
    return lines


@contextmanager
def _endpoints(settled: Resolved[Any]) -> Iterator[ASGIApp]:
    """The endpoints of the model, in this process, while its engine runs."""
    from armillary.cli.launch import launch
    from armillary.cli.serve_encoder import launch_encoder, names_encoder
    from armillary.serve.http import app, encoder_app

    if names_encoder(settled):
        encoder = launch_encoder(settled)
        encoder.start()
        try:
            yield encoder_app.endpoints_alone(encoder)
        finally:
            encoder.stop()
        return
    running = launch(settled)
    running.engine.start()
    try:
        yield app.endpoints_alone(running.service)
    finally:
        running.engine.stop()


async def _answer(app: ASGIApp, lines: list[Line], file: Any) -> tuple[int, int]:
    """Write the results in the order of the lines; how many there are, and how many are errors."""
    from pydantic_core import to_json

    from armillary.cli.terminal import note
    from armillary.serve.http.batch_line import answer_line, succeeded

    window: deque[asyncio.Task[Any]] = deque()
    ahead, failed, noted = iter(lines), 0, time.monotonic()
    for index in range(len(lines)):
        for line in islice(ahead, IN_FLIGHT - len(window)):
            window.append(asyncio.create_task(answer_line(app, line)))
        result = await window.popleft()
        failed += not succeeded(result)
        file.write(to_json(result) + b"\n")
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            note(f"{index + 1} of {len(lines)} lines answered, {failed} errors")
    return len(lines), failed
