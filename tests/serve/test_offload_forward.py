"""Offloading changes where bytes lie and when they move, and no bit of the result; what moves is what the closed forms say."""

import random
import threading
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from adapters import adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, greedy, loaded, tiny
from test_equality import Erratic, Prompter, run

from armillary.core.errors import CapacityError, InputError
from armillary.core.trace import Trace
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.local import LocalExecutor
from armillary.serve.executors.offload_forward import OffloadForward, _Pass
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.llm import LLM
from armillary.serve.offload.batches import cut
from armillary.serve.offload.layout import Bounds, fit, layout, workspace
from armillary.serve.offload.policy import OffloadPolicy, Split, Tier
from armillary.serve.request import Request, SamplingParams
from armillary.train.memory.counter import Alive

LAYERS = {"num_layers": 4}
DECODERS = {
    family: tiny(family, seed=i, **LAYERS, **({"windows": tuple(4 * list(changes["windows"]))[:4]} if "windows" in changes else {}))
    for i, (family, changes) in enumerate(FAMILIES.items())
}
BOUNDS = Bounds(num_blocks=48, block_size=4, sequences=6, tokens=48, context=40)
ROW = 4 * 2 * 16  # bytes of a token's keys in a layer: 2 heads of 16


def iterations(seed, count=5, sequences=4):
    """Batches of `sequences` sequences that grow by 1 to 9 tokens each time; logits of some of them are wanted, in any order."""
    rng = random.Random(seed)
    blocks = rng.sample(range(BOUNDS.num_blocks), 10 * sequences)
    tables = [blocks[10 * i : 10 * i + 10] for i in range(sequences)]
    at = [0] * sequences
    for _ in range(count):
        tokens, positions, spans, rows = [], [], [], []
        for i in range(sequences):
            new = rng.choice((1, 1, 2, 7))
            tokens += [rng.randrange(VOCABULARY) for _ in range(new)]
            positions += range(at[i], at[i] + new)
            spans.append(Span(at[i], new, tables[i]))
            rows += [len(tokens) - 1] * rng.randrange(2)
            at[i] += new
        rng.shuffle(rows)
        yield FlatBatch(tokens, positions, spans, rows)


def logits(forward, batches):
    with torch.inference_mode():
        return [forward.logits(batch).values.clone() for batch in batches]


splits = st.tuples(*[st.integers(0, 4)] * 3).filter(sum).map(lambda w: Split(*(one / sum(w) for one in w)))


