"""What Quest's budget and its dense layers cost in perplexity at a long context: python bench/quest_quality.py [--publish]

A window's prompt is computed with everything, as it is when served; the tokens after it select their pages, and are scored.
All rows score the same tokens after the same prompt. Nothing is timed, so the machine need not be quiet; 10 minutes, 2 GB.
Beyond the model's own context its rotary embedding is stretched (YaRN; Peng et al. 2023), for the dense row too.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from perplexity import text
from torch import Tensor

from armillary.kernels.cpu_step import DecoderStep
from armillary.kernels.seen import PAGE, Seen
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.load import load
from armillary.models.rope import attention_scaling, inverse_frequencies
from armillary.serve.config import EngineConfig
from armillary.serve.executors.native_forward import NativeForward

HERE = Path(__file__).resolve().parent
CHUNK = 256  # tokens a batch
BUDGETS = (256, 512, 1024, 2048)


def policy(budget: int, dense_layers: int = 0) -> Seen:
    """What queries read with `--kv-policy quest`."""
    return EngineConfig(kv_policy="quest", kv_budget=budget, kv_dense_layers=dense_layers, backend="native").kv.seen


CASES = [
    Seen(),
    *(policy(budget) for budget in BUDGETS),
    *(policy(1024, dense) for dense in (1, 2)),
    *(Seen(budget // PAGE, dense_layers=2) for budget in BUDGETS),  # the paper's
]


class Windows:
    """A model over a cache that holds one window, read as `seen` says."""

    def __init__(self, forward: NativeForward, context: int, rope: RopeConfig | None) -> None:
        model = forward.step.model
        if rope is not None:
            model = replace(model, ropes=((inverse_frequencies(rope, model.head_dim), attention_scaling(rope)),))
        self.model, self.cache, self.threads = model, forward.cache, forward.step.threads
        self.table = torch.arange(context // PAGE, dtype=torch.int32)

    def losses(self, window: list[int], first: int, last: int, seen: Seen) -> Tensor:
        """-ln p of the tokens after each of first..last-1, float64; the cache holds what is before `first`."""
        step = DecoderStep(self.model, self.cache, self.threads, seen=seen)
        found = []
        for begin in range(first, last, CHUNK):
            end = min(begin + CHUNK, last)
            tokens, positions = torch.tensor(window[begin:end]).int(), torch.arange(begin, end).int()
            rows = torch.arange(end - begin).int()
            logits = step.forward(tokens, positions, [begin], [end - begin], [self.table], rows, selects=[first])[0]
            targets = torch.tensor(window[begin + 1 : end + 1])
            chosen = logits[: len(targets)].gather(1, targets[:, None]).squeeze(1)
            found.append(logits[: len(targets)].logsumexp(-1).double() - chosen)
        return torch.cat(found)


def stretched(config: ModelConfig, context: int) -> RopeConfig | None:
    if context <= config.max_context:
        return None
    return replace(config.rope, kind="yarn", factor=context / config.max_context, original_context=config.max_context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="sotu,moby-dick")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--scored", type=int, default=1024, help="the last tokens of a window")
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--publish", action="store_true", help="write results/quest_quality.md")
    options = parser.parse_args()
    loaded = load("smollm2")
    context, prompt = options.context, options.context - options.scored
    forward = NativeForward(
        loaded.weights, num_blocks=context // PAGE, block_size=PAGE, threads=options.threads, seen=Seen(pages=1), keep=False
    )
    windows = Windows(forward, context, stretched(loaded.config, context))
    corpora = options.corpora.split(",")
    found: dict[str, dict[Seen, list[Tensor]]] = {corpus: {} for corpus in corpora}
    for corpus in corpora:
        tokens = text(corpus, loaded.tokenizer, context * options.windows)
        for start in range(0, len(tokens) - context + 1, context):
            window = tokens[start : start + context]
            windows.losses(window, 0, prompt, Seen())
            for case in CASES:
                losses = windows.losses(window, prompt, context, case)
                found[corpus].setdefault(case, []).append(losses)
                print(corpus, start, case, f"{math.exp(losses.mean()):.3f}", flush=True)
    page = document(options, {name: {case: torch.stack(values) for case, values in cases.items()} for name, cases in found.items()})
    print(page)
    if options.publish:
        (HERE / "results" / "quest_quality.md").write_text(page)


def cells(losses: Tensor, dense: Tensor) -> str:
    """Perplexity and its excess over dense with the standard error of paired windows."""
    over = (losses - dense).mean(1)
    ratio = math.exp(over.mean())
    error = f" ± {100 * ratio * float(over.std()) / math.sqrt(len(over)):.2f}" if len(over) > 1 else ""
    return f"{math.exp(losses.mean()):.2f} | {100 * (ratio - 1):+.2f} %{error}"


def document(options: argparse.Namespace, found: dict[str, dict[Seen, Tensor]]) -> str:
    rows = []
    for case in CASES:
        name = f"{case.pages * PAGE:,} | {case.first_pages} + {case.last_pages} | {case.dense_layers}" if case.pages else "all | |"
        rows.append(f"| {name} | {' | '.join(cells(losses[case], losses[CASES[0]]) for losses in found.values())} |")
    return "\n".join(
        [
            "# Quest's perplexity by its budget",
            "",
            f"SmolLM2-135M in fp32, {options.windows} windows of {options.context:,} tokens of each text: {options.context - options.scored:,}"
            f" computed with everything, the {options.scored:,} after them scored as they select their pages. ± is one standard error of the"
            f" paired differences, windows being the samples. `python bench/quest_quality.py --context {options.context}"
            f" --scored {options.scored} --windows {options.windows}`.",
            "",
            f"| tokens read | pages always read, first + last | dense layers | {' | '.join(f'{name} | over dense' for name in found)} |",
            f"|---:|---:|---:|{'---:|---:|' * len(found)}",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
