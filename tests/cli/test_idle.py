"""A server that nobody asks anything costs nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from test_serve import ask, serving

SECONDS = 5.0


def processor_seconds(process: int) -> float:
    """What all threads of a process have computed so far, in user and system mode (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_an_idle_server_computes_less_than_a_hundredth_of_the_time(tiny_model: Path) -> None:
    """A count of what was computed, not of what passed: a busy machine does not change it."""
    with serving("serve", tiny_model, "--port", "0", "--threads", "2") as (process, url):
        name = json.loads(ask(f"{url}/v1/models")[1])["data"][0]["id"]
        status, _ = ask(f"{url}/v1/completions", {"model": name, "prompt": "x", "max_tokens": 20, "ignore_eos": True})
        assert status == 200  # the engine and its threads have run, and now wait
        time.sleep(0.5)
        before, start = processor_seconds(process.pid), time.monotonic()
        time.sleep(SECONDS)
        used, passed = processor_seconds(process.pid) - before, time.monotonic() - start
    assert used < 0.01 * passed