@settings(max_examples=25)
@given(st.sampled_from(sorted(FAMILIES)), splits, splits, splits, st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_every_placement_gives_the_bits_of_everything_in_memory(tmp_path_factory, family, weights, cache, hidden, batches, compress, seed):
    decoder, folder = DECODERS[family], tmp_path_factory.mktemp("disk")
    given = list(iterations(seed))
    here = OffloadForward(decoder, OffloadPolicy(batches=batches, compress=compress), BOUNDS, folder=folder)
    away = OffloadForward(decoder, OffloadPolicy(weights, cache, hidden, batches, compress), BOUNDS, folder=folder)
    wanted = logits(here, given)
    assert all(torch.equal(a, b) for a, b in zip(logits(away, given), wanted, strict=True))
    if batches == 1 and not compress:  # and those of the forward pass that knows nothing of all this
        plain = TorchForward(decoder, num_blocks=48, block_size=4, library="torch")
        assert all(torch.equal(a, b) for a, b in zip(logits(plain, given), wanted, strict=True))
    assert away.arena.used == away.layout.total
    assert list(folder.iterdir()) == []  # files without names
    if not compress:
        assert {key[0] for key in here.moved} == {"input"}


@pytest.mark.parametrize(("batches", "compress"), [(1, False), (2, False), (4, False), (2, True)])
def test_bytes_moved_are_the_closed_forms_and_a_load_of_weights_serves_every_batch(tmp_path, batches, compress):
    decoder, gbs, prompt, answer = DECODERS["llama"], 2, 8, 5
    sequences = gbs * batches
    bounds = Bounds(48, 4, sequences, sequences * prompt, 16)
    policy = OffloadPolicy(Split(0, 0.5, 0.5), Split(0, 1), Split(0, 1), batches, compress)
    forward = OffloadForward(decoder, policy, bounds, folder=tmp_path)
    row = 40 if compress else ROW  # 32 numbers are half a group
    tables = [list(range(4 * i, 4 * i + 4)) for i in range(sequences)]
    for i in range(answer):
        start, count = (0, prompt) if i == 0 else (prompt + i - 1, 1)
        positions = list(range(start, start + count)) * sequences
        batch = FlatBatch(
            [1] * len(positions), positions, [Span(start, count, table) for table in tables], range(count - 1, len(positions), count)
        )
        logits(forward, [batch])
    forward.close()  # the load ahead for a pass that never comes
    units = Counter(dict.fromkeys(Tier, 0))
    for size, tier in zip(forward.layout.stored_bytes, forward.layout.weight_tiers, strict=True):
        units[tier] += size
    moved, first = forward.moved, forward.layout.stored_bytes[0]
    ahead = forward.layout.weight_tiers[0]
    assert moved["weights", "load", Tier.RAM] == answer * units[Tier.RAM] + first * (ahead is Tier.RAM)
    assert moved["weights", "load", Tier.DISK] == answer * units[Tier.DISK] + first * (ahead is Tier.DISK)
    tokens = prompt + answer - 1
    assert moved["cache", "store", Tier.RAM] == 2 * row * 4 * sequences * tokens
    loaded_blocks = sum(-(-(prompt + i) // 4) for i in range(answer - 1))
    assert moved["cache", "load", Tier.RAM] == 2 * row * 4 * 4 * sequences * loaded_blocks
    width, heads = 4 * 32, len(units_of_head(forward))
    if batches == 1:  # its activations need not make room for anybody
        assert ("hidden", "load", Tier.RAM) not in moved
        assert moved["input", "load", Tier.RAM] == width * sequences * tokens
    else:
        assert moved["hidden", "load", Tier.RAM] == width * sequences * (4 * tokens + heads * answer)
        assert moved["hidden", "store", Tier.RAM] == width * sequences * (3 * tokens + answer)
    per_token = (moved["weights", "load", Tier.RAM] + moved["weights", "load", Tier.DISK] - first) / (sequences * answer)
    assert per_token == sum(forward.layout.stored_bytes) / (gbs * batches)


def units_of_head(forward):
    return forward.layout.unit_bytes[4:]


@pytest.mark.parametrize("compress", [False, True])
def test_the_arena_keeps_to_its_bytes_and_intermediate_results_to_the_workspace(tmp_path, compress):
    decoder = DECODERS["llama"]
    policy = OffloadPolicy(Split(0, 1), Split(0, 1), compress=compress)
    need = layout(decoder.config, policy, BOUNDS).total
    OffloadForward(decoder, policy, BOUNDS, folder=tmp_path, memory=need)
    with pytest.raises(CapacityError, match=r"needs .* of the accelerator, it has .*weight buffers"):
        OffloadForward(decoder, policy, BOUNDS, folder=tmp_path, memory=need - 64)
    for family in FAMILIES:
        forward = OffloadForward(DECODERS[family], policy, BOUNDS, folder=tmp_path)
        given = list(iterations(0))
        logits(forward, given[:1])
        homes = [forward.weights.table, *forward.weights.homes, *forward.cache.keys, *forward.cache.values, *forward._homes.values()]
        alive = Alive([forward.arena._bytes, *homes])
        before = alive.bytes
        with torch.inference_mode(), alive:
            for batch in given[1:]:
                forward.logits(batch)
        most = max(len(batch.tokens) for batch in given)
        assert alive.peak - before <= workspace(forward.config, most, 6, forward.layout.head_rows, 40, 48 * 4, compress=compress)


def test_the_next_layer_and_the_next_batch_are_loaded_while_one_computes(tmp_path, monkeypatch):
    """Each computation here waits until what comes after it has been loaded: it would wait forever for loads on its own thread."""
    policy = OffloadPolicy(Split(0, 1), Split(0, 1), Split(0, 1), 2)
    trace = Trace("offload")
    forward = OffloadForward(DECODERS["llama"], policy, BOUNDS, folder=tmp_path, trace=trace)
    compute, carry_out, loaded = _Pass._compute, _Pass._carry_out, defaultdict(threading.Event)

    def carried_out(self, move, buffer):
        carry_out(self, move, buffer)
        if move.way == "load":
            loaded[move.what, move.unit, move.batch].set()

    def patient(self, unit, batch):
        if unit < 3:
            assert loaded["weights", unit + 1, -1].wait(60)
            for what in ("hidden", "cache"):
                assert loaded[what, unit + batch, 1 - batch].wait(60)
        compute(self, unit, batch)

    monkeypatch.setattr(_Pass, "_carry_out", carried_out)
    monkeypatch.setattr(_Pass, "_compute", patient)
    logits(forward, [next(iterations(1))])
    assert {span.lane for span in trace.spans()} == {"compute", "weights", "state"}
    assert sum(span.sizes["bytes"] for span in trace.spans()) + forward.moved["input", "load", Tier.RAM] == sum(forward.moved.values())


@pytest.mark.parametrize("name", policies.names())
@pytest.mark.parametrize("policy", ["weights=25/50/25,cache=25/50/25,hidden=0/50/50,batches=2", "weights=0/100/0"])
def test_tokens_are_the_plain_loops_with_preemption_shared_prefixes_forks_and_drafts(name, policy, tmp_path):
    decoder, rng = DECODERS["llama"], random.Random(3)
    stem = [rng.randrange(VOCABULARY) for _ in range(9)]
    asked = [([*stem, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6)))], rng.randint(2, 9)) for _ in range(6)]
    wanted = [greedy(decoder, prompt, count) for prompt, count in asked]
    assert min(gap for _, gap in wanted) > 1e-3
    tokens = 48 if name in ("orca", "request-level") else 5
    bounds = Bounds(14, 4, 6, tokens, 40)
    forward = OffloadForward(decoder, OffloadPolicy.parse(policy), bounds, folder=tmp_path)
    config = EngineConfig(policy=name, block_size=4, kv_blocks=14, max_batch_tokens=tokens, max_running=6)
    requests, answers = [], {}
    for i, ((prompt, count), (answer, _)) in enumerate(zip(asked, wanted, strict=True)):
        for choice in range(1 + i % 2):
            requests.append(Request(f"{i}.{choice}", tuple(prompt), SamplingParams(max_tokens=count, temperature=0.0)))
            answers[requests[-1].id] = answer
            requests[-1].parent = requests[-2] if choice else None
    erratic = Erratic(policies.get(name), 0, 0.2) if name in ("sarathi", "vllm") else None
    drafter = Prompter(answers, 0, 2)
    assert run(LocalExecutor(forward), config, requests, erratic, drafter=drafter) == list(answers.values())


