"""The bench's own arithmetic: what it calls a bound, a bar that is met, and an instruction's class."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from armillary.models.config import ModelConfig

BENCH = Path(__file__).resolve().parents[2] / "bench"
SMOLLM2 = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_context=8192,
    tie_embeddings=True,
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_bound_of_one_sequence_is_the_bytes_of_a_step_over_the_memory_rate(bench):
    limits, workload = bench("limits"), bench("peers.workload")
    machine = limits.Limits(fma=1e15, dot=1e15, dot_instruction="", reads=((10**8, 50e9),))
    case = workload.Case("decode", "decode", (tuple(range(32)),), (64,))
    matrices = 106_203_456 - 61 * 576 + 28_311_552  # all but the norms
    found = limits.bound(case, SMOLLM2, machine, "int4", weight_bytes=matrices * 4.5 / 8)
    keys_and_values = 23_040 * sum(32 + i + 0.5 for i in range(63)) / 63
    assert found.by == "memory"
    assert found.speed == pytest.approx(50e9 / (matrices * 4.5 / 8 + keys_and_values), rel=0.01)


def test_bound_of_a_prompt_is_arithmetic_and_no_lower_in_the_faster_format(bench):
    limits, workload = bench("limits"), bench("peers.workload")
    machine = limits.Limits(fma=250e9, dot=1000e9, dot_instruction="", reads=((10**8, 50e9),))
    case = workload.Case("prefill", "prefill", (tuple(range(512)),), (64,))
    exact, small = (limits.bound(case, SMOLLM2, machine, variant) for variant in ("fp32", "int4"))
    assert exact.by == small.by == "arithmetic"
    assert exact.speed < small.speed < 4 * exact.speed  # attention stays fp32


def test_every_bar_names_a_case_that_the_bars_run(bench):
    import fnmatch

    bars, cases = bench("bars"), bench("cases")
    built = [case.name for case in cases.build(range(3000), 8192, 64)]
    chosen = [name for name in built if any(fnmatch.fnmatch(name, pattern) for pattern in cases.BARS)]
    assert {bar.case for bar in bars.BARS} == set(chosen)


def test_conversations_are_the_traces_lengths_and_no_two_share_a_start(bench):
    (case,) = [case for case in bench("cases").build(range(3000), 8192, 64) if case.kind == "offline"]
    assert (case.batch, case.prompt_tokens, sum(case.new)) == (64, 45_428, 8_091)
    assert len({prompt[:8] for prompt in case.prompts}) == 64


def test_a_bar_is_met_from_its_least_on(bench):
    bars = bench("bars")
    bar = bars.Bar("decode", "int4", ("vllm",), 1.5, 2.0)
    assert [bars.verdict(reached, bar) for reached in (None, 1.49, 1.5, 2.0)] == ["-", "no", "yes", "stretch"]


@pytest.mark.parametrize(
    ("mnemonic", "operands", "expected"),
    [
        ("vpdpbusd", "%zmm1,%zmm2,%zmm3", ("multiply", False)),
        ("vpdpbusd", "(%rax){1to16},%zmm2,%zmm3", ("multiply", True)),
        ("vpbroadcastd", "0x4(%rax),%zmm3", ("load only", True)),
        ("vmovups", "%zmm3,(%rax)", ("store", False)),
        ("vcvtdq2ps", "%zmm1,%zmm2", ("convert", False)),
        ("lea", "0x8(%rax),%rdx", ("scalar", False)),
        ("prefetcht0", "(%rax)", ("prefetch", True)),
    ],
)
def test_instructions_are_told_apart(bench, mnemonic, operands, expected):
    assert bench("counts").classify(mnemonic, operands) == expected
