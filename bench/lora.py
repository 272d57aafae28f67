"""Decoding with adapters beside decoding without: tokens a second of batches in which nobody, everybody or every row another one has an adapter.

    python bench/lora.py [--force]        # wants a quiet machine; two minutes

Adapters of rank 16 on all seven projections, in fp32. The sides take turns on one engine, so that they differ in nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from quiet import quiet
from safetensors.torch import save_file

from armillary.kernels.cpu_library import PARTS
from armillary.models.config import ModelConfig
from armillary.models.load import LoadedModel, load
from armillary.models.lora_config import projections
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

RANK, ADAPTERS = 16, 8
PROMPT, TOKENS = 16, 64
BATCHES = (8, 32)
SIDES = (0, 1, ADAPTERS)  # adapters in a batch


def write(folder: Path, config: ModelConfig, seed: int) -> str:
    """A random adapter, small beside the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (n, k) in projections(config):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, k, generator=generator) * 0.01
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n, RANK, generator=generator) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(PARTS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def rate(llm: LLM, batch: int, names: list[str], tokens: int) -> float:
    """Tokens a second of `batch` sequences that decode together, each with the next of `names`."""
    prompts = [[100 + (7 * row + i) % 1000 for i in range(PROMPT)] for row in range(batch)]
    lora = [names[row % len(names)] if names else None for row in range(batch)]
    answers = llm.generate(prompts, SamplingParams(tokens, temperature=0.0, ignore_eos=True), lora=lora)
    begin = max(answer.request.first_token or 0 for answer in answers)
    end = max(answer.request.last_token or 0 for answer in answers)
    return batch * (tokens - 1) * 1e9 / (end - begin)


def measure(loaded: LoadedModel, weights: str, folders: dict[str, str], repeats: int, tokens: int) -> list[str]:
    llm = LLM(loaded, quantize=weights, prefix_cache="off", weight_cache="off", kv_memory="800 MB", lora=folders)
    lines = []
    for batch in BATCHES:
        rates: dict[int, list[float]] = {count: [] for count in SIDES}
        for _ in range(repeats + 1):
            for count in SIDES:
                rates[count].append(rate(llm, batch, list(folders)[:count], tokens))
        best = {count: statistics.median(of[1:]) for count, of in rates.items()}  # the first warms up
        for count in SIDES:
            name = "fp32" if weights == "none" else weights
            lines.append(f"| {name} | {batch} | {count} | {best[count]:,.0f} | {best[count] / best[0]:.2f} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    lines = ["| weights | sequences | adapters | tok/s | beside none |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as root:
        folders = {f"adapter-{i}": write(Path(root) / str(i), loaded.config, i) for i in range(ADAPTERS)}
        for weights in ("none", "int4"):
            lines += measure(loaded, weights, folders, options.repeats, options.tokens)
    print(f"Adapters of rank {RANK} on all projections, {options.tokens} tokens a sequence.\n\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
