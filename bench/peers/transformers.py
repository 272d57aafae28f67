"""Hugging Face transformers, eager, fp32: its model in the tightest greedy loop, without the cost of its `generate`.

Requests of different lengths run as static batches, left-padded, sorted by length: the library has no other way offline.
"""

from __future__ import annotations

import sys

import torch
import transformers
from peers.workload import Workload, measure, report

BATCH = 16  # of requests that differ in length


def main(path: str) -> None:
    workload = Workload.load(path)
    torch.set_num_threads(workload.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(workload.hf_folder, dtype=torch.float32).eval()

    def batch(prompts: list[tuple[int, ...]], new: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        padded = bool((mask == 0).any())
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, columns = None, []
        for _ in range(max(new)):
            out = model(
                tokens,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            columns.append(tokens)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            positions = positions[:, -1:] + 1
        rows = torch.cat(columns, dim=1).tolist()
        return [row[:count] for row, count in zip(rows, new, strict=True)]

    @torch.inference_mode()
    def generate(prompts: object, new: object) -> list[list[int]]:
        prompts, new = list(prompts), list(new)
        if len(set(map(len, prompts))) == 1:
            return batch(prompts, new)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + new[i])
        outputs: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), BATCH):
            members = order[first : first + BATCH]
            for i, output in zip(members, batch([prompts[i] for i in members], [new[i] for i in members]), strict=True):
                outputs[i] = output
        return outputs

    for case in workload.cases:
        report("transformers", transformers.__version__, case, *measure(generate, workload, case), variant="fp32")


if __name__ == "__main__":
    main(sys.argv[1])
