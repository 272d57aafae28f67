"""Carries a plan out in this process: one flat forward pass over every scheduled token, then sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armillary.core.clock import Clock, RealClock
from armillary.core.errors import InputError
from armillary.kernels.packed_linear import choose_library, pack
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.serve.request import Request, TokenLogprob
from armillary.serve.sampling import SamplingError, sample, score
from armillary.serve.schedule import Entry, Outcome, Plan


def kv_capacity(config: ModelConfig, size: int, block_size: int, dtype: torch.dtype = torch.float32) -> int:
    """How many KV blocks of `block_size` tokens fit `size` bytes. Raises InputError when none does."""
    block = block_size * config.kv_bytes_per_token(dtype.itemsize)
    if size < block:
        raise InputError(
            f"{size:,} bytes do not hold one KV block of {block_size} tokens ({block:,} bytes)",
            "give more memory or a smaller block_size",
            field="kv_memory",
        )
    return size // block


class LocalExecutor:
    """`Executor[Plan, Outcome]` on this machine.

    The batch is the scheduled tokens of all sequences one after another, without padding; logits are computed only for
    tokens whose successor is drawn or scored. `decoder` stays as it is: its weights are packed into a copy that shares
    the embedding and the norms, unless `in_place` says that nobody else needs the plain ones (half the memory).
    `threads` sets torch's thread count for the whole process; `library` as in `kernels.packed_linear`; `seed` is for
    requests that bring none.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        threads: int | None = None,
        seed: int | None = None,
        library: str | None = None,
        in_place: bool = False,
        clock: Clock | None = None,
    ) -> None:
        config = decoder.config
        self.threads = threads if threads is not None else torch.get_num_threads()
        self._set_threads()
        weight = decoder.embed_tokens.weight
        self.library = choose_library() if library is None else library
        model = decoder if in_place else _sharing_copy(decoder)
        self.packed_bytes = pack(model, self.library)
        self.decoder = model.eval()
        self.cache = PagedCache(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, weight.dtype, weight.device
        )
        self._seed = seed
        self._clock = clock if clock is not None else RealClock()

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that this executor holds: packed ones and those it shares with the decoder it was given."""
        return self.packed_bytes + sum(parameter.nbytes for parameter in self.decoder.parameters())

    def run(self, plan: Plan) -> Outcome:
        start = self._clock.now()
        self._set_threads()
        with torch.inference_mode():
            sampled, scores, failed = self._run(plan) if plan.requests else ([], [], [])
        return Outcome(tuple(sampled), tuple(scores), start, self._clock.now(), tuple(failed))

    def _run(self, plan: Plan) -> tuple[list[TokenLogprob | None], list[tuple[TokenLogprob, ...]], list[tuple[int, Exception]]]:
        entries, requests = plan.schedule.entries, plan.requests
        # Single tokens first and by length: neighbours of similar length share one attention call.
        order = sorted(range(len(entries)), key=lambda i: (entries[i].count > 1, entries[i].start))
        tokens: list[int] = []
        positions: list[int] = []
        drawn: list[int] = []  # entries, with the batch row of each in rows[: len(drawn)]
        rows: list[int] = []
        scored: list[tuple[int, int, list[int]]] = []  # entry, its first batch row, the prompt tokens to score
        for i in order:
            entry, request = entries[i], requests[i]
            first, end = len(tokens), entry.start + entry.count
            tokens += _tokens(request, entry)
            positions += range(entry.start, end)
            if entry.sample:
                drawn.append(i)
                rows.append(len(tokens) - 1)
            if request.sampling.prompt_logprobs is not None and entry.start + 1 < len(request.prompt):
                scored.append((i, first, list(request.prompt[entry.start + 1 : end + 1])))
        for _, first, targets in scored:
            rows += range(first, first + len(targets))

        attend = PagedAttend(self.cache, [Span(entries[i].start, entries[i].count, plan.block_tables[i]) for i in order])
        logits = self._logits(_index(tokens), _index(positions), attend, rows)

        sampled: list[TokenLogprob | None] = [None] * len(entries)
        scores: list[tuple[TokenLogprob, ...]] = [()] * len(entries)
        failed: list[tuple[int, Exception]] = []
        for i, result in zip(drawn, sample(logits[: len(drawn)], [requests[i] for i in drawn], self._seed), strict=True):
            if isinstance(result, SamplingError):
                failed.append((i, result))
            else:
                sampled[i] = result
        row = len(drawn)
        for i, _, targets in scored:
            tops = [requests[i].sampling.prompt_logprobs or 0] * len(targets)
            scores[i] = tuple(score(logits[row : row + len(targets)], targets, tops))
            row += len(targets)
            if any(math.isnan(one.logprob or 0.0) for one in scores[i]):
                scores[i] = ()
                failed.append((i, SamplingError(f"the prompt of request '{requests[i].id}' has logits that are not numbers")))
        return sampled, scores, list(dict(failed).items())

    def _logits(self, tokens: Tensor, positions: Tensor, attend: PagedAttend, rows: Sequence[int]) -> Tensor:
        """Logits of the batch rows `rows` [len(rows), vocab]."""
        device = self.decoder.embed_tokens.weight.device
        tokens, positions = tokens.to(device), positions.to(device)
        if not rows:  # chunks that end within their prompts: only the cache is wanted
            self.decoder.hidden(tokens, positions, attend)
            return torch.empty(0, self.decoder.config.vocab_size)
        every = len(rows) == len(tokens) and list(rows) == list(range(len(rows)))
        return self.decoder(tokens, positions, attend, None if every else _index(rows).to(device))

    def _set_threads(self) -> None:
        """torch counts threads for the process: another executor, or a test, may have changed it."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


def _tokens(request: Request, entry: Entry) -> Sequence[int]:
    """The known tokens at the entry's positions."""
    if entry.count == 1:
        return (request.token(entry.start),)
    start, end, prompt = entry.start, entry.start + entry.count, len(request.prompt)
    return (*request.prompt[start:end], *request.output[max(0, start - prompt) : max(0, end - prompt)])


def _index(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))


def _sharing_copy(decoder: Decoder) -> Decoder:
    """A copy of the module tree with the same tensors."""
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, shared)
