"""One run from its first step to its folder: evaluated before and after, told as it goes, stopped by Ctrl-C, its model saved."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from armillary.core.config import Resolved
from armillary.core.run_folder import new_run_folder
from armillary.core.trace import Trace
from armillary.models.hf import save_hf
from armillary.train.build import Run, build
from armillary.train.config import TrainConfig
from armillary.train.evaluate import Evaluation
from armillary.train.meter import Meter, Reading
from armillary.train.progress import PlainView, View, evaluation_json, memory_bytes
from armillary.train.trainer import Checkpoints, Hooks, StepResult

CONFIG: Final = "config.toml"
METRICS: Final = "metrics.jsonl"
TRACE: Final = "trace.json"
MODEL: Final = "model"


@dataclass(slots=True)
class Session:
    """A run with its folder: config.toml (with where each value came from), metrics.jsonl (a line a step), trace.json and model/."""

    run: Run
    folder: Path
    view: View
    meter: Meter
    trace: Trace
    readings: list[Reading] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    interrupted: bool = False

    def go(self) -> None:
        """Train to the end, or until the first signal; then save the model. A second signal is KeyboardInterrupt."""
        trainer, hooks = self.run.trainer, self.run.trainer.hooks
        with (self.folder / METRICS).open("a", encoding="utf-8") as metrics, stop_requested(self._told) as stop:

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
            if trainer.progress.step == 0:
                on_evaluation(0)
            trainer.run()
            self.interrupted = trainer.progress.step < trainer.schedule.steps and stop()
            if self.readings and (not self.evaluations or self.evaluations[-1][0] != trainer.progress.step) and not self.interrupted:
                on_evaluation(trainer.progress.step)
        if self.run.parallel.rank == 0:
            self.trace.save(self.folder / TRACE)
            save_hf(self.run.decoder, self.folder / MODEL, self.run.tokenizer, overwrite=True)

    def _told(self) -> None:
        self.view.note("stopping after this step, then saving; Ctrl-C again stops at once")


def open_session(
    resolved: Resolved[TrainConfig],
    runs: Path,
    name: str = "train",
    *,
    peak: float | None = None,
    checkpoints: Checkpoints | None = None,
) -> Session:
    """Build the run, then make its folder under `runs` with its configuration. `peak`: the machine's FLOP/s, for MFU."""
    config = resolved.value
    trace = Trace("train", meta={"model": config.model or "from scratch"})
    hooks = Hooks(evaluate_every=config.evaluate.every, save_every=config.checkpoint.every)
    run = build(config, checkpoints=checkpoints, hooks=hooks, trace=trace)
    folder = new_run_folder(runs, datetime.now(UTC), name)
    resolved.save(folder / CONFIG)
    return Session(run, folder, PlainView(), Meter(run.decoder.config, config.steps, peak), trace)


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
