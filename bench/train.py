"""Training on this machine's CPU, ours beside the peers and beside the machine's own GEMM rate, all in one run.

    python bench/train.py --publish             # what the bars need, a quarter of an hour and more: the peers compile
    python bench/train.py --peers --cases finetune-135m --steps 3      # ours alone

Each side runs alone in a process of its own (a peer in its own virtual environment: bench/peers/setup.sh transformers | litgpt), from
the same weights, on the same batches, with the same optimizer; the speed is that of the fastest step. A peer that is not set up is left
out, and said so. Its python is found as $ARMILLARY_PEER_<NAME>, then <$ARMILLARY_PEERS or .venv-peers>/<name>/bin/python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import TEXT
from peers.training import Recipe
from sides import HERE, ROOT, hf_folder, peer_python, run_side
from table import markdown, ratio, speed

from armillary.cluster.machine import describe
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.hf import save_hf
from armillary.models.load import load
from armillary.train.flops import model_flops

QUIET = 0.5  # load average above which timings mean nothing
OURS, WHOLE_DOOR, TWO = ("armillary", "one process"), ("armillary", "whole door"), ("armillary", "two processes, FSDP2")
EAGER, COMPILED, TRAINER = (("transformers", variant) for variant in ("eager", "compiled", "Trainer"))
LITGPT, LITGPT_COMPILED = ("litgpt", "eager"), ("litgpt", "compiled")
MODULES = {"armillary": "train_ours", "transformers": "peers.train_transformers", "litgpt": "peers.train_litgpt"}
NAMES = {
    OURS: "Armillary, one process",
    EAGER: "transformers",
    COMPILED: "transformers, compiled whole",
    TRAINER: "transformers' Trainer",
    LITGPT: "LitGPT",
    LITGPT_COMPILED: "LitGPT, compiled",
}
PRETRAINED = ModelConfig("llama", 8192, 512, 1408, 8, 8, 8, 64, 256, tie_embeddings=True)  # 30M parameters
Column = tuple[str, str]  # side, variant


@dataclass(frozen=True)
class Case:
    """A model, a batch, and who trains it. `rows` of `length` tokens a step; `config` None is SmolLM2-135M."""

    name: str
    rows: int
    length: int
    config: ModelConfig | None
    sides: tuple[Column, ...]


CASES = (
    Case("finetune-135m", 4, 256, None, (OURS, WHOLE_DOOR, TWO, EAGER, COMPILED, TRAINER, LITGPT)),
    Case("pretrain-30m", 8, 256, PRETRAINED, (OURS, EAGER, TRAINER, LITGPT, LITGPT_COMPILED)),
)


@dataclass(frozen=True)
class Bar:
    """`own`, of ours, against `other` of the same case: another side, or the machine's GEMM rate ("gemm")."""

    case: str
    other: Column | str
    least: float
    stretch: float
    own: Column = OURS


BARS = (
    Bar("finetune-135m", EAGER, 1.4, 1.6),
    Bar("finetune-135m", COMPILED, 1.05, 1.6),
    Bar("finetune-135m", "gemm", 0.8, 0.9),
    Bar("finetune-135m", OURS, 0.85, 1.0, own=TWO),
    Bar("pretrain-30m", TRAINER, 1.4, 1.6),
    Bar("pretrain-30m", LITGPT, 1.4, 1.6),
    Bar("pretrain-30m", LITGPT_COMPILED, 1.05, 1.6),
    Bar("pretrain-30m", "gemm", 0.8, 0.9),
)
MOST_WAIT, MOST_STALL = 30.0, 0.02  # seconds until the end of the first step; share of the time that is spent waiting for data


