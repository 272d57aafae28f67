"""One run from its first step to its folder: evaluated before and after, told as it goes, stopped by Ctrl-C, its model saved."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from armillary.core.config import Resolved
from armillary.core.errors import NotFoundError
from armillary.core.run_folder import new_run_folder
from armillary.core.trace import Trace
from armillary.models.hf import save_hf
from armillary.train.build import Run, build
from armillary.train.checkpoint import FolderCheckpoints, newest
from armillary.train.config import TrainConfig
from armillary.train.evaluate import Evaluation
from armillary.train.meter import Meter, Reading
from armillary.train.parallel.agreement import from_rank_0, gathered
from armillary.train.progress import PlainView, View, evaluation_json, memory_bytes
from armillary.train.trainer import Hooks, StepResult

CONFIG: Final = "config.toml"
DATA: Final = "data.json"
METRICS: Final = "metrics.jsonl"
TRACE: Final = "trace.json"
MODEL: Final = "model"
CHECKPOINTS: Final = "checkpoints"


@dataclass(slots=True)
class Session:
    """A run with its folder: config.toml (with where each value came from), data.json (what was read, and a mixture's counts),
    metrics.jsonl (a line a step), checkpoints/, trace.json, model/."""

    run: Run
    folder: Path
    view: View
    meter: Meter
    trace: Trace
    readings: list[Reading] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def evaluates_first(self) -> bool:
        """Whether held-out text is scored before the next step. Saved before evaluated: one that a crash cut short is made up for."""
        step, every = self.run.trainer.progress.step, self.run.trainer.hooks.evaluate_every
        due = step == 0 or (every and step % every == 0)
        return bool(due) and self.run.validation is not None and step not in (at for at, _ in self.evaluations)

    def go(self) -> None:
        """Train to the end, or until the first signal; then save the model. A second signal is KeyboardInterrupt."""
        trainer, hooks = self.run.trainer, self.run.trainer.hooks
        told = self.folder / METRICS if self.run.parallel.rank == 0 else Path(os.devnull)
        with told.open("a", encoding="utf-8") as metrics, stop_requested(self._told) as stop:

            def write(value: dict[str, Any]) -> None:
                metrics.write(json.dumps(value) + "\n")
                metrics.flush()

            def on_step(result: StepResult) -> None:
                reading = self.meter.read(result, memory_bytes())
                self.readings.append(reading)
                write(reading.json())
                self.view.step(reading)

            def on_evaluation(step: int) -> None:
                result = self.run.evaluate()
                if result is not None:
                    self.evaluations.append((step, result))
                    write(evaluation_json(step, result))
                    self.view.evaluation(step, result)

            hooks.on_step, hooks.evaluate, hooks.stop = on_step, on_evaluation, stop
            begin = trainer.progress.step
            if self.evaluates_first:
                on_evaluation(begin)
            trainer.run()
            self.interrupted = self.run.parallel.any_rank(stop()) and trainer.progress.step < trainer.schedule.steps
            if self.readings and (not self.evaluations or self.evaluations[-1][0] != trainer.progress.step) and not self.interrupted:
                on_evaluation(trainer.progress.step)
        model = self.run.parallel.whole_model()
        if model is not None:
            self.trace.save(self.folder / TRACE)
            save_hf(model, self.folder / MODEL, self.run.tokenizer, overwrite=True)

    def _told(self) -> None:
        self.view.note("stopping after this step, then saving; Ctrl-C again stops at once")


def open_session(
    resolved: Resolved[TrainConfig],
    runs: Path,
    name: str = "train",
    *,
    peak: float | None = None,
    resume: Path | None = None,
) -> Session:
    """Build the run, then make its folder under `runs` with its configuration. `peak`: this rank's FLOP/s, for MFU.

    resume: go on in this run's folder instead, from its newest checkpoint (from the start when it has none).
    """
    config = resolved.value
    trace = Trace("train", meta={"model": config.model or "from scratch"})
    hooks = Hooks(evaluate_every=config.evaluate.every, save_every=config.checkpoint.every)
    run = build(config, hooks=hooks, trace=trace)
    first = run.parallel.rank == 0
    folder = from_rank_0(lambda: resume or new_run_folder(runs, datetime.now(UTC), name))
    if peak is not None:
        peak = sum(gathered(peak))
    checkpoints = FolderCheckpoints(folder / CHECKPOINTS, config.checkpoint.keep)
    run.trainer.checkpoints = checkpoints
    if resume is None:
        if first:
            resolved.save(folder / CONFIG)
            (folder / DATA).write_text(json.dumps(run.sources(), indent=2) + "\n", encoding="utf-8")
        return Session(run, folder, PlainView(), Meter(run.decoder.config, config.steps, peak, run.plan), trace)
    run.trainer.restore()
    if first and "flag" in resolved.provenance.values():
        resolved.save(folder / CONFIG)
    meter = Meter(run.decoder.config, config.steps, peak, run.plan, tokens=run.trainer.progress.tokens)
    readings, evaluations = from_rank_0(lambda: _keep_metrics(folder / METRICS, run.trainer.progress.step))
    return Session(run, folder, PlainView(), meter, trace, readings, evaluations)


def find_run(path: Path) -> Path:
    """A run's folder: `path` itself, or of a folder of runs the newest that has a checkpoint. Raises NotFoundError."""
    if (path / CONFIG).is_file():
        return path
    runs = sorted(run for run in path.glob("*") if (run / CONFIG).is_file() and newest(run / CHECKPOINTS) is not None)
    if not runs:
        raise NotFoundError(
            f"{path} is no run's folder, nor does it hold a run with a checkpoint", "give a folder that armillary train made"
        )
    return runs[-1]


def _keep_metrics(path: Path, step: int) -> tuple[list[Reading], list[tuple[int, Evaluation]]]:
    """What a run had told until `step`; what came after it, and is made again, is taken out of the file."""
    readings: list[Reading] = []
    evaluations: list[tuple[int, Evaluation]] = []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
            if value["step"] > step:
                continue
            if value.pop("event") == "step":
                readings.append(Reading.from_json(value))
            else:
                evaluations.append((value["step"], Evaluation(math.nan if value["loss"] is None else value["loss"], value["tokens"])))
        except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a crash, or not what a run writes
            continue
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return readings, evaluations


@contextmanager
def stop_requested(told: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is remembered (and `told` once) instead of raised; the second raises KeyboardInterrupt.

    Yields whether one came. Off the main thread, signals stay as they are.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def handle(number: int, frame: object) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        told()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
