"""The training loop. A step: zero the gradients, add up those of every micro-batch, reduce, unscale, clip, update; saved before evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.optim import Optimizer

from armillary.core.clock import Clock, RealClock
from armillary.core.trace import Trace
from armillary.train import clip
from armillary.train.divergence import DivergenceError, diagnose
from armillary.train.microbatch import MicroBatch, scored
from armillary.train.parallel.apply import OptimizerFactory, Parallel
from armillary.train.precision import SMALLEST_SCALE, LossScaler, unscale_
from armillary.train.schedules import Schedule


class Stateful(Protocol):
    """What a checkpoint holds, piece by piece (as torch.distributed.checkpoint's)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Batches(Stateful, Protocol):
    """This rank's share of one global batch after another, as micro-batches. Ends (StopIteration) on all ranks at once.

    `state_dict` says where the next batch begins, whatever has been fetched ahead.
    """

    def __iter__(self) -> Iterator[Sequence[MicroBatch]]: ...

    def __next__(self) -> Sequence[MicroBatch]: ...


class Checkpoints(Protocol):
    """Where training state goes. `state` maps a name to each piece: parallel (the weights), optimizer, progress, scaler, batches, rng."""

    def save(self, step: int, state: Mapping[str, Stateful]) -> None:
        """Keep the state after `step` steps. May write in the background; a failure is raised here at the next call or by `wait`."""
        ...

    def restore(self, state: Mapping[str, Stateful]) -> int | None:
        """Load the newest whole checkpoint into the pieces and return its step; None when there is none."""
        ...

    def failed(self) -> bool:
        """Whether what was being written in the background is known not to have been: `wait` raises why. Asked after every step."""
        ...

    def leaving(self) -> None:
        """The run ends by an error: what is being written is finished, but other ranks, which may be dead, are not waited for any longer."""
        ...

    def wait(self) -> None:
        """Return when everything that was saved is on disk."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. Counts are global (all ranks); `loss` is nats a scored token, before the update."""

    step: int  # counts from 1: how many steps have been made
    loss: float
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int
    scored: int
    attended: int  # sum over documents of length squared: what attention's work grows with
    duration: int  # ns, the wait for data included
    waited: int  # ns of it spent waiting for data
    loss_scale: float = 1.0
    skipped: bool = False  # fp16 overflowed: nothing was updated


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.tokens = int(state["step"]), int(state["tokens"])


class RandomState:
    """torch's global generator on the CPU, which nothing else in a run draws from but dropout-like layers."""

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])


@dataclass(slots=True)
class Hooks:
    """What happens around the steps; each may be left out. `stop` is asked after every step, on all ranks alike."""

    on_step: Callable[[StepResult], None] | None = None
    evaluate: Callable[[int], None] | None = None
    evaluate_every: int = 0
    save_every: int = 0
    stop: Callable[[], bool] = field(default=lambda: False)


