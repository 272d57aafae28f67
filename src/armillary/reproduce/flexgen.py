"""FlexGen (Sheng et al., ICML 2023): a model larger than the accelerator, by its authors' cost model and on three tiers of this machine."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import torch

from armillary.core.trace import Trace
from armillary.core.units import GIB
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.reproduce.registry import Experiment, Result, Row, exactly
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.offload_forward import OffloadForward
from armillary.serve.offload.cost import T4, Work, peak_rows, price
from armillary.serve.offload.layout import Bounds
from armillary.serve.offload.placement import best_fractions
from armillary.serve.offload.policy import EVERYTHING_HERE, OffloadPolicy, Split

OPT_30B: Final = Work(layers=48, hidden=7168, inner=28672, heads=56, prompt=512, answer=32, block=144, batch=48)
POLICY: Final = Split(0.2, 0.8), Split(0.0, 1.0), Split(0.0, 1.0)  # of the paper's run on a T4: 20 80 0 100 0 100
_SHAPE: Final = ModelConfig("llama", 512, 256, 768, 6, 4, 2, 64, 256)
_SEQUENCES, _PROMPT, _ANSWER, _BLOCK = 2, 32, 8, 16  # of a batch; tokens; tokens; tokens a KV block
_AWAY: Final = (Split(0.0, 0.5, 0.5), Split(0.0, 0.5, 0.5), Split(0.0, 0.5, 0.5))


def enumerated() -> float:
    """Tokens a second of the best policy on a grid of 20 % steps, of those that fit."""
    steps = np.linspace(0.0, 1.0, 6)
    splits = [Split(a, b, max(0.0, 1 - a - b)) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9]
    best = 0.0
    for weights, cache, hidden in itertools.product(splits, splits, [one for one in splits if one.disk < 1e-9]):
        at = np.array([1.0, *weights.shares, *cache.shares, *hidden.shares])
        if all(used @ at <= limit for used, limit in peak_rows(OPT_30B, T4).values()):
            best = max(best, price(OPT_30B, weights, cache, hidden).throughput)
    return best


def generate(policy: OffloadPolicy, folder: Path, trace: Trace | None = None) -> tuple[torch.Tensor, OffloadForward]:
    """A random model answers `_SEQUENCES` prompts a batch, greedily; every iteration's logits, and who computed them."""
    torch.manual_seed(0)
    count = _SEQUENCES * policy.batches
    blocks = -(-(_PROMPT + _ANSWER) // _BLOCK)
    bounds = Bounds(blocks * count, _BLOCK, count, count * _PROMPT, _PROMPT + _ANSWER)
    forward = OffloadForward(Decoder(_SHAPE), policy, bounds, folder=folder, trace=trace)
    tables = [range(blocks * i, blocks * (i + 1)) for i in range(count)]
    tokens = torch.randint(_SHAPE.vocab_size, (count * _PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    start, new, found = 0, _PROMPT, []
    with torch.inference_mode():
        for _ in range(_ANSWER):
            positions = [*range(start, start + new)] * count
            rows = range(new - 1, len(tokens), new)
            logits = forward.logits(FlatBatch(tokens, positions, [Span(start, new, table) for table in tables], rows)).values
            found.append(logits.clone())
            tokens, start, new = logits.argmax(-1).tolist(), start + new, 1
    return torch.stack(found), forward


def weights_loaded(forward: OffloadForward) -> int:
    """Bytes, without the first unit's for an iteration that never comes."""
    forward.close()
    return sum(size for (what, _, _), size in forward.moved.items() if what == "weights") - forward.layout.unit_bytes[0]


def run() -> Result:
    paper = price(OPT_30B, *POLICY)
    solved = best_fractions(OPT_30B).price.throughput
    trace = Trace("offload")
    with tempfile.TemporaryDirectory() as folder:
        here, _ = generate(OffloadPolicy(batches=4), Path(folder))
        away, streamed = generate(OffloadPolicy(*_AWAY, batches=4), Path(folder), trace)
        _, single = generate(OffloadPolicy(_AWAY[0], EVERYTHING_HERE, EVERYTHING_HERE), Path(folder))
    loaded = weights_loaded(streamed)
    closed = _ANSWER * sum(streamed.layout.unit_bytes)
    per_token = [weights_loaded(single) / _SEQUENCES, loaded / (4 * _SEQUENCES)]
    model = "FlexGen's experimental/cost_model.py with its constants for a T4"
    rows = (
        exactly(
            "weights of OPT-30B in fp16",
            "GB (2^30)",
            55.125,
            "closed form: 48 (8 h1^2 + 4 h1 h2)",
            OPT_30B.layers * OPT_30B.layer_bytes / GIB,
        ),
        Row("prefill of a layer, 144 prompts of 512", "s", 4.38897, model, paper.prefill, 4.388965, 4.388975, "its last digit"),
        Row("a token of a layer, 144 sequences", "s", 0.292402, model, paper.generation, 0.2924015, 0.2924025, "its last digit"),
        Row("32 tokens of 144 sequences", "s", 645.76, model, paper.total, 645.755, 645.765, "its last digit"),
        Row(
            "throughput of OPT-30B on a T4, predicted",
            "tokens/s",
            7.32,
            "table 2: measured on a T4 with 16 GB",
            paper.throughput,
            7.32 * 0.95,
            7.32 * 1.05,
            "5 %: a fitted model beside a measurement",
        ),
        Row(
            "throughput of the linear program's placement over the best of a grid",
            "x",
            1.0,
            "section 4.3: the program's optimum is the model's",
            solved / enumerated(),
            1.0 - 1e-6,
            1.5,
            "1 or more: the grid has steps of 20 %",
        ),
        exactly(
            "largest difference of a logit: three tiers against all in memory", "", 0, "by construction", float((away - here).abs().max())
        ),
        exactly("weights loaded, counted over the closed form", "x", 1, "closed form: tokens x streamed bytes", loaded / closed),
        exactly(
            "weights loaded a token, one batch over four",
            "x",
            4,
            "section 4.1: a load serves every batch of the block",
            per_token[0] / per_token[1],
        ),
    )
    return Result(rows, (("a random model here, half of it on disk: four batches pass each layer while the next is loaded", trace),))


EXPERIMENT: Final = Experiment(
    name="flexgen",
    title="FlexGen: high-throughput generation with a single GPU",
    paper="Sheng et al., ICML 2023",
    claim="OPT-175B on one 16 GB T4 at 1 token/s with an effective batch of 144; OPT-30B at 7.32 tokens/s",
    setup="its cost model for OPT-30B (512 + 32 tokens, blocks of 144 in batches of 48, 20 % of the weights on the GPU); then a random model of "
    f"{_SHAPE.parameters() / 1e6:.1f} M parameters here, half of its weights, cache and activations in RAM and half on disk, none in the arena "
    "that stands for the GPU",
    takes="3 seconds",
    run=run,
)
