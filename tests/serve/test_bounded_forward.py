"""Forward passes whose queries read less than all: sinks and a rolling window (StreamingLLM), the best pages (Quest)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from test_native_forward import BASE, decoder_of
from torch import Tensor

from armillary.kernels import cpu_library
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.seen import Seen
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.models.rope import inverse_frequencies
from armillary.serve.executors.forward import FlatBatch, Forward, Span
from armillary.serve.executors.native_forward import NativeForward
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.kv_policies import Options, build

needs_native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")


def turned(x: Tensor, by: Tensor, rope: RopeConfig) -> Tensor:
    """x [T, H, D] rotated by `by` [T] positions more, in float64."""
    angles = by.double()[:, None, None] * inverse_frequencies(rope, x.shape[-1]).double()
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class InCache:
    """StreamingLLM by its definition, in float64: all keys that a query sees are rotated to where they stand in the cache."""

    def __init__(self, config: ModelConfig, seen: Seen, block_size: int) -> None:
        self.config, self.seen, self.block_size = config, seen, block_size

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, group = self.config, q.shape[1] // k.shape[1]
        rope = config.local_rope if spec.window is not None and config.local_rope is not None else config.rope
        at = torch.arange(len(q))
        raw_q, raw_k, out = turned(q, -at, rope), turned(k, -at, rope), torch.empty_like(q)
        for p in range(len(q)):
            first, sinks = self.seen.first(p, self.block_size), self.seen.sinks
            if spec.window is not None and spec.window <= self.seen.rolling:
                sinks = 0 if first else sinks
            first = max(first, p - spec.window + 1) if spec.window is not None else first
            kept = [*range(min(sinks, first)), *range(first, p + 1)] if sinks else [*range(first, p + 1)]
            if spec.window is not None and not self.seen.first(p, self.block_size):
                kept = [*range(first, p + 1)]
            cached = turned(raw_k[kept], torch.arange(len(kept)), rope).repeat_interleave(group, 1)
            own = turned(raw_q[p : p + 1], torch.tensor([len(kept) - 1]), rope)[0]
            scores = torch.einsum("hd,khd->hk", own, cached) * spec.scale
            if spec.softcap is not None:
                scores = torch.tanh(scores / spec.softcap) * spec.softcap
            out[p] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[kept].double().repeat_interleave(group, 1)).to(out)
        return out


class Table:
    """A block table from which what no query sees is dropped, and appended again for what comes, as the engine does."""

    def __init__(self, seen: Seen, block_size: int, blocks: list[int]) -> None:
        self.seen, self.block_size, self.blocks, self.dropped = seen, block_size, blocks, 0

    def at(self, position: int) -> list[int]:
        sinks = -(-self.seen.sinks // self.block_size)
        while self.dropped < self.seen.droppable(position, self.block_size):
            self.blocks.append(self.blocks.pop(sinks))
            self.dropped += 1
        return list(self.blocks)


def run(forward: Forward, tokens: list[int], table: Table, chunks: list[int], prompt: int = 0) -> Tensor:
    out, at = [], 0
    for count in chunks:
        span = Span(at, count, table.at(at), prompt)
        out.append(forward.logits(FlatBatch(tokens[at : at + count], range(at, at + count), [span], range(count))).values.clone())
        at += count
    return torch.cat(out)


CASES = {
    "llama": BASE,
    "windows": replace(BASE, windows=(20, None, 60)),
    "softcap, two ropes": replace(BASE, windows=(None, 17, None), attention_softcap=5.0, local_rope=RopeConfig(500.0)),
    "yarn, multi-query": replace(BASE, num_kv_heads=1, rope=RopeConfig(10_000.0, "yarn", 4.0, 64)),
}


BACKENDS = ("torch", pytest.param("native", marks=needs_native))


def streaming(backend: str, decoder: Decoder, blocks: int, block_size: int, seen: Seen) -> Forward:
    if backend == "native":
        return NativeForward(decoder, num_blocks=blocks, block_size=block_size, threads=2, seen=seen)
    options = Options(block_size, 512, sinks=seen.sinks, window=seen.rolling, budget=0, dense_layers=0)
    return TorchForward(decoder, num_blocks=blocks, block_size=block_size, kv=build("streaming", options))


@cache
def streamed(case: str, sinks: int) -> tuple[Decoder, Tensor, Seen, int, Tensor]:
    """A decoder, tokens, what a query sees, the block size, and the logits by the definition."""
    decoder, block_size, seen = decoder_of(CASES[case]), 8 if sinks == 4 else 16, Seen(sinks=sinks, rolling=40)
    tokens = torch.randint(0, 101, (190,))
    with torch.no_grad():
        expected = decoder.double()(tokens, torch.arange(190), InCache(decoder.config, seen, block_size)).float()
    return decoder.float(), tokens, seen, block_size, expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [0, 4, 20])
@pytest.mark.parametrize("case", CASES)
def test_streaming_is_attention_at_the_positions_within_the_cache(case: str, sinks: int, backend: str) -> None:
    """Against the definition: the first tokens and the last, rotated anew for every query to where they stand; memory constant."""
    decoder, tokens, seen, block_size, expected = streamed(case, sinks)
    blocks = -(-sinks // block_size) + -(-(40 + 33) // block_size) + 1
    forward = streaming(backend, decoder, blocks, block_size, seen)
    table = Table(seen, block_size, torch.randperm(blocks).tolist())
    got = run(forward, tokens.tolist(), table, [33, 1, 1, 30, 33, *[1] * 40, 33, 19])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@needs_native
def test_streaming_does_not_depend_on_chunks_threads_or_the_cache_type() -> None:
    """Bit for bit; and while nothing is left out, it is full attention bit for bit."""
    decoder, length = decoder_of(BASE), 130
    tokens = torch.randint(0, 101, (length,)).tolist()
    for dtype in (torch.float32, torch.int8):
        seen = Seen(sinks=4, rolling=64)

        def logits(chunks: list[int], threads: int, seen: Seen = seen, dtype: torch.dtype = dtype) -> Tensor:
            forward = NativeForward(decoder, num_blocks=16, block_size=16, threads=threads, seen=seen, kv_dtype=dtype)
            return run(forward, tokens, Table(seen, 16, list(range(16))), chunks)

        whole = logits([length], 1)
        for chunks, threads in (([*[1] * 90, 40], 1), ([70, 1, 1, 58], 2)):
            assert torch.equal(logits(chunks, threads), whole)
        full = logits([length], 2, Seen())
        assert torch.equal(whole[:68], full[:68])
        assert not torch.equal(whole[-1], full[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_far_out_is_computed_as_well_as_at_its_start(backend: str) -> None:
    """Positions only differ: a window at position 3,000,000 gives what it gives at 300, where a float's angles would be off by 0.2."""
    decoder = decoder_of(replace(BASE, num_layers=1))
    tokens = torch.randint(0, 101, (96,)).tolist()
    seen = Seen(sinks=0, rolling=48)
    results = []
    for begin in (320, 3_000_000 // 16 * 16):
        forward = streaming(backend, decoder, 8, 16, seen)
        position, table = begin, Table(seen, 16, list(range(8)))
        out = []
        for token in tokens:
            span = Span(position, 1, table.at(position))
            out.append(forward.logits(FlatBatch([token], [position], [span], [0])).values.clone())
            position += 1
        results.append(torch.cat(out)[64:])  # from where on the window holds only what this test has written
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-4)