@pytest.mark.parametrize("batches", [1, 2])
def test_sequences_with_adapters_keep_their_bits(batches, tmp_path):
    decoder = DECODERS["llama"]
    policy = OffloadPolicy(Split(0, 0.5, 0.5), Split(0, 1), Split(0, 1), batches)
    here = OffloadForward(decoder, OffloadPolicy(batches=batches), BOUNDS, folder=tmp_path)
    forwards = [here, OffloadForward(decoder, policy, BOUNDS, folder=tmp_path)]
    if batches == 1:
        forwards.append(TorchForward(decoder, num_blocks=48, block_size=4, library="torch"))
    found = []
    for forward in forwards:
        packed = [forward.pack_adapter(adapter(decoder.config, seed).layers) for seed in (1, 2)]
        found.append(logits(forward, [replace(batch, adapters=[packed[0], None, packed[1], packed[0]]) for batch in iterations(2)]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    without = logits(OffloadForward(decoder, policy, BOUNDS, folder=tmp_path), iterations(2))
    assert any((a - b).abs().max() > 0.1 for a, b in zip(found[0], without, strict=True))


def test_blocks_leave_and_come_back_whichever_tier_their_layer_lives_on(tmp_path):
    policy = OffloadPolicy(cache=Split(0.25, 0.5, 0.25))
    one, two = (OffloadForward(DECODERS["llama"], policy, BOUNDS, folder=tmp_path) for _ in range(2))
    batch, *_ = iterations(5)
    logits(one, [batch])
    blocks = sorted({block for span in batch.spans for block in span.blocks})
    two.write_blocks(blocks, one.read_blocks(blocks))
    one.copy_blocks([(batch.spans[0].blocks[0], blocks[-1])])
    assert torch.equal(one.read_blocks([blocks[-1]]), two.read_blocks([batch.spans[0].blocks[0]]))
    after = FlatBatch([7], [1], [Span(1, 1, batch.spans[0].blocks)], [0])
    assert torch.equal(*(logits(forward, [after])[0] for forward in (one, two)))


def test_a_mistaken_batch_leaves_the_forward_usable(tmp_path):
    policy = OffloadPolicy(Split(0, 1), Split(0, 1), Split(0, 1), 2)
    one, two = (OffloadForward(DECODERS["llama"], policy, BOUNDS, folder=tmp_path) for _ in range(2))
    given = list(iterations(4))
    with pytest.raises(InputError, match="block table names block 99"):
        one.logits(FlatBatch([1], [0], [Span(0, 1, [99])], [0]))
    assert all(torch.equal(a, b) for a, b in zip(logits(one, given), logits(two, given), strict=True))


@settings(max_examples=100)
@given(st.data())
def test_batches_partition_the_iteration_within_their_bounds(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 15)), min_size=1, max_size=8))
    sequences, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 12))
    spans = [Span(start, count, range(100 * i, 100 * i + 9)) for i, (start, count) in enumerate(lengths)]
    total = sum(count for _, count in lengths)
    rows = data.draw(st.lists(st.integers(0, total - 1), max_size=6, unique=True))
    batches = cut(spans, rows, sequences=sequences, tokens=tokens, blocks=9, block_size=4)
    again = [(span.blocks[0], span.start + i) for one in batches for span in one.spans for i in range(span.count)]
    assert again == [(span.blocks[0], span.start + i) for span in spans for i in range(span.count)]
    for before, one in zip([None, *batches], batches, strict=False):
        assert len(one.spans) <= sequences
        assert one.count == sum(span.count for span in one.spans) <= tokens
        assert len(one.blocks) <= 9
        assert one.continues == (before is not None and before.spans[-1].blocks == one.spans[0].blocks)
    found = {index: one.first + row for one in batches for row, index in zip(one.rows, one.wanted, strict=True)}
    assert [found[i] for i in range(len(rows))] == rows


