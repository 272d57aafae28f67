"""An hour's crowd in minutes: `armillary serve` as a process, clients that come, leave and send nonsense, replicas that stop and die.

    python bench/soak.py [--replicas 2] [--seconds 450] [--rate 12] [--publish]      # soak_clients.py says what each answer is held to
    python bench/soak.py --prefill-workers 1 --decode-workers 2 ...

At the end no request may run, no KV block be in use, nothing lie between prefill and decode workers and no answer be missing; the memory of
all processes after the first quarter is compared with that at the end. With replicas, or prefill and decode workers, one of each kind in turn
is stopped (SIGSTOP) or killed (SIGKILL) now and then, and no admitted request may be lost; then the memory compared is that of the
router, which keeps every stream, for who is started again fills its own anew. Every request of a question that was asked before must get the same answer, so the server is `--deterministic`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soak_clients import Report, run

from armillary.cluster.machine import describe
from armillary.core.units import format_bytes

HERE = Path(__file__).resolve().parent
QUIET = 0.5  # load average before the run, above which no time is told
GROWTH = 0.05  # of the memory after the first quarter, that the end may be above it
SPREAD = 1 / 3  # of the time between two faults, more or less
STOPPED_SECONDS = (0.5, 8.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=450.0, help="of arrivals (default 450)")
    parser.add_argument("--rate", type=float, default=12.0, help="arrivals a second (default 12; 450 s of it are an hour at 1.5)")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--prefill-workers", type=int, default=0)
    parser.add_argument("--decode-workers", type=int, default=0)
    parser.add_argument("--fault-seconds", type=float, default=18.0, help="between two faults, about (default 18)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help="write bench/results/soak.md (or soak_replicas.md, soak_disaggregated.md)")
    parser.add_argument("options", nargs="*", help="further options of `armillary serve`, after --")
    options = parser.parse_args()
    arguments = ["--quantize", "int4", "--deterministic", "--kv-blocks", "1024", "--max-running", "32", "--max-queue", "512"]
    if options.replicas > 1:
        arguments += ["--replicas", str(options.replicas)]
    if options.prefill_workers:
        arguments += ["--prefill-workers", str(options.prefill_workers), "--decode-workers", str(options.decode_workers)]
    arguments += options.options
    busy = os.getloadavg()[0]
    with Served(options.model, arguments) as served:
        several = options.replicas > 1 or options.prefill_workers
        faults = Faults(served, options.fault_seconds, options.seed) if several else None
        began = time.monotonic()
        report = run(served.port, served.name, seconds=options.seconds, rate=options.rate, seed=options.seed)
        took = time.monotonic() - began
        if faults is not None:
            faults.stop()
        left = served.when_idle()
        handed_over = served.handed_over()
    text, good = page(options, arguments, report, took, served, left, handed_over, faults, busy)
    print(text)
    if options.publish:
        kind = "_replicas" if options.replicas > 1 else "_disaggregated" if options.prefill_workers else ""
        (HERE / "results" / f"soak{kind}.md").write_text(text)
    return 0 if good else 1


class Served:
    """The server's process, its log, and the memory of it and of it with its children every second."""

    def __init__(self, model: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "armillary", "serve", model, "--port", "0", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self._watching = threading.Event()
        self.log: list[str] = []
        self.memory: list[tuple[float, int, int]] = []  # seconds, bytes of the server's own process, of all

    def __enter__(self) -> Served:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        threading.Thread(target=lambda: self.log.extend(self._process.stderr or ()), daemon=True).start()
        line = next((line for line in self._process.stdout if " at http://" in line), None)
        if line is None:
            raise SystemExit(f"it does not serve: {''.join(self.log)}")
        self.name, self.url = re.findall(r"serving (\S+) at (\S+)", line)[0]
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watching.set()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    def live(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/live", timeout=30) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    def when_idle(self) -> dict[str, Any]:
        """The state once nothing runs and no block is in use, or after half a minute."""
        deadline = time.monotonic() + 30
        while True:
            state = self.live()
            if not owed(state) or time.monotonic() > deadline:
                return state
            time.sleep(0.2)

    def handed_over(self) -> list[Path]:
        """Keys and values that lie between prefill and decode workers."""
        return [path for folder in Path("/dev/shm").glob(f"armillary-kv-{self._process.pid}-*") for path in folder.iterdir()]

    def _watch(self) -> None:
        begun = time.monotonic()
        while not self._watching.wait(1.0):
            own = _resident(self._process.pid)
            self.memory.append((time.monotonic() - begun, own, sum(map(_resident, _family(self._process.pid)))))


def owed(state: dict[str, Any]) -> bool:
    """Whether something runs, waits or holds memory."""
    replicas = state["features"].get("fleet", {}).get("replicas", ())
    return bool(state["running"] or state["waiting"] or state["blocks"]["used"] or any(one["held_bytes"] for one in replicas))


class Faults:
    """Stops or kills a replica now and then, never two at once, and each kind of replica as often."""

    def __init__(self, served: Served, seconds: float, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._between = (seconds * (1 - SPREAD), seconds * (1 + SPREAD))
        self._served, self._draw, self._over = served, random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        turns: list[tuple[str, signal.Signals]] = []
        while not self._over.wait(self._draw.uniform(*self._between)):
            replicas = self._served.live()["features"]["fleet"]["replicas"]
            if any(one["health"] in ("dead", "silent", "starting") for one in replicas):
                continue
            if not turns:
                turns = [(role, fault) for role in sorted({one["role"] for one in replicas}) for fault in (signal.SIGKILL, signal.SIGSTOP)]
                self._draw.shuffle(turns)
            role, fault = turns.pop()
            pid = self._draw.choice([one["pid"] for one in replicas if one["role"] == role])
            os.kill(pid, fault)
            self.done[f"{fault.name} of a {'replica' if role == 'both' else f'{role} worker'}"] += 1
            if fault is signal.SIGSTOP:
                self._over.wait(self._draw.uniform(*STOPPED_SECONDS))
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:  # it was replaced
                    self.done["replaced while stopped"] += 1


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _resident(pid: int) -> int:
    """Bytes of a process' own pages; what is shared (the weights' file) counts for none."""
    try:
        fields = (Path("/proc") / str(pid) / "statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")


def _fleet(options: argparse.Namespace) -> str:
    if options.prefill_workers:
        return f"{options.prefill_workers} prefill and {options.decode_workers} decode workers"
    return f"{options.replicas} replicas"


def page(
    options: argparse.Namespace,
    arguments: list[str],
    report: Report,
    took: float,
    served: Served,
    left: dict[str, Any],
    handed_over: list[Path],
    faults: Faults | None,
    busy: float,
) -> tuple[str, bool]:
    """The summary, and whether the server owes nothing."""
    requests = sum(report.outcomes.values())
    ends = Counter(end for (_, end), count in report.outcomes.items() for _ in range(count))
    quarter = [sizes for at, *sizes in served.memory if took / 4 <= at < took / 2]
    last = [sizes for at, *sizes in served.memory if took * 3 / 4 <= at <= took]
    (own, early), (own_late, late) = ([statistics.median(sizes) for sizes in zip(*part, strict=True)] for part in (quarter, last))
    before, after = (early, late) if faults is None else (own, own_late)
    books = [line for line in served.log if "books are wrong" in line or "Traceback" in line]
    whose = "" if faults is None else " of the router's process"
    checks = {
        "every answer and stream came to its end as it should": not report.violations,
        "nothing runs or waits, no KV block is in use, nothing lies between prefill and decode": not (owed(left) or handed_over),
        "the books of the KV pool were right whenever it was idle, and the log has no traceback": not books,
        f"memory{whose} at the end is at most {GROWTH:.0%} above that of the second quarter": after <= before * (1 + GROWTH),
    }
    stats = left["stats"]
    firsts = sorted(report.first_tokens)
    lines = [
        "# Soak" + (f" with {_fleet(options)}" if faults is not None else ""),
        "",
        f"{describe().cpu}, {datetime.now(UTC):%Y-%m-%d}, load average {busy:.1f} before. "
        f"`armillary serve {options.model} {' '.join(arguments)}`, {options.rate:g} arrivals a second for {options.seconds:g} s "
        f"(an hour at {options.rate * options.seconds / 3600:.2g} a second), seed {options.seed}.",
        "",
        "| | |",
        "|---|---:|",
        f"| requests | {requests:,} |",
        *(f"| ... {end} | {count:,} |" for end, count in ends.most_common()),
        f"| answers compared with an earlier one to the same question | {report.repeats:,} |",
        f"| tokens generated | {stats['generated_tokens']:,} |",
        f"| prompt tokens found in the prefix cache | {stats['reused_tokens']:,} of {stats['sought_tokens']:,} |",
        f"| preemptions | {stats['preemptions']:,} |",
        f"| memory of the processes, second quarter and last | {format_bytes(int(early))}, {format_bytes(int(late))} |",
    ]
    if firsts and busy <= QUIET:  # a time that was taken beside other work means nothing
        lines.append(
            f"| time to the first byte of a stream, p50 and p99 | {firsts[len(firsts) // 2]:.2f} s, {firsts[-1 - len(firsts) // 100]:.2f} s |"
        )
    if faults is not None:
        lines.append(
            f"| memory of the router's process, second quarter and last | {format_bytes(int(own))}, {format_bytes(int(own_late))} |"
        )
        fleet = left["features"]["fleet"]
        lines.append(f"| faults | {', '.join(f'{count} {fault}' for fault, count in faults.done.items()) or 'none'} |")
        lines.append(f"| requests that went on elsewhere | {fleet['moved']:,} |")
        if options.prefill_workers:
            lines.append(
                f"| caches moved from prefill to decode workers | {fleet['transfers']:,}, {format_bytes(fleet['transferred_bytes'])} |"
            )
    lines += ["", *(f"- {'yes' if held else '**NO**'}: {check}" for check, held in checks.items()), ""]
    lines += [f"    {violation[:400]}" for violation in report.violations[:10]]
    lines += [f"    {line.rstrip()[:300]}" for line in books[:10]]
    return "\n".join(lines) + "\n", all(checks.values())


if __name__ == "__main__":
    sys.exit(main())
