"""Triton paged attention on a GPU, beside PyTorch's attention and the card's roofline, all in one run.

    python bench/gpu/paged_attention.py --dry-run      the cases, with the bytes and FLOPs that they need; no GPU
    python bench/gpu/paged_attention.py --publish      measure, and write bench/results/gpu_paged_attention.{json,md}

Peers: `gather + SDPA` copies each sequence's keys and values out of the pool and pads them, then attends (what an engine does
that has no paged kernel); `SDPA, contiguous` attends to such a copy that is there already, without a pool to serve from: it is
given the work that paging adds. Every result is compared with float64 before anything is timed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import card
from cases import ATTENTION, AttentionCase, Case
from report import Result, main


def measure(case: Case, device: str = "cuda") -> Result:
    assert isinstance(case, AttentionCase)
    problem = Problem.make(case, device)
    ours = problem.paged()
    error = problem.error(ours)
    if not error <= 1:
        raise SystemExit(f"{case.name}: wrong by {error:.1f} times what its dtype allows, not timed")
    peers: dict[str, float | None] = {"gather + SDPA": None, "SDPA, contiguous": None}
    if problem.equal:
        for result in (problem.gathered(), problem.contiguous()):
            if not (difference := problem.error(result)) <= 1:
                raise SystemExit(f"{case.name}: a peer is wrong by {difference:.1f} times what its dtype allows")
        peers = {"gather + SDPA": card.best_seconds(problem.gathered), "SDPA, contiguous": card.best_seconds(problem.contiguous)}
    return Result(case.name, card.best_seconds(problem.paged), peers, error)


@dataclass
class Problem:
    """A case's tensors. `equal`: all spans are alike, so that the peers' one padded batch wastes nothing."""

    case: AttentionCase
    equal: bool

    @classmethod
    def make(cls, case: AttentionCase, device: str) -> Problem:
        import numpy as np
        import torch

        from armillary.kernels.attention import AttentionSpec
        from armillary.kernels.gpu.paged_attention import GpuPagedAttend
        from armillary.kernels.paged_attention import PagedCache, Span

        self = cls(case, len(set(case.spans)) == 1)
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        needed = [-(-(start + count) // case.block_size) for start, count in case.spans]
        blocks = np.random.default_rng(0).permutation(sum(needed))  # scattered, as after hours of serving
        self.tables = np.split(blocks, np.cumsum(needed)[:-1])
        self.cache = PagedCache(1, sum(needed), case.block_size, case.kv_heads, case.head_dim, dtype, device)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        self.spans = [Span(start, count, table.tolist()) for (start, count), table in zip(case.spans, self.tables, strict=True)]
        self.q = torch.randn(sum(count for _, count in case.spans), case.heads, case.head_dim, device=device).to(dtype)
        self.spec = AttentionSpec(0, case.head_dim**-0.5, case.window)
        self.attend = GpuPagedAttend(self.cache, self.spans)
        self.slots = [self._slots(i) for i in range(len(self.spans))]
        if self.equal:
            start, count = case.spans[0]
            self.index = torch.cat(self.slots)
            self.copies = self._gather()
            position = torch.arange(start, start + count, device=device)[:, None]
            key = torch.arange(start + count, device=device)
            self.mask = (key <= position) if case.window is None else (key <= position) & (key > position - case.window)
        return self

    def _slots(self, i: int):
        import torch

        start, count = self.case.spans[i]
        table = torch.as_tensor(self.tables[i], device=self.q.device)
        return (table[:, None] * self.case.block_size + torch.arange(self.case.block_size, device=self.q.device)).flatten()[: start + count]

    def _gather(self):
        shape = (len(self.spans), -1, self.case.kv_heads, self.case.head_dim)
        return tuple(pool[0].index_select(0, self.index).view(shape).transpose(1, 2) for pool in (self.cache.keys, self.cache.values))

    def paged(self):
        return self.attend.attend(self.spec, self.q)

    def gathered(self):
        return self._sdpa(*self._gather())

    def contiguous(self):
        return self._sdpa(*self.copies)

    def _sdpa(self, keys, values):
        """PyTorch picks its fastest kernel that takes the mask: none for decode, causal from the corner for a whole prompt."""
        from torch.nn.functional import scaled_dot_product_attention

        start, count = self.case.spans[0]
        q = self.q.view(len(self.spans), count, self.case.heads, self.case.head_dim).transpose(1, 2)
        masked = {} if count == 1 and self.case.window is None else {"attn_mask": self.mask}
        if start == 0 and count > 1 and self.case.window is None:
            masked = {"is_causal": True}
        elif start > 0 and count > 1 and self.case.window is None:
            from torch.nn.attention.bias import causal_lower_right

            masked = {"attn_mask": causal_lower_right(count, start + count)}
        out = scaled_dot_product_attention(q, keys, values, **masked, scale=self.spec.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def error(self, result) -> float:
        """Largest distance from float64 as a share of what rounding to the dtype explains; of four sequences."""
        import torch

        allowed = 4 * torch.finfo(self.q.dtype).eps
        worst, row = 0.0, 0
        for i, span in enumerate(self.spans):
            rows = slice(row, row + span.count)
            row += span.count
            if i not in {0, 1, len(self.spans) // 2, len(self.spans) - 1}:
                continue
            position = torch.arange(span.start, span.start + span.count, device=self.q.device)[:, None]
            key = torch.arange(span.start + span.count, device=self.q.device)
            seen = (key <= position) & (key > position - (self.case.window or 1 << 30))
            for kv_head in range(self.case.kv_heads):
                heads = slice(kv_head * self.case.heads // self.case.kv_heads, (kv_head + 1) * self.case.heads // self.case.kv_heads)
                keys, values = (pool[0][self.slots[i], kv_head].double() for pool in (self.cache.keys, self.cache.values))
                scores = self.q[rows, heads].double().transpose(0, 1) @ keys.T * self.spec.scale
                exact = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)
                # What is rounded is a weighted mean of values, so their weighted size is the scale of its error.
                size = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values.abs()).transpose(0, 1)
                worst = max(worst, float(((result[rows, heads].double() - exact).abs() / (allowed * size)).max()))
        return worst


if __name__ == "__main__":
    sys.exit(main("paged_attention", __doc__, ATTENTION, measure))