def main() -> int:
    options = parse()
    before = os.getloadavg()
    print(f"load average before: {' '.join(f'{load:.2f}' for load in before)}")
    if before[0] > QUIET:
        print(f"warning: the load average is above {QUIET}: something else runs, and these timings understate what it disturbs")
        if options.publish and not options.force:
            print("not measured, for it would not be published: wait for a quiet machine, or --force", file=sys.stderr)
            return 2
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    (gemm,) = run_side("GEMM rate", sys.executable, ["gemm", str(options.threads)], options.timeout) or [{}]
    found: list[dict[str, Any]] = []
    configs: dict[str, ModelConfig] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if case.name in options.cases):
            recipe, configs[case.name] = prepare(case, options, Path(folder))
            path = Path(folder) / f"{case.name}.json"
            recipe.save(path)
            for side, variant in case.sides:
                if side != "armillary" and side not in options.peers:
                    continue
                python = sys.executable if side == "armillary" else peer_python(side)
                if python is None:
                    print(f"{side}: not set up here, left out (bench/peers/setup.sh {side})")
                    continue
                found += run_side(f"{case.name}, {side} {variant}", python, [MODULES[side], str(path), variant], options.timeout)
    after = os.getloadavg()
    text = page(found, gemm, configs, options, before, after)
    print(f"\n{text}")
    if options.publish:
        publish(text, found, gemm, before, after)
    wanted = {(case.name, *column) for case in CASES if case.name in options.cases for column in case.sides if column[0] == "armillary"}
    return 0 if wanted <= {(result["case"], result["side"], result["variant"]) for result in found} else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = ["transformers", "litgpt"]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, help="which peers (default: all)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every side (default: all cores)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a side, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="no further step of a side after this long (three are always made)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a side may take")
    parser.add_argument("--publish", action="store_true", help="write bench/results/train.{json,md}; wants a quiet machine")
    parser.add_argument("--force", action="store_true", help="publish although the machine is not quiet")
    options = parser.parse_args()
    if options.threads < 1 or options.steps < 1:
        parser.error("--threads and --steps are at least 1")
    return options


def prepare(case: Case, options: argparse.Namespace, scratch: Path) -> tuple[Recipe, ModelConfig]:
    """The weights as an HF folder, and batches of real text."""
    smollm2 = load("smollm2")
    if case.config is None:
        folder, config = hf_folder(smollm2), smollm2.config
    else:
        folder, config = scratch / case.name, case.config
        torch.manual_seed(0)
        save_hf(Decoder(config), folder)
    text = [token % config.vocab_size for token in smollm2.tokenizer.encode(TEXT.read_text(), special=False)]
    size, count = case.rows * case.length, options.steps + 1
    text *= 1 + size * count // len(text)
    starts = range(0, size * count, case.length)
    rows = [tuple(text[start : start + case.length]) for start in starts]
    batches = tuple(tuple(rows[i * case.rows : (i + 1) * case.rows]) for i in range(count))
    return Recipe(case.name, str(folder), batches, options.threads, options.steps, options.seconds), config