def test_auto_fills_the_arena_with_weights_first_and_fits():
    config = DECODERS["llama"].config
    everything = layout(config, OffloadPolicy(), BOUNDS).total
    assert fit(config, BOUNDS, everything) == OffloadPolicy()
    least = layout(config, OffloadPolicy(Split(0, 1), Split(0, 1)), BOUNDS).total
    shares = []
    for part in (0.9, 0.5, 0.1):
        capacity = int(least + part * (everything - least))
        policy = fit(config, BOUNDS, capacity)
        assert layout(config, policy, BOUNDS).total <= capacity
        assert policy.weights.arena == 1 or policy.cache.arena == 0
        shares.append(policy.weights.arena + policy.cache.arena)
    assert shares == sorted(shares, reverse=True)
    assert fit(config, BOUNDS, least, memory=1000).weights.disk > 0
    with pytest.raises(CapacityError, match="weight buffers"):
        fit(config, BOUNDS, 1000)


def test_a_user_offloads_with_an_option_and_what_it_cannot_go_with_is_refused(tmp_path):
    model, prompts = loaded(DECODERS["llama"]), [[5, 6, 7], [8] * 20, [9, 10]]
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    options = {"kv_blocks": 32, "block_size": 4, "max_batch_tokens": 16, "max_running": 4}
    wanted = [answer.tokens for answer in LLM(model, backend="torch", **options).generate(prompts, sampling)]
    explicit = LLM(model, **options, offload="weights=0/50/50,cache=0/100/0,batches=2", offload_folder=str(tmp_path / "disk"))
    assert [answer.tokens for answer in explicit.generate(prompts, sampling)] == wanted
    auto = LLM(model, **options, offload="auto", offload_memory=400_000, offload_folder=str(tmp_path))
    assert [answer.tokens for answer in auto.generate(prompts, sampling)] == wanted
    for wrong, message in (
        ({"offload": "auto"}, "offload_memory"),
        ({"offload_memory": 1000}, "without offload"),
        ({"offload": "weights=1/2/3"}, "add up to 100"),
        ({"offload": "batches=2", "backend": "native"}, "needs the native kernels"),
        ({"offload": "batches=2", "speculate": "layers"}, "every drafted token"),
        ({"offload": "batches=2", "quantize": "int4"}, "quantize needs the native kernels"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**wrong)
