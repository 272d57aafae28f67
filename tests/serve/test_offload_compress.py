"""4 bits a number: half a step of its group at most, the same on every tier and by every cut, and nothing is lost that was not small."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import loaded, tiny
from test_offload_forward import BOUNDS, DECODERS, VOCABULARY, iterations, logits

from armillary.kernels.paged_attention import Span
from armillary.serve.config import EngineConfig
from armillary.serve.executors.forward import FlatBatch
from armillary.serve.executors.offload_forward import OffloadForward
from armillary.serve.llm import LLM
from armillary.serve.offload.compress import BITS, GROUP, compress, compressed_bytes, expand
from armillary.serve.offload.cost import T4, Work, peak_rows, price
from armillary.serve.offload.layout import fit, layout
from armillary.serve.offload.placement import best_fractions
from armillary.serve.offload.policy import OffloadPolicy, Split
from armillary.serve.request import SamplingParams


def there_and_back(values):
    packed = torch.zeros(len(values), compressed_bytes(values.shape[1]), dtype=torch.uint8)
    compress(values, packed)
    expand(packed, found := torch.empty_like(values))
    return found


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3 * GROUP), st.integers(-30, 30), st.integers(0, 999))
def test_no_number_moves_by_more_than_half_a_step_of_its_group(rows, count, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, count, generator=generator) + torch.randn(rows, 1, generator=generator)) * 10.0**exponent
    found = there_and_back(values)
    for before, after in zip(values.split(GROUP, 1), found.split(GROUP, 1), strict=True):
        half = (before.amax(1, True) - before.amin(1, True)).double() / 30
        rounding = 4 * torch.finfo(torch.float32).eps * before.abs().amax(1, True)
        assert ((before - after).abs() <= half + rounding).all()
        assert torch.equal(after.amin(1), before.amin(1))  # the smallest is exact


def test_equal_numbers_are_exact_large_ones_too_and_what_is_not_finite_shows():
    values = torch.tensor([[3.25] * GROUP, [0.0] * GROUP, [-1e38, 1e38] * (GROUP // 2), [1.0, float("nan")] * (GROUP // 2)])
    found = there_and_back(values)
    assert torch.equal(found[:2], values[:2])
    torch.testing.assert_close(found[2], values[2], rtol=1e-6, atol=0)
    assert found[3].isnan().all()
    assert BITS == 5.0
    assert compressed_bytes(65) == 2 * compressed_bytes(64) == 2 * 40


def rounded(decoder):
    """The decoder whose layers' matrices went through 4 bits, with a head of its own that did."""
    other = tiny(**{"num_layers": 4})
    other.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(there_and_back(parameter))
    return other


def test_it_computes_with_the_rounded_weights_keys_and_values(tmp_path):
    decoder = DECODERS["llama"]
    given = FlatBatch([5], [0], [Span(0, 1, [3])], [0])  # one token attends to its own value alone
    policy = OffloadPolicy(Split(0, 1), Split(0, 1), compress=True)
    found, plain = (logits(OffloadForward(one, policy, BOUNDS, folder=tmp_path), [given])[0] for one in (decoder, rounded(decoder)))
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)  # rounding twice moves a group's largest by a bit, and that a level
    exact = logits(OffloadForward(decoder, OffloadPolicy(), BOUNDS, folder=tmp_path), [given])[0]
    assert 0.05 < (found - exact).abs().max() < 0.5 * exact.abs().max()


