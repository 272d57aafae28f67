"""The sides of a bench: whose python each runs in, the weights that peers read, and one side in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.workload import results

from armillary.core.paths import cache_dir
from armillary.models.hf import save_hf
from armillary.models.load import LoadedModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def peer_python(home: str) -> str | None:
    """The python of the environment `home`; transformers may also stand in this one (it is among the tests' dependencies)."""
    named = os.environ.get(f"ARMILLARY_PEER_{home.upper()}")
    standing = Path(os.environ.get("ARMILLARY_PEERS", ROOT / ".venv-peers")) / home / "bin" / "python"
    if named or standing.exists():
        return named or str(standing)
    if home == "transformers" and subprocess.run([sys.executable, "-c", "import transformers"], capture_output=True).returncode == 0:
        return sys.executable
    return None


def hf_folder(loaded: LoadedModel) -> Path:
    """The model's weights in fp32 as a Hugging Face folder, written once a machine."""
    folder = cache_dir() / "bench" / f"{loaded.name}-fp32"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_hf(loaded.decoder, folder, loaded.tokenizer)
    return folder


def run_side(name: str, python: str, arguments: list[str], timeout: float) -> list[dict[str, Any]]:
    """A side's results; one that fails, or takes longer than `timeout` seconds, says why and gives what it had."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python == sys.executable:
        environment["PYTHONPATH"] = str(ROOT / "src")
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as chatter:
        try:
            done = subprocess.run(
                [python, "-m", *arguments],
                cwd=HERE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=chatter,
                text=True,
                timeout=timeout,
            )
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            output, status = (expired.stdout or b"").decode(errors="replace"), f"no end after {timeout:.0f} s"
        chatter.seek(0)
        if status:
            print(f"{name}: failed ({status}); the last of what it said:\n{chatter.read()[-2000:]}", file=sys.stderr)
    found = results(output)
    print(f"{name}: {len(found)} results in {time.monotonic() - start:.0f} s", flush=True)
    return found