@needs_native
@pytest.mark.parametrize("block_size", [16, 64])
def test_pages_do_not_depend_on_chunks_threads_or_company(block_size: int) -> None:
    """Bit for bit: also of a sequence computed anew after its blocks were lost, or verified several tokens at a time."""
    decoder = decoder_of(replace(BASE, windows=(None, None, 100, None), num_layers=4))
    length, prompt = 230, 100
    tokens = torch.randint(0, 101, (length,)).tolist()
    blocks = -(-length // block_size) + 3

    def logits(chunks: list[int], threads: int, pages: int = 4, selected_from: int = prompt) -> Tensor:
        seen = Seen(pages=pages, dense_layers=1)
        forward = NativeForward(decoder, num_blocks=blocks, block_size=block_size, threads=threads, seen=seen)
        table = Table(seen, block_size, torch.randperm(blocks).tolist())
        return run(forward, tokens, table, chunks, selected_from)

    torch.manual_seed(1)
    whole = logits([length], 1)
    for chunks, threads in (([prompt, *[1] * 30, 100], 2), ([90, 60, 7, 23, 50], 1)):
        assert torch.equal(logits(chunks, threads), whole)
    dense = logits([length], 2, 0)
    assert torch.equal(whole[:prompt], dense[:prompt])
    assert not torch.allclose(whole[prompt:], dense[prompt:], atol=1e-3)
    assert torch.equal(logits([length], 2, -(-length // 16)), dense)  # a budget of everything


@needs_native
def test_drafts_that_were_refused_leave_no_trace_in_a_pages_bounds() -> None:
    """Keys far larger than the real ones were stored and overwritten: what is selected later is as if they had not been."""
    decoder = decoder_of(BASE)
    tokens, wrong = torch.randint(0, 101, (200,)).tolist(), [7] * 20
    results = []
    for drafted in (False, True):
        forward = NativeForward(decoder, num_blocks=16, block_size=16, threads=1, seen=Seen(pages=2))
        table = list(range(16))

        def step(begin: int, chunk: list[int], forward: NativeForward = forward, table: list[int] = table) -> Tensor:
            span = Span(begin, len(chunk), table, 60)
            return forward.logits(FlatBatch(chunk, range(begin, begin + len(chunk)), [span], range(len(chunk)))).values.clone()

        step(0, tokens[:70])
        if drafted:
            step(70, wrong)
        results.append(torch.cat([step(at, tokens[at : at + 1]) for at in range(70, 200)]))
    assert torch.equal(results[0], results[1])


def above(x: Tensor) -> Tensor:
    """x [pages, 2, head_dim] as the smallest bytes, times the page's scale, that are not below it; a scale has 8 significant bits."""
    exact = x.abs().amax((1, 2), keepdim=True).float() / 127
    scale = ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).double()
    return (x / scale).ceil() * scale


@needs_native
def test_a_copied_block_has_its_pages_bounds() -> None:
    """What is selected from copies, or from blocks carried into another pool, is what is selected from the originals."""
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (161,)).tolist()
    forward, other = (NativeForward(decoder, num_blocks=24, block_size=16, threads=1, seen=Seen(pages=2)) for _ in range(2))
    run(forward, tokens[:160], Table(Seen(), 16, list(range(11))), [160], 160)
    forward.copy_blocks([(block, block + 12) for block in range(11)])
    other.write_blocks(range(11), forward.read_blocks(range(11)))

    def last(forward: NativeForward, table: range) -> Tensor:
        return forward.logits(FlatBatch(tokens[160:], [160], [Span(160, 1, table, 160)], [0])).values.clone()

    expected = last(forward, range(11))
    assert torch.equal(last(forward, range(12, 23)), expected)
    assert torch.equal(last(other, range(11)), expected)


class SelectedPages:
    """Quest by its definition, in float64: every page's bound from its keys, the best and the query's own, attention over these."""

    def __init__(self, pages: int, dense_layers: int, prompt: int) -> None:
        self.pages, self.dense_layers, self.prompt = pages, dense_layers, prompt

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
        for p in range(len(q)):
            for head in range(k.shape[1]):
                mine, kept = q[p, head * group : (head + 1) * group] * spec.scale, list(range(p + 1))
                own = p // 16
                if spec.layer >= self.dense_layers and p >= self.prompt and own >= self.pages:
                    full = k[: own * 16, head].view(own, 16, -1)
                    high, low = above(torch.stack((full.amax(1), -full.amin(1)), 1)).unbind(1)
                    unit = mine.abs().amax(-1, keepdim=True) / 32767  # a query is compared as 15-bit numbers
                    rounded = (mine / unit).round() * unit
                    score = (rounded.clamp(min=0)[:, None] * high + (-rounded).clamp(min=0)[:, None] * low).sum(-1).amax(0)
                    chosen = score.topk(self.pages - 1).indices
                    kept = [i for page in [*sorted(chosen.tolist()), own] for i in range(page * 16, min(page * 16 + 16, p + 1))]
                weights = (mine @ k[kept, head].T).softmax(-1)
                out[p, head * group : (head + 1) * group] = weights @ v[kept, head]
        return out


@needs_native
def test_pages_equal_the_definition() -> None:
    decoder: Decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (220,))
    with torch.no_grad():
        expected = decoder.double()(tokens, torch.arange(220), SelectedPages(3, 1, 90)).float()
        decoder.float()
    seen = Seen(pages=3, dense_layers=1)
    forward = NativeForward(decoder, num_blocks=14, block_size=16, threads=2, seen=seen)
    got = run(forward, tokens.tolist(), Table(seen, 16, torch.randperm(14).tolist()), [100, *[1] * 60, 60], 90)
    far = (got - expected).abs().amax(-1) > 2e-5  # two pages as good as each other to the last bit may be taken either way
    assert float(far.float().mean()) < 0.02