def test_a_prompt_in_pieces_finds_the_keys_of_the_whole(tmp_path):
    """What a batch attends to is what the cache gives back, so chunks, prefix hits and preemption change nothing but the last bits."""
    decoder, rng = DECODERS["llama"], random.Random(1)
    tokens = [rng.randrange(VOCABULARY) for _ in range(30)]
    policy = OffloadPolicy(Split(0, 1), Split(0, 1), compress=True)
    found = []
    for chunk in (30, 7, 1):
        forward = OffloadForward(decoder, policy, BOUNDS, folder=tmp_path)
        table = list(range(8))
        for start in range(0, 30, chunk):
            piece = tokens[start : start + chunk]
            last = logits(forward, [FlatBatch(piece, range(start, start + len(piece)), [Span(start, len(piece), table)], [len(piece) - 1])])
        found.append(last[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-3, rtol=0)


def test_blocks_leave_and_come_back_compressed(tmp_path):
    policy = OffloadPolicy(cache=Split(0.25, 0.5, 0.25), compress=True)
    one, two = (OffloadForward(DECODERS["llama"], policy, BOUNDS, folder=tmp_path) for _ in range(2))
    batch, *_ = iterations(5)
    logits(one, [batch])
    blocks = sorted({block for span in batch.spans for block in span.blocks})
    data = one.read_blocks(blocks)
    assert data.shape == (len(blocks), 4 * 2 * 4 * 40)  # layers, keys and values, tokens, bytes of a token's 32 numbers
    two.write_blocks(blocks, data)
    after = FlatBatch([7], [1], [Span(1, 1, batch.spans[0].blocks)], [0])
    assert torch.equal(*(logits(forward, [after])[0] for forward in (one, two)))


def test_more_of_a_model_fits_and_the_planner_knows():
    config = DECODERS["llama"].config
    plain, packed = (layout(config, OffloadPolicy(compress=compress), BOUNDS) for compress in (False, True))
    assert packed.unit_bytes == plain.unit_bytes
    assert 0.15 < sum(packed.stored_bytes) / sum(plain.stored_bytes) < 0.3  # 5/32, and half groups in rows of 32
    capacity = layout(config, OffloadPolicy(Split(0, 1), Split(0, 1), compress=True), BOUNDS).total + sum(packed.stored_bytes)
    policy = fit(config, BOUNDS, capacity, compress=True)
    assert policy.compress
    assert policy.weights.arena == 1
    assert layout(config, policy, BOUNDS).total <= capacity


def test_the_cost_model_moves_and_keeps_five_sixteenths_and_attends_on_the_accelerator():
    work = Work(layers=48, hidden=7168, inner=28672, heads=56, prompt=512, answer=32, block=144, batch=48)
    packed = replace(work, compressed=True)
    disk, here, ram = Split(0, 0, 1), Split(1), Split(0, 1)
    for weights, cache in ((disk, here), (here, disk), (disk, disk)):
        before, after = (price(one, weights, cache, here).peaks["disk"] for one in (work, packed))
        assert after == pytest.approx(before * 5 / 16)
    cached = 4 * 144 * (512 + 16) * 7168
    assert price(packed, here, ram, here).generation == pytest.approx(
        cached * 5 / 16 / T4.ram_to_arena + 144 * (8 * 7168**2 + 4 * 7168 * 28672) / T4.products_g + cached / T4.attention_g
    )
    assert best_fractions(packed).price.throughput > 1.5 * best_fractions(work).price.throughput
    placed = best_fractions(packed)
    at = [1.0, *placed.weights.shares, *placed.cache.shares, *placed.hidden.shares]
    assert all(used @ at <= limit * (1 + 1e-6) for used, limit in peak_rows(packed, T4).values())


def test_a_user_compresses_with_an_option(tmp_path):
    model, prompts = loaded(DECODERS["llama"]), [[5, 6, 7], [8] * 20, [9, 10]]
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    options = {"kv_blocks": 32, "block_size": 4, "max_batch_tokens": 16, "max_running": 4, "offload_folder": str(tmp_path)}
    found = []
    for policy in ("weights=100/0/0", "weights=0/50/50,cache=0/50/50"):
        llm = LLM(model, **options, offload=policy, offload_compress="int4")
        assert "in 4 bits" in llm.engine.executor.forward.prepared
        found.append([answer.tokens for answer in llm.generate(prompts, sampling)])
    assert found[0] == found[1]
    auto = LLM(model, **options, offload="auto", offload_memory=4_000_000, offload_compress="int4")
    assert [answer.tokens for answer in auto.generate(prompts, sampling)] == found[0]
    with pytest.raises(ValueError, match="says nothing without offload"):
        EngineConfig(offload_compress="int4")
