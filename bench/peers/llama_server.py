"""llama.cpp's own server with 8 slots: many requests at once, in its fastest weight formats, asked over HTTP on this machine.

All requests are sent at the start; a slot takes the next one when it is free (continuous batching). Only offline cases:
the others are measured without HTTP in llama.py. The binary is `llama-server` beside this python, made by setup.sh.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from peers.llama import requantised
from peers.workload import Case, Workload, measure, report

SLOTS = 8
FORMATS = ("Q4_0", "Q8_0", "F16")
START_SECONDS, ANSWER_SECONDS = 120, 3600


@contextmanager
def serving(model: Path, case: Case, threads: int) -> Iterator[int]:
    """The port of a server for `case`; it ends with the block. Raises RuntimeError with the server's last words when it does not start."""
    longest = max(len(prompt) + new for prompt, new in zip(case.prompts, case.new, strict=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        os.environ.get("ARMILLARY_LLAMA_SERVER", str(Path(sys.executable).parent / "llama-server")),
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-webui"),
        *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * (-(-longest // 256) * 256)), "--flash-attn", "auto"),
        *("--threads", str(threads), "--threads-batch", str(threads), "--threads-http", str(case.batch + 8)),
        *("--cache-ram", "0"),  # keep no copies of finished prompts: nothing here comes twice
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as chatter:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=chatter, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_SECONDS
            while not _healthy(port):
                if server.poll() is not None or time.monotonic() > until:
                    chatter.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not answer: {chatter.read()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _healthy(port: int) -> bool:
    try:
        return _ask(port, "GET", "/health", None, 5)[0] == 200
    except OSError:
        return False


def _ask(port: int, method: str, path: str, body: object, seconds: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def complete(port: int, prompt: Sequence[int], new: int) -> list[int]:
    """Exactly `new` greedy tokens after `prompt`. Raises RuntimeError when the server did something else."""
    body = {
        "prompt": list(prompt),
        "n_predict": new,
        "ignore_eos": True,
        "temperature": 0.0,
        "samplers": ["top_k"],  # no pass over the vocabulary that greedy sampling does not need
        "top_k": 1,
        "cache_prompt": False,  # repeats would be free
        "return_tokens": True,
        "stream": False,
    }
    status, raw = _ask(port, "POST", "/completion", body, ANSWER_SECONDS)
    if status != 200:
        raise RuntimeError(f"llama-server answered {status}: {raw[:500].decode(errors='replace')}")
    answer = json.loads(raw)
    if (answer["tokens_evaluated"], answer["tokens_predicted"]) != (len(prompt), new):
        raise RuntimeError(
            f"asked for {len(prompt)} + {new} tokens, llama-server computed {answer['tokens_evaluated']} + {answer['tokens_predicted']}"
        )
    return list(answer["tokens"])


def main(path: str) -> None:
    import llama_cpp

    workload = Workload.load(path)
    for case in workload.cases:
        if case.kind != "offline":
            continue
        for name in FORMATS:
            with serving(requantised(workload, name), case, workload.threads) as port, ThreadPoolExecutor(case.batch) as clients:

                def generate(prompts: object, new: object, port: int = port, clients: ThreadPoolExecutor = clients) -> list[list[int]]:
                    return list(clients.map(lambda request: complete(port, *request), zip(prompts, new, strict=True)))

                report("llama_server", llama_cpp.__version__, case, *measure(generate, workload, case), variant=name)


if __name__ == "__main__":
    main(sys.argv[1])
