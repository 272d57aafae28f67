"""Serving on this machine's CPU, ours beside the peers and beside what the machine can do, all in one run.

    python bench/serve_cpu.py --bars --publish          # what the bars need: vLLM, llama.cpp and its server beside fp32, int8 and int4
    python bench/serve_cpu.py --peers                   # everything

Each side runs alone in a process of its own (a peer in its own virtual environment: bench/peers/setup.sh), on the same
weights and the same prompts, greedy, best of several. A peer that is not set up is left out, and said so. Its python is
found as $ARMILLARY_PEER_<NAME>, then <$ARMILLARY_PEERS or .venv-peers>/<name>/bin/python.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bars
import cases
import limits
import table
from ours import VARIANTS
from peers.workload import Case, Workload
from sides import hf_folder, peer_python, run_side

from armillary.cluster.machine import describe
from armillary.models.load import load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = {"vllm": "vllm", "transformers": "transformers", "llama": "llama", "llama_server": "llama"}  # and in whose environment
BARS_PEERS, BARS_VARIANTS = ["vllm", "llama", "llama_server"], ["fp32", "int8", "int4"]
QUIET = 0.5  # load average above which timings mean nothing


def main() -> int:
    options = parse()
    before = os.getloadavg()
    print(f"load average before: {' '.join(f'{load:.2f}' for load in before)}")
    if before[0] > QUIET:
        print(f"warning: the load average is above {QUIET}: something else runs, and these timings understate what it disturbs")
        if options.publish and not options.force:
            print("not measured, for it would not be published: wait for a quiet machine, or --force", file=sys.stderr)
            return 2
    workload, config = prepare(options)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        workload.save(path)
        (raw,) = run_side("limits", sys.executable, ["limits", str(options.threads), str(config.parameters())], options.timeout) or [None]
        if raw is None:
            return 1
        found = []
        for variant in options.variants:
            found += run_side(f"armillary {variant}", sys.executable, ["ours", str(path), variant], options.timeout)
        for peer in options.peers:
            python = peer_python(PEERS[peer])
            if python is None:
                print(f"{peer}: not set up here, left out (bench/peers/setup.sh {PEERS[peer]})")
                continue
            found += run_side(peer, python, [f"peers.{peer}", str(path)], options.timeout)
    machine_limits = limits.parse(raw)
    names = [case.name for case in workload.cases]
    weight_bytes = {result["variant"]: result["weight_bytes"] for result in found if result["side"] == "armillary"}
    bounds = {
        (variant, case.name): limits.bound(case, config, machine_limits, variant, weight_bytes.get(variant))
        for variant in options.variants
        if variant in limits.WEIGHT_BITS
        for case in workload.cases
    }
    after = os.getloadavg()
    text = page(found, workload.cases, bounds, machine_limits, options, before, after)
    print(f"\n{text}")
    if options.publish:
        publish(text, found, bounds, machine_limits, before, after)
    complete = {(result["variant"], result["case"]) for result in found if result["side"] == "armillary"}
    return 0 if complete == {(variant, name) for variant in options.variants for name in names} else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=None, help="measure these peers too (without names: all)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None, help="which of ours (default: all)")
    parser.add_argument("--bars", action="store_true", help="only the cases, variants and peers that the bars need, unless named")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every side (default: all cores)")
    parser.add_argument("--cases", nargs="+", default=None, help="only cases whose name matches one, such as 'decode-*-after-32'")
    parser.add_argument("--requests", type=int, default=64, help="conversations of the offline case, at most 64")
    parser.add_argument("--repeats", type=int, default=5, help="best of at most this many")
    parser.add_argument("--seconds", type=float, default=10.0, help="no further repeat of a case after this long")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a side may take")
    parser.add_argument("--publish", action="store_true", help="write bench/results/serve_cpu.{json,md}; wants a quiet machine")
    parser.add_argument("--force", action="store_true", help="publish although the machine is not quiet")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = BARS_PEERS if options.bars else []
    elif not options.peers:
        options.peers = list(PEERS)
    options.variants = options.variants or (BARS_VARIANTS if options.bars else list(VARIANTS))
    options.cases = options.cases or (list(cases.BARS) if options.bars else ["*"])
    if not 1 <= options.requests <= 64 or options.threads < 1 or options.repeats < 1:
        parser.error("--requests is 1 to 64, --threads and --repeats at least 1")
    return options


def prepare(options: argparse.Namespace) -> tuple[Workload, Any]:
    """The workload, and the model's weights once more as the HF folder that the peers read."""
    loaded = load(options.model)
    folder = hf_folder(loaded)
    tokens = loaded.tokenizer.encode(cases.TEXT.read_text(), special=False)
    known = cases.build(tokens, loaded.config.max_context, options.requests)
    chosen = [case for case in known if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.cases)]
    if not chosen:
        raise SystemExit(f"no case is called {' or '.join(options.cases)}: {', '.join(case.name for case in known)}")
    workload = Workload(
        cases=tuple(chosen),
        hf_folder=str(folder),
        gguf_file=str(loaded.source_path),
        scratch=str(folder.parent),
        threads=options.threads,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    return workload, loaded.config


def page(
    found: list[dict[str, Any]],
    chosen: tuple[Case, ...],
    bounds: dict[tuple[str, str], limits.Bound],
    machine: limits.Limits,
    options: argparse.Namespace,
    before: tuple[float, ...],
    after: tuple[float, ...],
) -> str:
    """The results with what one needs to judge them."""
    reads = ", ".join(f"{rate / 1e9:.1f} of {size / 1e6:,.0f} MB" for size, rate in machine.reads)
    blocks = [
        f"# Serving {options.model} on a CPU",
        bars.bars(found, bounds),
        f"{describe().cpu}, {options.threads} threads. At most, measured in this run: {machine.fma / 1e9:,.0f} GFLOP/s in fp32,"
        f" {machine.dot / 1e9:,.0f} Gop/s of byte products ({machine.dot_instruction}); GB/s read over and over on huge pages: {reads}."
        f" {time.strftime('%Y-%m-%d')}.\n"
        f"Load average {' '.join(f'{load:.2f}' for load in before)} before, {' '.join(f'{load:.2f}' for load in after)} after"
        f" (the bench's own threads included). Best of {options.repeats}, or of as many as fit {options.seconds:.0f} s and at least two.",
        table.fp32(found, chosen),
        table.small(found, chosen),
        table.offline(found, chosen),
        table.reached(found, bounds),
        f"`prefill-512`: prompt tokens a second until the first new token. `decode-B-after-P`: new tokens a second of B sequences with prompts"
        f" of P tokens, {cases.NEW} new tokens each, after the first. `offline-N`: new tokens a second of N requests with the lengths of the"
        " first N conversations of a real trace, all there at the start, each engine's own scheduler deciding. Greedy, end-of-text ignored,"
        " the same tokens for every side, no prefix cache.\n"
        "The bound is the format's arithmetic and memory traffic overlapped perfectly, at the rates above: products of int8 and int4 at the"
        " rate of byte products, attention and all else at fp32's.",
        "Greedy tokens equal to our fp32 side's, before the first difference of a case (smaller weights are other models): "
        + "; ".join(table.agreement(found))
        + ".\nVersions: "
        + ", ".join(sorted({f"{result['side']} {result['version']}" for result in found}))
        + ".",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def publish(
    text: str,
    found: list[dict[str, Any]],
    bounds: dict[tuple[str, str], limits.Bound],
    machine: limits.Limits,
    before: tuple[float, ...],
    after: tuple[float, ...],
) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / "serve_cpu.md").write_text(text)
    record = {
        "cpu": describe().cpu,
        "python": platform.python_version(),
        "load_before": before,
        "load_after": after,
        "limits": asdict(machine),
        "bounds": [{"variant": variant, "case": case, **asdict(bound)} for (variant, case), bound in bounds.items()],
        "results": found,
    }
    (folder / "serve_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"published in {folder.relative_to(ROOT)}/serve_cpu.md and .json")


if __name__ == "__main__":
    sys.exit(main())
