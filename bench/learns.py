"""Does it learn? Two claims, each with its curve in docs/.

    python bench/learns.py scratch --publish     # a 10M model on 200 years of State of the Union addresses, beside a hand-written loop
    python bench/learns.py finetune --publish    # SmolLM2 on Shakespeare: perplexity of held-out plays, before and after

`scratch` gives both sides the same initial weights and the same batches, and asks for a final validation loss within 1 % of each other.
`--tiny` does either in seconds, to see that it works. No number here is a timing, so the machine need not be quiet.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peers import plain_llama

from armillary.core.config import resolve
from armillary.core.paths import cache_dir
from armillary.data.batches import BatchStream
from armillary.data.corpora import corpus_files
from armillary.data.prepare import prepare_text
from armillary.models.load import load
from armillary.models.weights import hf_parameters
from armillary.train.build import Run, build
from armillary.train.config import TrainConfig

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "docs" / "pictures"
WITHIN = 0.01

SCRATCH: dict[str, Any] = {
    "architecture": {"layers": 5, "hidden": 384, "heads": 6},
    "batch": {"rows": 8, "micro_rows": 4, "length": 256},
    "optimizer": {"lr": 1.5e-3},
    "schedule": {"warmup": 20},
    "evaluate": {"batches": 8, "every": 25},
    "steps": 400,
}
FINETUNE: dict[str, Any] = {
    "model": "smollm2",
    "batch": {"rows": 4, "micro_rows": 4, "length": 256},
    "optimizer": {"lr": 3e-5, "weight_decay": 0.0},
    "schedule": {"warmup": 5, "name": "linear"},
    "evaluate": {"batches": 16, "every": 20},
    "steps": 80,
}
TINY: dict[str, dict[str, Any]] = {
    "scratch": {
        "architecture": {"layers": 2, "hidden": 64, "heads": 2},
        "batch": {"rows": 4, "micro_rows": 2, "length": 64},
        "schedule": {"warmup": 2},
        "evaluate": {"batches": 2, "every": 10},
        "steps": 30,
    },
    "finetune": {
        "batch": {"rows": 2, "micro_rows": 2, "length": 64},
        "schedule": {"warmup": 1},
        "evaluate": {"batches": 2, "every": 4},
        "steps": 8,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scratch", "finetune"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--publish", action="store_true", help="write bench/results/learns_*.json and docs/pictures/learns_*.png")
    options = parser.parse_args()
    recipe = (SCRATCH if options.what == "scratch" else FINETUNE) | (TINY[options.what] if options.tiny else {})
    if options.steps:
        recipe |= {"steps": options.steps}
    result = scratch(recipe) if options.what == "scratch" else finetune(recipe)
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=2))
    if options.publish and not options.tiny:
        (HERE / "results" / f"learns_{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")
        picture(options.what, result, PICTURES / f"learns_{options.what}.png")
    return 0 if result["holds"] else 1


def scratch(recipe: dict[str, Any]) -> dict[str, Any]:
    """Ours and the hand-written loop from the same weights over the same batches."""
    folder = prepared("sotu", vocabulary=4096)
    run = build(resolve(TrainConfig, environment={}, flags={**recipe, "data.folder": str(folder)}).value)
    config, shape = run.config, run.decoder.config
    peer = plain_llama.Llama(shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.num_heads)
    ours = {name.removeprefix("model."): weight.detach().clone() for name, weight in hf_parameters(run.decoder).items()}
    peer.load_state_dict(ours)

    curves: dict[str, Any] = {"armillary": curve(run)}
    batch = config.batch
    stream = BatchStream(run.train, rows=batch.rows, length=batch.length, seed=config.data.seed)
    held_out = BatchStream(run.validation, rows=batch.micro_rows, length=batch.length, seed=0, epochs=1)
    rows = lambda b: (b.tokens, b.targets, b.positions, b.documents)  # noqa: E731
    validation = [rows(b) for _, b in zip(range(config.evaluate.batches), held_out, strict=False)]
    told, plain = teller("plain torch", config.steps)
    options = config.optimizer.options()
    plain_llama.train(
        peer,
        map(rows, stream),
        validation,
        steps=config.steps,
        lr=options["lr"],
        warmup=config.schedule.warmup,
        weight_decay=options["weight_decay"],
        every=config.evaluate.every,
        told=told,
    )
    curves["plain torch"] = plain
    final = {side: found["validation"][-1][1] for side, found in curves.items()}
    ratio = final["armillary"] / final["plain torch"]
    return {
        "parameters": shape.parameters(),
        "tokens": config.steps * run.tokens_per_step,
        "validation_loss": final,
        "ratio": ratio,
        "largest_difference_of_training_loss": max(
            abs(a[1] - b[1]) for a, b in zip(curves["armillary"]["training"], curves["plain torch"]["training"], strict=True)
        ),
        "holds": abs(ratio - 1) <= WITHIN and final["armillary"] < curves["armillary"]["validation"][0][1] - 0.5,
        "curves": curves,
    }


def finetune(recipe: dict[str, Any]) -> dict[str, Any]:
    """Held-out perplexity of SmolLM2 before and after."""
    folder = prepared("shakespeare", model="smollm2")
    run = build(resolve(TrainConfig, environment={}, flags={**recipe, "data.folder": str(folder)}).value)
    curves = {"armillary": curve(run)}
    before, after = (torch.tensor(curves["armillary"]["validation"][index][1]).exp().item() for index in (0, -1))
    return {
        "tokens": run.config.steps * run.tokens_per_step,
        "perplexity_before": before,
        "perplexity_after": after,
        "holds": after < before,
        "curves": curves,
    }


def curve(run: Run) -> dict[str, Any]:
    """Train, and keep the losses."""
    told, found = teller("armillary", run.config.steps)
    hooks = run.trainer.hooks
    every, steps = run.config.evaluate.every, run.config.steps

    def on_step(result: Any) -> None:
        due = result.step % every == 0 or result.step == steps
        told(result.step, result.loss, run.evaluate().loss if due else None)

    hooks.on_step = on_step
    told(0, float("nan"), run.evaluate().loss)
    run.trainer.run()
    return found


def teller(side: str, steps: int) -> tuple[Any, dict[str, Any]]:
    """A callback that prints and keeps (step, loss) pairs."""
    found: dict[str, Any] = {"training": [], "validation": []}

    def told(step: int, training: float, validation: float | None) -> None:
        if step:
            found["training"].append((step, training))
        if validation is not None:
            found["validation"].append((step, validation))
            print(f"{side}: step {step}/{steps}, training {training:.4f}, validation {validation:.4f}", file=sys.stderr, flush=True)

    return told, found


def prepared(corpus: str, vocabulary: int | None = None, model: str | None = None) -> Path:
    """The corpus as token shards, made at first use."""
    folder = cache_dir() / "data" / f"{corpus}-{vocabulary or model}"
    if not folder.exists():
        tokenizer = None if model is None else load(model).tokenizer
        prepare_text(corpus_files(corpus), folder, tokenizer=tokenizer, vocabulary=vocabulary, name=corpus)
    return folder


def picture(what: str, result: dict[str, Any], path: Path) -> None:
    """Both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    styles = {"armillary": ("#2f7f93", "-", 2.4), "plain torch": ("#e8963a", "--", 1.4)}
    for side, found in result["curves"].items():
        colour, dash, width = styles[side]
        axes.plot(*zip(*found["training"], strict=True), color=colour, alpha=0.25, linewidth=1)
        axes.plot(*zip(*found["validation"], strict=True), dash, color=colour, linewidth=width, marker="o", markersize=3, label=side)
    if what == "scratch":
        title = f"{result['parameters'] / 1e6:.1f}M parameters, State of the Union: the same weights and batches"
    else:
        title = f"SmolLM2-135M on Shakespeare: held-out perplexity {result['perplexity_before']:.1f} to {result['perplexity_after']:.1f}"
    axes.set(xlabel="step", ylabel="loss, nats a token (thin: training; dots: held out)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
