"""Carries a plan out in this process: one flat forward pass over every scheduled token, then sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from armillary.core.clock import Clock, RealClock
from armillary.core.errors import CapacityError, InputError
from armillary.serve.executors.forward import FlatBatch, Forward, PackedAdapter, Span
from armillary.serve.request import Request, TokenLogprob
from armillary.serve.sampling import Row, SamplingError, sample, score
from armillary.serve.schedule import Entry, Outcome, Plan
from armillary.serve.speculation.verification import accept

Tokens = tuple[TokenLogprob, ...]


class LocalExecutor:
    """`Executor[Plan, Outcome]` on this machine.

    The batch is the scheduled tokens of all sequences one after another, without padding; logits are computed only for
    tokens whose successor is drawn or scored. `forward` is how the batch is computed: `TorchForward` or `NativeForward`.
    `adapters` gives the weights that a request's adapter stands for, None when they are gone.
    `threads` sets torch's thread count for the whole process (sampling uses it too); `seed` is for requests that bring none.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        threads: int | None = None,
        seed: int | None = None,
        clock: Clock | None = None,
        adapters: Callable[[str], PackedAdapter | None] = lambda key: None,
    ) -> None:
        self.threads = threads if threads is not None else torch.get_num_threads()
        self.forward = forward
        self._seed = seed
        self._adapters = adapters
        self._clock = clock if clock is not None else RealClock()

    def run(self, plan: Plan) -> Outcome:
        start = self._clock.now()
        with self._torch_threads(), torch.inference_mode():
            if not plan.requests:
                return Outcome((), (), start, self._clock.now())
            sampled, scores, failed, pooled = self._run(plan)
        return Outcome(tuple(sampled), tuple(scores), start, self._clock.now(), tuple(failed), tuple(pooled))

    def _run(self, plan: Plan) -> tuple[list[Tokens], list[Tokens], list[tuple[int, Exception]], list[tuple[int, Tensor]]]:
        entries, requests = plan.schedule.entries, plan.requests
        if plan.copies:
            self.forward.copy_blocks(plan.copies)
        adapters = [self._adapters(request.adapter) if request.adapter else None for request in requests]
        # Of a request that was cancelled meanwhile: nobody waits for its tokens.
        gone = {i for i, request in enumerate(requests) if request.adapter and adapters[i] is None}
        failed: list[tuple[int, Exception]] = [
            (i, CapacityError(f"adapter '{requests[i].adapter}' is not in memory any more", "send the request again")) for i in gone
        ]
        # Single tokens first and by length: neighbours of similar length share one attention call.
        order = sorted((i for i in range(len(entries)) if i not in gone), key=lambda i: (entries[i].count > 1, entries[i].start))
        tokens: list[int] = []
        positions: list[int] = []
        drawn: list[int] = []  # entries: each has 1 + drafts batch rows, which stand first in `rows`
        rows: list[int] = []
        embedded: list[tuple[int, int]] = []  # entry, the batch row of its prompt's last token
        scored: list[tuple[int, int, list[int]]] = []  # entry, its first batch row, the prompt tokens to score
        for i in order:
            entry, request = entries[i], requests[i]
            first, end = len(tokens), entry.start + entry.count
            tokens += _tokens(request, entry)
            positions += range(entry.start, end)
            if entry.sample:
                drawn.append(i)
                rows += range(len(tokens) - 1 - entry.drafts, len(tokens))
            if request.pooling and end == len(request.prompt):
                embedded.append((i, len(tokens) - 1))
            if request.sampling.prompt_logprobs is not None and entry.start + 1 < len(request.prompt):
                scored.append((i, first, list(request.prompt[entry.start + 1 : end + 1])))
        count = len(rows)
        for _, first, targets in scored:
            rows += range(first, first + len(targets))
        rows += [row for _, row in embedded]

        if not order:
            return [()] * len(entries), [()] * len(entries), failed, []
        spans = [Span(entries[i].start, entries[i].count, plan.block_tables[i], len(requests[i].prompt)) for i in order]
        batch = FlatBatch(tokens, positions, spans, rows, [adapters[i] for i in order], hidden=bool(embedded))
        computed = self.forward.logits(batch)
        logits = computed.values

        sampled: list[tuple[TokenLogprob, ...]] = [()] * len(entries)
        scores: list[tuple[TokenLogprob, ...]] = [()] * len(entries)
        peaks = (computed.peak[:count], computed.best[:count]) if computed.peak is not None and computed.best is not None else None
        draws = [row for i in drawn for row in _rows(requests[i], entries[i])]
        results = sample(logits[:count], draws, self._seed, peaks)
        first = 0
        for i in drawn:
            part = slice(first, first + 1 + entries[i].drafts)
            found = accept(draws[part], results[part], logits[part], self._seed)
            first = part.stop
            if isinstance(found, SamplingError):
                failed.append((i, found))
            else:
                sampled[i] = found
        row = count
        for i, _, targets in scored:
            tops = [requests[i].sampling.prompt_logprobs or 0] * len(targets)
            scores[i] = tuple(score(logits[row : row + len(targets)], targets, tops))
            row += len(targets)
            if any(math.isnan(one.logprob or 0.0) for one in scores[i]):
                scores[i] = ()
                failed.append((i, SamplingError(f"the prompt of request '{requests[i].id}' has logits that are not numbers")))
        pooled: list[tuple[int, Tensor]] = []
        for place, (i, _) in enumerate(embedded, len(rows) - len(embedded)):
            if computed.hidden is not None:
                pooled.append((i, computed.hidden[place].float().cpu().clone()))
            else:
                failed.append(
                    (
                        i,
                        InputError(f"{self.forward.name} gives no hidden states", "serve an encoder", field="input"),
                    )
                )
        return sampled, scores, list(dict(failed).items()), pooled

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        """torch counts threads for the process: another executor, or a test, may have changed it.

        Beside kernels with threads of their own it gets one: OpenMP's others spin for milliseconds after each operation on a row
        of logits, on the cores that the next iteration needs (a mask cost 5.5 ms an iteration by that).
        """
        before, wanted = torch.get_num_threads(), 1 if self.forward.own_threads else self.threads
        if before != wanted:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if self.forward.own_threads and before != wanted:
                torch.set_num_threads(before)


def _tokens(request: Request, entry: Entry) -> Sequence[int]:
    """The known tokens at the entry's positions, and its drafts."""
    if entry.count == 1:
        return (request.token(entry.start),)
    known = request.tokens(entry.start, entry.start + entry.count - entry.drafts)
    return (*known, *request.drafts[: entry.drafts])


def _rows(request: Request, entry: Entry) -> list[Row]:
    """What is drawn for an entry that samples: the token after the known ones, and after each draft."""
    drafts = request.drafts[: entry.drafts]
    masks = request.constraint.mask(drafts) if request.constraint is not None else [None] * (1 + len(drafts))
    if not drafts:
        return [Row(request, (), masks[0])]  # a third of what taking the tensor apart costs
    return [Row(request, drafts[:ahead], mask) for ahead, mask in enumerate(masks)]