def page(
    found: Sequence[Mapping[str, Any]],
    gemm: Mapping[str, float],
    configs: Mapping[str, ModelConfig],
    options: argparse.Namespace,
    before: tuple[float, ...],
    after: tuple[float, ...],
) -> str:
    """The results with what one needs to judge them."""
    chosen = [case for case in CASES if case.name in configs]
    shares = {case.name: flops_per_token(case, configs[case.name]) / max(gemm.values(), default=float("nan")) for case in chosen}
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in gemm.items())
    blocks = [
        "# Training on a CPU",
        bars(found, shares),
        f"{describe().cpu}, {options.threads} threads, fp32. Large square products in this run, GFLOP/s: {rates}; the fastest is the GEMM rate."
        f" {time.strftime('%Y-%m-%d')}.\n"
        f"Load average {' '.join(f'{load:.2f}' for load in before)} before, {' '.join(f'{load:.2f}' for load in after)} after"
        f" (the bench's own threads included). The fastest of at most {options.steps} steps.",
        *(table(case, found, shares[case.name]) for case in chosen),
        "A step is everything: the batch handed over, forward, backward, the gradient's norm and clipping, AdamW. The share of the GEMM rate is the"
        " model's FLOPs by PaLM's count (attention without its causal half) over the time and the GEMM rate. The first step is not among the timed"
        " ones: it compiles, measures and allocates. Losses differ by rounding alone; `whole door` reads other batches, from token shards.\n"
        "Versions: " + ", ".join(sorted({f"{result['side']} {result['version']}" for result in found})) + ".",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def flops_per_token(case: Case, config: ModelConfig) -> float:
    """By PaLM's count."""
    return model_flops(config, case.rows * case.length, case.rows * case.length**2) / (case.rows * case.length)


def one(found: Sequence[Mapping[str, Any]], case: str, column: Column) -> Mapping[str, Any] | None:
    return next((r for r in found if (r["case"], r["side"], r["variant"]) == (case, *column)), None)


def bars(found: Sequence[Mapping[str, Any]], shares: Mapping[str, float]) -> str:
    """A line a bar that this run can judge."""
    lines = [["", "Armillary", "against", "ratio", "bar", "stretch", "met"]]
    for bar in BARS:
        own = one(found, bar.case, bar.own)
        if own is None:
            continue
        if isinstance(bar.other, str):
            other, reached = "the GEMM rate", own["tokens_per_second"] * shares[bar.case]
            shown = f"{reached:.2f}"
        else:
            peer = one(found, bar.case, bar.other)
            if peer is None:
                continue
            other = f"{NAMES[bar.other]}, {speed(peer['tokens_per_second'])}"
            reached = own["tokens_per_second"] / peer["tokens_per_second"]
            shown = ratio(own["tokens_per_second"], peer["tokens_per_second"])
        met = "stretch" if reached >= bar.stretch else "yes" if reached >= bar.least else "no"
        what = bar.case if bar.own == OURS else f"{bar.case}, {bar.own[1]}"
        lines.append([f"{what}, tokens/s", speed(own["tokens_per_second"]), other, shown, f"{bar.least:g}", f"{bar.stretch:g}", met])
    for result in found:
        if result["side"] != "armillary":
            continue
        first = result["first_step_seconds"]
        met = "yes" if first <= MOST_WAIT else "no"
        lines.append([f"{result['case']}, {result['variant']}: first step", f"{first:.1f} s", "-", "-", f"{MOST_WAIT:g} s", "-", met])
        if "stall" in result:
            met = "yes" if result["stall"] <= MOST_STALL else "no"
            lines.append([f"{result['case']}: waiting for data", f"{result['stall']:.2%}", "-", "-", f"{MOST_STALL:.0%}", "-", met])
    return markdown(lines)


def table(case: Case, found: Sequence[Mapping[str, Any]], share: float) -> str:
    """A line a side."""
    lines = [[case.name, "tokens/s", "median", "ours is", "of the GEMM rate", "first step", "peak memory", "losses of the first steps"]]
    own = one(found, case.name, OURS)
    for column in case.sides:
        result = one(found, case.name, column)
        if result is None:
            continue
        lines.append(
            [
                f"Armillary, {column[1]}" if column[0] == "armillary" else NAMES[column],
                speed(result["tokens_per_second"]),
                speed(result["median_tokens_per_second"]),
                ratio(own["tokens_per_second"] if own else None, result["tokens_per_second"]),
                f"{result['tokens_per_second'] * share:.0%}",
                f"{result['first_step_seconds']:.1f} s",
                f"{result['peak_bytes'] / 1e9:.1f} GB",
                " ".join(f"{loss:.4f}" for loss in result["losses"]),
            ]
        )
    return markdown(lines) if len(lines) > 1 else ""


def publish(text: str, found: list[dict[str, Any]], gemm: Mapping[str, float], before: tuple[float, ...], after: tuple[float, ...]) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / "train.md").write_text(text)
    record = {
        "cpu": describe().cpu,
        "python": platform.python_version(),
        "load_before": before,
        "load_after": after,
        "gemm": gemm,
        "results": found,
    }
    (folder / "train.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"published in {folder.relative_to(ROOT)}/train.md and .json")


if __name__ == "__main__":
    sys.exit(main())
