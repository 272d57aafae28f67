"""The GPU benches where no GPU is: their closed forms, what they print, and that ours, the peers and float64 agree on small cases."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("paged_attention", "quantised_linear")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "bench" / "gpu"))), **variables}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def cases(bench: str) -> list[dict]:
    done = run(f"bench/gpu/{bench}.py", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_attention_counts_every_pair_and_every_byte() -> None:
    for case in cases("paged_attention"):
        window = case["window"] or 1 << 30
        pairs, keys = 0, 0
        for start, count in case["spans"]:
            lows = [max(0, i + 1 - window) for i in range(start, start + count)]
            pairs += sum(i + 1 - low for i, low in zip(range(start, start + count), lows, strict=True))
            keys += start + count - lows[0]
        tokens = sum(count for _, count in case["spans"])
        assert case["flops"] == pairs * case["heads"] * case["head_dim"] * 4
        assert case["bytes"] == 2 * case["head_dim"] * 2 * (keys * case["kv_heads"] + tokens * case["heads"])


def test_a_product_moves_what_its_tensors_take() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from cases import BITS, LinearCase
from armillary.kernels.gpu.quantised_linear import quantise
for format in BITS:
    for n, k in ((3, 1), (5, 64), (7, 100)):
        case = LinearCase("", 2, n, k, format)
        weight = quantise(torch.randn(n, k), format)
        assert case.weight_bytes == weight.nbytes, (case, weight.nbytes)
        assert case.bytes == weight.nbytes + torch.empty(2, k).half().nbytes + torch.empty(2, n).half().nbytes
        assert case.flops == 2 * 2 * n * k
"""
    assert run("-c", code).stderr == ""


@pytest.mark.parametrize("bench", BENCHES)
def test_without_a_gpu_one_line_says_what_is_needed(bench: str) -> None:
    done = run(f"bench/gpu/{bench}.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"bench/gpu/{bench}.py needs ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("bench", BENCHES)
def test_a_dry_run_lists_every_case_once(bench: str) -> None:
    names = [case["name"] for case in cases(bench)]
    lines = run(f"bench/gpu/{bench}.py", "--dry-run").stdout.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == names
    assert len(set(names)) == len(names)
    assert "no case is called nothing" in run(f"bench/gpu/{bench}.py", "--dry-run", "--cases", "nothing").stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'armillary[gpu]'")
def test_ours_the_peers_and_float64_agree_on_small_cases() -> None:
    """Everything but the clock, in Triton's interpreter: what a first run on a card would otherwise find."""
    code = """
import os
import card
import paged_attention, quantised_linear, report
from cases import AttentionCase, LinearCase

def once(run):
    run()
    return 1e-6

card.best_seconds = once
card.about = lambda: "a card"
small = dict(heads=4, kv_heads=2, head_dim=16)
attention = [
    AttentionCase("decode", ((40, 1),) * 3, **small),
    AttentionCase("unequal", ((40, 1), (7, 1)), **small),
    AttentionCase("window", ((40, 1),) * 2, window=9, **small),
    AttentionCase("prompt", ((0, 20),), dtype="float16", **small),
    AttentionCase("chunk", ((17, 20),), block_size=5, **small),
]
linear = [LinearCase(f"{format}-{m}", m, 20, 100, format, dtype) for format, m, dtype in (("int4", 1, "float16"), ("int8", 6, "bfloat16"))]
found = [paged_attention.measure(case, "cpu") for case in attention]
assert [list(r.peers.values()) == [None, None] for r in found] == [False, True, False, False, False], found
page = report.page("paged_attention", attention, found, card.Limits(1e12, 1e14), os.getloadavg())
assert page.count("| decode |") == 1 and "| 1.00 |" in page, page
found = [quantised_linear.measure(case, "cpu") for case in linear]
assert all(result.error <= 1 for result in found)
print(report.page("quantised_linear", linear, found, card.Limits(1e12, 1e14), os.getloadavg()))
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "# Quantised linear on a GPU" in done.stdout