class Trainer:
    """Trains `parallel.model` on `batches` with a loss that does not depend on how a batch is cut or where its parts run."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        batches: Batches,
        *,
        clip_norm: float | None = 1.0,
        scaler: LossScaler | None = None,
        checkpoints: Checkpoints | None = None,
        hooks: Hooks | None = None,
        trace: Trace | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.parallel, self.schedule, self.batches = parallel, schedule, batches
        self.optimizer: Optimizer = parallel.make_optimizer(optimizer)
        for group in self.optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        self.clip_norm, self.scaler = clip_norm, scaler
        self.checkpoints, self.hooks = checkpoints, hooks or Hooks()
        self.trace = Trace("train") if trace is None else trace  # an empty trace is falsy
        self.clock = clock or RealClock()
        self.progress = Progress()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, as this rank holds it."""
        return [parameter for _, parameter in self.parallel.named_parameters() if parameter.requires_grad]

    def run(self) -> None:
        """Steps until the schedule's end, the data's, or `hooks.stop`; then the last state is saved. After an error it is not: it may be the cause."""
        try:
            self._steps()
        except BaseException:
            if self.checkpoints is not None:
                self.checkpoints.leaving()
            raise

    def _steps(self) -> None:
        hooks, saved = self.hooks, self.progress.step
        while self.progress.step < self.schedule.steps:
            begun = self.clock.now()
            batch = next(self.batches, None)
            if batch is None:
                break
            result = self.step(batch, begun)
            if hooks.on_step is not None:
                hooks.on_step(result)
            # A full disk ends the run now, not when the next checkpoint is due: until then nothing that it computes is safe.
            failed = self.checkpoints is not None and self.checkpoints.failed()
            step, stopping = result.step, self.parallel.any_rank(hooks.stop() or failed)
            evaluating = bool(hooks.evaluate and hooks.evaluate_every) and step % hooks.evaluate_every == 0
            # Before evaluation, whose failure must not cost the steps that led to it.
            if (hooks.save_every and step % hooks.save_every == 0) or (evaluating and hooks.save_every):
                self.save()
                saved = step
            if stopping:
                break
            if evaluating and hooks.evaluate is not None:
                with self._span("evaluate"):
                    hooks.evaluate(step)
        if saved != self.progress.step:
            self.save()
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def step(self, batch: Sequence[MicroBatch], begun: int | None = None) -> StepResult:
        """One update from one global batch, of which `batch` is this rank's share. `begun`: when the wait for it began (ns)."""
        start = self.clock.now()
        begun = start if begun is None else begun
        self.trace.add(self._lane, "data", begun, start)
        parallel, scale = self.parallel, self.scaler.scale if self.scaler else 1.0
        factor = self.schedule.factor(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        counts = parallel.sum_over_dp(
            torch.tensor([scored(batch), sum(len(b.tokens) for b in batch), sum(n * n for b in batch for n in b.lengths)])
        )
        count, tokens, attended = (int(value) for value in counts)
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for index, part in enumerate(batch):
            with parallel.sync_gradients(last=index == len(batch) - 1):
                with self._span("forward", tokens=len(part.tokens)):
                    loss = parallel.loss_sum(part.tokens, part.positions, part.targets, part.attend)
                with self._span("backward", tokens=len(part.tokens)):
                    # One denominator for the whole batch: a mean of means would weigh short micro-batches too much.
                    torch.autograd.backward(loss * (scale / max(1, count)))
            sums.append(loss.detach())
        total = float(parallel.sum_over_dp(torch.stack(sums).double().sum()))
        with self._span("gradient norm"):
            overflowed = self.scaler is not None and parallel.any_rank(not unscale_(self.parameters, scale))
            norm = parallel.gradient_norm(self.parameters)
        finite = bool(torch.isfinite(norm)) and total == total and abs(total) != float("inf")
        if not overflowed and not finite:
            raise diagnose(
                parallel, batch, self.progress.step + 1, total / max(1, count), float(norm), self.optimizer.param_groups[0]["lr"]
            )
        if not overflowed:
            if self.clip_norm is not None:
                with self._span("clip"):
                    clip.clip_(self.parameters, norm, self.clip_norm)
            with self._span("optimizer"):
                self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update(overflowed)
            if self.scaler.scale < SMALLEST_SCALE:
                raise DivergenceError(
                    f"step {self.progress.step + 1}: fp16 gradients overflow even with a loss scale of {self.scaler.scale:g}",
                    "train in bf16 or fp32, or lower the learning rate",
                )
        self.progress.step += 1
        self.progress.tokens += tokens
        end = self.clock.now()
        self.trace.add(self._lane, "step", begun, end, sizes={"step": self.progress.step, "tokens": tokens})
        return StepResult(
            self.progress.step, total / max(1, count), float(norm), self.optimizer.param_groups[0]["lr"], tokens, count, attended,
            end - begun, start - begun, scale, overflowed,
        )  # fmt: skip

    def state(self) -> dict[str, Stateful]:
        """Everything that a resumed run needs, by name."""
        pieces: dict[str, Stateful] = {
            "parallel": self.parallel,
            "optimizer": cast(Stateful, self.optimizer),
            "progress": self.progress,
            "batches": self.batches,
            "rng": RandomState(),
        }
        return pieces if self.scaler is None else {**pieces, "scaler": self.scaler}

    def save(self) -> None:
        if self.checkpoints is not None:
            with self._span("save"):
                self.checkpoints.save(self.progress.step, self.state())

    def restore(self) -> bool:
        """Continue from the newest checkpoint; False when there is none."""
        return self.checkpoints is not None and self.checkpoints.restore(self.state()) is not None

    @property
    def _lane(self) -> str:
        return f"rank {self.parallel.rank}"

    @contextmanager
    def _span(self, kind: str, **sizes: int) -> Iterator[None]:
        start = self.clock.now()
        yield
        self.trace.add(self._lane, kind, start, self.clock.now(), sizes=sizes)
