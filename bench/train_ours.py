"""Armillary's own side of the training bench: the Trainer, in this process, on the recipe's batches; or the whole door with its data pipeline."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import TEXT
from peers.training import Recipe, Steps, measure, report

import armillary
from armillary.core.allocator import keep_memory
from armillary.core.config import resolve
from armillary.data.prepare import prepare_text
from armillary.models.hf import load_hf
from armillary.models.load import load
from armillary.train.build import build
from armillary.train.config import TrainConfig
from armillary.train.microbatch import IGNORED, MicroBatch, from_rows
from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.apply import Parallel, Single
from armillary.train.parallel.launch import spawn
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.schedules import Schedule
from armillary.train.trainer import Hooks, Trainer


class RecipeBatches:
    """The recipe's batches, one micro-batch each, for ever; of `world` ranks, this one's share of the rows."""

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.index, self.rank, self.world = recipe, 0, rank, world

    def __iter__(self) -> RecipeBatches:
        return self

    def __next__(self) -> list[MicroBatch]:
        tokens = torch.tensor(self.recipe.batch(self.index)).chunk(self.world)[self.rank]
        self.index += 1
        targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)), dim=1)
        return [from_rows(tokens, targets, torch.arange(tokens.shape[1]).expand_as(tokens))]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Any) -> None:
        self.index = state["index"]


def trained(recipe: Recipe, parallel: Parallel, batches: RecipeBatches) -> Steps:
    """The Trainer on the given batches."""

    def optimizer(named: Any) -> AdamW:
        return AdamW([weight for _, weight in named], recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)

    trainer = Trainer(parallel, optimizer, Schedule("constant", 1 << 30), batches, clip_norm=recipe.clip)
    return measure(lambda _: trainer.step(next(batches)).loss, recipe)


def one_process(recipe: Recipe) -> tuple[Steps, dict[str, float]]:
    keep_memory()  # as `build` does
    return trained(recipe, Single(load_hf(recipe.hf_folder).train()), RecipeBatches(recipe)), {}


def two_processes(recipe: Recipe) -> tuple[Steps, dict[str, float]]:
    """Two ranks, half of the threads and half of the rows each, parameters sharded by FSDP2 (ZeRO-3)."""
    # Every rank must make the same number of steps, so time does not end them.
    told = replace(recipe, steps=min(recipe.steps, 5), seconds=math.inf)
    return spawn(2, _rank, told, timeout=600.0)[0], {}


def _rank(rank: int, recipe: Recipe) -> Steps:
    torch.set_num_threads(max(1, recipe.threads // 2))
    keep_memory()
    parallel = parallelize(load_hf(recipe.hf_folder).train(), Layout(dp_shard=2))
    return trained(recipe, parallel, RecipeBatches(recipe, rank, 2))


def pipeline(recipe: Recipe) -> tuple[Steps, dict[str, float]]:
    """`armillary train` without its terminal: documents from token shards, packed with document masks. Tells how long it waited for them."""
    tokenizer = load(recipe.hf_folder).tokenizer
    rows, length = len(recipe.batch(0)), len(recipe.batch(0)[0])
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(TEXT.read_text() * 8)
        prepare_text([text], Path(folder) / "data", tokenizer=tokenizer, validation=0.0, name="bench")
        flags = {
            "model": recipe.hf_folder,
            "data.folder": str(Path(folder) / "data"),
            "batch": {"rows": rows, "micro_rows": rows, "length": length},
            "optimizer": {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay},
            "schedule": {"name": "constant", "warmup": 0},
            "steps": recipe.steps + 1,
            "threads": recipe.threads,
        }
        found: list[Any] = []
        hooks = Hooks(on_step=found.append, stop=lambda: len(found) > 3 and sum(r.duration for r in found[1:]) > recipe.seconds * 1e9)
        build(resolve(TrainConfig, environment={}, flags=flags).value, hooks=hooks).trainer.run()
    timed = found[1:]
    stall = sum(result.waited for result in timed) / sum(result.duration for result in timed)
    steps = Steps(found[0].duration / 1e9, tuple(r.duration / 1e9 for r in timed), tuple(r.loss for r in found))
    return steps, {"stall": stall}


VARIANTS = {"one process": one_process, "whole door": pipeline, "two processes, FSDP2": two_processes}


def main(path: str, variant: str) -> None:
    recipe = Recipe.load(path)
    torch.set_num_threads(recipe.threads)
    steps, more = VARIANTS[variant](recipe)
    report("armillary", armillary.__version__, variant, recipe, steps, **more)


if __name__ == "__main__":
    main(*sys.argv[1:])
