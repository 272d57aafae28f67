"""StreamingLLM's figure on SmolLM2: perplexity of one long stream by the number of sinks, served by `--kv-policy streaming`.

    python bench/streaming.py [--tokens 16384] [--window 1024] [--publish]

Nothing is timed, so the machine need not be quiet. Sinks and window together are `--window` tokens, as in the paper (table 1,
figure 10); what is scored are the tokens after the first window, which dense attention could no longer hold in that memory.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from perplexity import text

from armillary.models.load import load
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

HERE = Path(__file__).resolve().parent
SINKS = (0, 1, 2, 4, 8)


def losses(loaded: object, tokens: list[int], **options: object) -> list[float]:
    """-ln p of every token but the first."""
    llm = LLM(loaded, prefix_cache="off", backend="native", **options)  # type: ignore[arg-type]
    (answer,) = llm.generate([tokens], SamplingParams(max_tokens=0, prompt_logprobs=0))
    return [-score.logprob for score in answer.request.prompt_logprobs if score is not None and score.logprob is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=1024, help="sinks and window together")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--publish", action="store_true", help="write results/streaming.md")
    options = parser.parse_args()
    loaded = load("smollm2")
    tokens = text(options.corpus, loaded.tokenizer, options.tokens)[: options.tokens]
    rows = []

    def add(name: str, found: list[float]) -> None:
        late = found[options.window - 1 :]
        rows.append(f"| {name} | {math.exp(sum(late) / len(late)):,.2f} | {math.exp(sum(late[-2048:]) / len(late[-2048:])):,.2f} |")
        print(rows[-1], flush=True)

    for sinks in SINKS:
        kept = {"kv_policy": "streaming", "kv_sinks": sinks, "kv_window": options.window - sinks}
        add(f"{sinks} + {options.window - sinks}", losses(loaded, tokens, threads=options.threads, **kept))
    context = loaded.config.max_context
    add(f"dense, the first {context:,} tokens", losses(loaded, tokens[:context], threads=options.threads, kv_blocks=context // 16 + 1))
    page = [
        "# A stream's perplexity by its sinks",
        "",
        f"SmolLM2-135M in fp32, {len(tokens):,} tokens of {options.corpus} as one sequence (the model's context is {context:,}),"
        f" `--kv-policy streaming`. `python bench/streaming.py --tokens {options.tokens} --window {options.window}`.",
        "",
        f"| sinks + window | perplexity after token {options.window:,} | of the last 2,048 |",
        "|---|---:|---:|",
        *rows,
        "",
    ]
    print("\n".join(page))
    if options.publish:
        (HERE / "results" / "streaming.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
