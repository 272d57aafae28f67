"""Time to first token with and without the prefix cache, ours beside vLLM's, in one run.

    python bench/prefix.py [--force]      # wants a quiet machine; a few minutes

16 requests share their first 1,024 tokens and end in 16 of their own; one after another, each until its first token. Every side is a
process of its own. vLLM runs where bench/peers/setup.sh vllm has set it up ($ARMILLARY_PEER_VLLM, or .venv-peers/vllm).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cases import TEXT
from peers.prefix import Prefix
from prefix_ours import VARIANTS
from quiet import quiet
from sides import hf_folder, peer_python, run_side

from armillary.models.load import load

REQUESTS, SHARED, OWN = 16, 1024, 16
BARS = (  # ours, against, at least
    (("armillary", "fp32"), ("armillary", "fp32, no prefix cache"), 10.0),
    (("armillary", "int4"), ("armillary", "int4, no prefix cache"), 10.0),
    (("armillary", "fp32"), ("vllm", "fp32"), 1.5),
    (("armillary", "int4"), ("vllm", "fp32"), 1.5),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every side (default: all cores)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a side may take")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    if not quiet(force=options.force):
        return 2
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.json"
        prepare(options.threads).save(path)
        sides = [("armillary", variant, sys.executable, ["prefix_ours", str(path), variant]) for variant in VARIANTS]
        python = peer_python("vllm")
        if python is None:
            print("vllm: not set up here, left out (bench/peers/setup.sh vllm)", file=sys.stderr)
        else:
            sides.append(("vllm", "fp32", python, ["peers.vllm_prefix", str(path)]))
        for side, variant, interpreter, arguments in sides:
            for result in run_side(f"{side} {variant}", interpreter, arguments, options.timeout):
                found[side, variant] = result
    print(table(found))
    return 0 if {("armillary", variant) for variant in VARIANTS} <= found.keys() else 1


def prepare(threads: int) -> Prefix:
    loaded = load("smollm2")
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    shared, rest = tokens[:SHARED], tokens[SHARED:]
    assert len(rest) >= OWN * REQUESTS, "the text is too short"
    prompts = tuple((*shared, *rest[OWN * index : OWN * (index + 1)]) for index in range(REQUESTS))
    warm = tuple(tokens[::-1][: SHARED + OWN])
    return Prefix(prompts, warm, SHARED, str(hf_folder(loaded)), str(loaded.source_path), threads)


def table(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    first = {key: result["seconds"][0] for key, result in found.items()}
    later = {key: statistics.median(result["seconds"][1:]) for key, result in found.items()}
    lines = [
        f"{REQUESTS} requests that share their first {SHARED:,} tokens and end in {OWN} of their own, one after another. Time to first token;"
        " that of the first request is a single measurement.",
        "",
        "| | first request | the others, median | slowest of the others |",
        "|---|---:|---:|---:|",
    ]
    for key, result in found.items():
        name = f"{'Armillary' if key[0] == 'armillary' else 'vLLM, compiled, with its prefix cache'}, {key[1]}"
        lines.append(f"| {name} | {1e3 * first[key]:,.0f} ms | {1e3 * later[key]:,.1f} ms | {1e3 * max(result['seconds'][1:]):,.1f} ms |")
    lines += ["", "| the others, median | against | times as fast | bar | met |", "|---|---|---:|---:|---|"]
    for ours, other, least in BARS:
        if ours in later and other in later:
            ratio = later[other] / later[ours]
            lines.append(f"| {', '.join(ours)} | {', '.join(other)} | {ratio:.1f} | {least:g} | {'yes' if ratio >= least else 'no'} |")
    exact = {tuple(result["tokens"]) for key, result in found.items() if key[1].startswith("fp32")}
    lines += ["", f"First tokens of all fp32 sides are {'the same' if len(exact) == 1 else 'NOT the same'}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
