"""Hugging Face transformers training in fp32: its model in the plain PyTorch loop (eager, compiled whole), or in its own Trainer."""

from __future__ import annotations

import sys
import tempfile
import time

import torch
import transformers
from peers.training import Recipe, Steps, measure, report


def main(path: str, variant: str) -> None:
    recipe = Recipe.load(path)
    torch.set_num_threads(recipe.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.hf_folder, dtype=torch.float32).train()
    steps = trainer(model, recipe) if variant == "Trainer" else loop(model, recipe, variant == "compiled")
    report("transformers", transformers.__version__, variant, recipe, steps)


def loop(model: torch.nn.Module, recipe: Recipe, compiled: bool) -> Steps:
    """The loop of PyTorch's tutorials."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    run = torch.compile(model) if compiled else model

    def step(index: int) -> float:
        tokens = torch.tensor(recipe.batch(index))
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        return loss.item()

    return measure(step, recipe)


class Watch(transformers.TrainerCallback):
    """When each step ended; ends the training when the recipe has had its seconds."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.ends = recipe, [time.perf_counter()]
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, **_):
        self.ends.append(time.perf_counter())
        timed = len(self.ends) - 2
        control.should_training_stop |= timed >= 3 and self.ends[-1] - self.ends[1] > self.recipe.seconds

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [float(logs["loss"])] if logs and "loss" in logs else []


def trainer(model: torch.nn.Module, recipe: Recipe) -> Steps:
    """`transformers.Trainer` with its defaults, but for what the recipe says and what writes files."""
    rows = [{"input_ids": list(row), "labels": list(row)} for index in range(recipe.steps + 1) for row in recipe.batch(index)]
    watch = Watch(recipe)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=len(recipe.batch(0)),
            max_steps=recipe.steps + 1,
            learning_rate=recipe.lr,
            lr_scheduler_type="constant",
            adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1],
            adam_epsilon=recipe.eps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        made = transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=transformers.default_data_collator, callbacks=[watch]
        )
        made.train()
    seconds = [end - begin for begin, end in zip(watch.ends, watch.ends[1:], strict=False)]
    return Steps(seconds[0], tuple(seconds[1:]), tuple(watch.losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
