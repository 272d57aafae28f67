"""The training bench without its timings: all sides train alike, and its bars read the results right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import train  # noqa: E402
from peers.training import Recipe  # noqa: E402
from sides import run_side  # noqa: E402

from armillary.models.config import ModelConfig  # noqa: E402
from armillary.models.decoder import Decoder  # noqa: E402
from armillary.models.hf import save_hf  # noqa: E402

TINY = ModelConfig("llama", 300, 64, 160, 2, 4, 2, 16, 64, tie_embeddings=True)


@pytest.mark.slow
def test_ours_in_one_process_and_in_two_and_transformers_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_hf(Decoder(TINY), tmp_path / "model")
    batches = tuple(tuple(tuple((7 * i + 11 * row + step) % 300 for i in range(32)) for row in range(3)) for step in range(4))
    recipe = Recipe("tiny", str(tmp_path / "model"), batches, threads=1, steps=3, seconds=1.0, lr=1e-3)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    losses = []
    for side, variant in (train.OURS, train.TWO, train.EAGER):
        (result,) = run_side(side, sys.executable, [train.MODULES[side], str(tmp_path / "recipe.json"), variant], 120.0)
        losses.append(result["losses"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)
    assert losses[0][3] < losses[0][0]


def result(column: tuple[str, str], tokens: float, **more: float) -> dict[str, object]:
    return {
        "side": column[0], "variant": column[1], "version": "1", "case": "finetune-135m", "tokens_per_second": tokens,
        "median_tokens_per_second": tokens, "first_step_seconds": 2.0, "losses": [1.0], "peak_bytes": 1e9, **more,
    }  # fmt: skip


def test_bars_compare_with_peers_and_with_the_gemm_rate() -> None:
    case = train.CASES[0]
    found = [
        result(train.OURS, 300.0),
        result(train.WHOLE_DOOR, 290.0, stall=0.03),
        result(train.EAGER, 200.0),
        result(train.COMPILED, 290.0),
    ]
    config = ModelConfig("llama", 1000, 64, 160, 2, 4, 2, 16, 256)
    flops = train.flops_per_token(case, config)
    assert flops == pytest.approx(6 * (config.parameters() - 64_000) + 12 * 2 * 4 * 16 * 256)
    options = argparse.Namespace(threads=2, steps=3)
    text = train.page(found, {"torch.mm": flops * 100, "oneDNN, packed": flops * 400}, {case.name: config}, options, (0.1,) * 3, (1.0,) * 3)
    lines = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("|")}
    assert ("finetune-135m, tokens/s", "300", "transformers, 200", "1.50", "1.4", "1.6", "yes") in lines
    assert ("finetune-135m, tokens/s", "300", "transformers, compiled whole, 290", "1.03", "1.05", "1.6", "no") in lines
    assert ("finetune-135m, tokens/s", "300", "the GEMM rate", "0.75", "0.8", "0.9", "no") in lines
    assert ("finetune-135m: waiting for data", "3.00%", "-", "-", "2%", "-", "no") in lines
    assert ("finetune-135m, one process: first step", "2.0 s", "-", "-", "30 s", "-", "yes") in lines
