"""What the serving features buy: every case in turn, each a program of its own that prints a table.

    python bench/serving.py --publish [--force] [--only drafts,quest]      # wants a quiet machine; half an hour

A case that is named with `--only` replaces its part of bench/results/serving.md, the others stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime

from sides import HERE

from armillary.cluster.machine import describe

QUIET = 0.5  # load average above which timings mean nothing
WAIT = 300  # seconds that a case waits for the machine to be quiet after the one before
CASES = {  # title, program and arguments
    "prefix": ("Prefix cache", ["prefix.py"]),
    "drafts": ("Speculative decoding", ["drafts.py"]),
    "replicas": ("Replicas, and prefill apart from decode", ["replicas.py"]),
    "structured": ("Structured output: what a grammar costs", ["structured.py", "--repeats", "2"]),
    "quest": ("Quest: decoding at a long context", ["quest.py"]),
    "lora": ("Adapters of LoRA in one batch", ["lora.py"]),
}
TIMEOUT = 1800  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"cases, separated by commas: {', '.join(CASES)}")
    parser.add_argument("--publish", action="store_true", help="write bench/results/serving.{json,md}")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case is called {unknown[0]!r}: choose from {', '.join(CASES)}")
    stored = HERE / "results" / "serving.json"
    found: dict[str, dict[str, object]] = json.loads(stored.read_text()) if stored.exists() else {}
    failed: list[str] = []
    for name in names:
        if not options.force and not quiet():
            print(f"{name}: not measured, the load average is {os.getloadavg()[0]:.2f}", file=sys.stderr)
            return 2
        title, (program, *arguments) = CASES[name]
        before = os.getloadavg()[0]
        print(f"## {title}", flush=True)
        command = [sys.executable, str(HERE / program), *arguments, "--force"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False, cwd=HERE.parent)
        print(result.stdout, flush=True)
        if result.returncode:
            failed.append(name)
            continue
        load = [round(before, 2), round(os.getloadavg()[0], 2)]
        found[name] = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "load": load,
            "command": f"python bench/{' '.join(CASES[name][1])}",
            "text": result.stdout,
        }
        if options.publish:
            stored.write_text(json.dumps(found, indent=1) + "\n")
            (HERE / "results" / "serving.md").write_text(page(found))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def quiet() -> bool:
    """Waits for the work of the case before to leave the one-minute load average."""
    until = time.monotonic() + WAIT
    while os.getloadavg()[0] > QUIET:
        if time.monotonic() > until:
            return False
        time.sleep(5)
    return True


def page(found: dict[str, dict[str, object]]) -> str:
    lines = [
        "# What the serving features buy",
        "",
        f"{describe().cpu}, {len(os.sched_getaffinity(0))} threads, SmolLM2-135M. `python bench/serving.py`.",
        "",
    ]
    for name, (title, _) in CASES.items():
        if name in found:
            case = found[name]
            lines += [
                f"## {title}",
                "",
                f"`{case['command']}`, {case['date']}; load average before and after: {case['load']}.",
                "",
                str(case["text"]).strip(),
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
