"""Batches with several adapters: what merged weights compute, and nothing changed for rows without one."""

import random

import pytest
import torch
from adapters import adapter, merged
from models import FAMILIES, VOCABULARY, logits_of, tiny

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.models.lora import read_lora
from armillary.models.weights import hf_parameters
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.native_forward import NativeForward
from armillary.serve.executors.torch_forward import TorchForward

BACKENDS = ("torch", *(("native",) if cpu_library.available() else ()))
needs_native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")
BLOCK = 8


def forward_of(backend, decoder, **options):
    if backend == "native":
        return NativeForward(decoder, num_blocks=64, block_size=BLOCK, threads=options.pop("threads", 2), **options)
    return TorchForward(decoder, num_blocks=64, block_size=BLOCK)


def batch_of(sequences, adapters, rows=None):
    """Whole sequences, each with its adapter or None, in blocks of their own."""
    tokens, positions, spans, block = [], [], [], 0
    for sequence in sequences:
        blocks = -(-len(sequence) // BLOCK)
        spans.append(Span(0, len(sequence), range(block, block + blocks)))
        tokens += sequence
        positions += range(len(sequence))
        block += blocks
    return FlatBatch(tokens, positions, spans, range(len(tokens)) if rows is None else rows, adapters)


def sequences_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def compute(forward, batch):
    with torch.inference_mode():
        return forward.logits(batch).values.clone()


LENGTHS = (17, 5, 1, 30, 9, 1, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_mixed_batch_equals_merged_weights(family, backend):
    """Ranks below, at and above a tile, and adapters of some projections only; against float64 with W + scale B A."""
    base = tiny(family, seed=1)
    config = base.config
    made = [
        adapter(config, 1, rank=1),
        adapter(config, 2, rank=16, parts=("q_proj", "v_proj")),
        adapter(config, 3, rank=21, scale=0.5),
        adapter(config, 4, rank=6, parts=("k_proj", "gate_proj", "down_proj")),
    ]
    exact = [base.double(), *(merged(base, low).double() for low in made)]
    forward = forward_of(backend, base.float())
    packed = [None, *(forward.pack_adapter(low.layers) for low in made)]
    sequences, who = sequences_of(LENGTHS), (1, 0, 2, 3, 1, 4, 3)
    got = compute(forward, batch_of(sequences, [packed[i] for i in who]))
    expected = torch.cat([logits_of(exact[i], sequence) for i, sequence in zip(who, sequences, strict=True)])
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=0)
    apart = logits_of(exact[0], sequences[0])
    assert (apart - expected[: len(sequences[0])]).abs().max() > 0.1  # or nothing was tested


@needs_native
@pytest.mark.parametrize("quantisation", ["none", "fp16", "int8", "int4"])
@pytest.mark.parametrize("lengths", [(1, 3, 1, 2), (40, 30, 1, 25)], ids=["few rows", "many rows"])
def test_rows_without_an_adapter_keep_every_bit_and_threads_change_none(quantisation, lengths):
    """Many rows of int4 take the products of cpu/wide.h."""
    base, sequences = tiny("llama", seed=2), sequences_of(lengths)
    low = adapter(base.config, 5, rank=9)
    found = []
    for threads in (1, 3):
        forward = forward_of("native", base, quantisation=quantisation, threads=threads)
        packed = forward.pack_adapter(low.layers)
        ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]  # the last layer computes sampled rows only
        for rows in (None, ends):
            plain = compute(forward, batch_of(sequences, (), rows))
            mixed = compute(forward, batch_of(sequences, [packed, None, packed, None], rows))
            whose = [i for i, length in enumerate(lengths) for _ in range(length)]
            own = torch.tensor([whose[row] % 2 == 0 for row in (range(len(whose)) if rows is None else rows)])
            assert torch.equal(mixed[~own], plain[~own])
            assert (mixed[own] - plain[own]).abs().amax(1).min() > 0.01
            found.append(mixed)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    if quantisation != "int4" or sum(lengths) < 64:  # where the few sampled rows of the last layer take the same products
        assert torch.equal(found[0][ends], found[1])


@needs_native
@pytest.mark.parametrize("quantisation", ["none", "fp16", "int8", "int4"])
def test_an_adapted_row_does_not_depend_on_its_company(quantisation):
    """Alone, in a chunk, beside others with the same adapter or another: the same bits, where the base's products keep theirs."""
    base, sequences = tiny("qwen2", seed=3), sequences_of((33, 20, 7))
    forward = forward_of("native", base, quantisation=quantisation, deterministic=True)
    one, two = (forward.pack_adapter(adapter(base.config, seed, rank=rank).layers) for seed, rank in ((1, 5), (2, 40)))
    alone = compute(forward, batch_of(sequences[:1], [one]))
    for adapters in ([one, one, one], [one, two, None], [one, None, two]):
        assert torch.equal(compute(forward, batch_of(sequences, adapters))[:33], alone)
    parts = [FlatBatch([token], [at], [Span(at, 1, range(8))], [0], [one]) for at, token in enumerate(sequences[0])]
    assert torch.equal(torch.cat([compute(forward, part) for part in parts]), alone)


@needs_native
def test_a_quantised_base_keeps_exact_terms():
    """What an adapter adds to int4 products is fp32: the difference that it makes is the merged model's, as near as int4's own rounding of activations lets it."""
    base = tiny("llama", seed=4)
    low = adapter(base.config, 6, rank=8, std=0.05)
    sequences = sequences_of((20,))
    errors = {}
    for quantisation in ("none", "int8"):
        forward = forward_of("native", base, quantisation=quantisation)
        got = compute(forward, batch_of(sequences, [forward.pack_adapter(low.layers)]))
        plain = compute(forward, batch_of(sequences, ()))
        errors[quantisation] = (
            (got - logits_of(merged(base, low), sequences[0])).abs().max(),
            (plain - logits_of(base, sequences[0])).abs().max(),
        )
    assert errors["none"][0] < 1e-4
    assert errors["int8"][0] < 3 * errors["int8"][1]  # no worse than the base's own rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_another_model_is_refused(backend):
    forward = forward_of(backend, tiny())
    for other in (tiny(num_layers=3), tiny(intermediate_size=64)):
        with pytest.raises(InputError, match="give an adapter of this model"):
            forward.pack_adapter(adapter(other.config, 0).layers)


@needs_native
def test_adapters_and_sequences_must_be_as_many():
    forward = forward_of("native", tiny())
    packed = forward.pack_adapter(adapter(tiny().config, 0).layers)
    with pytest.raises(InputError, match="1 adapters for 2 sequences"):
        forward.logits(batch_of(sequences_of((3, 4)), [packed]))


def test_peft_itself_agrees(tmp_path):
    """A folder that peft wrote, with its patterns and rsLoRA, against what peft computes with it, on every backend."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tiny("llama", seed=7)
    sizes = base.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=sizes.max_context,
            rms_norm_eps=sizes.norm_eps,
            rope_theta=sizes.rope.theta,
            tie_word_embeddings=False,
        )
    )
    theirs.load_state_dict(hf_parameters(base))
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=6,
        lora_alpha=9,
        use_rslora=True,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        exclude_modules=["layers.0.mlp.up_proj"],
        rank_pattern={r"layers\.1\.mlp\.down_proj": 17, "q_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 30},
    )
    adapted = peft.get_peft_model(theirs, settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(tmp_path / "saved")
    low = read_lora(tmp_path / "saved", sizes)
    assert low.rank == 17
    (sequence,) = sequences_of((25,))
    with torch.inference_mode():
        expected = adapted(torch.tensor([sequence])).logits[0]
    for backend in BACKENDS:
        forward = forward_of(backend, base)
        got = compute(forward, batch_of([sequence], [forward.pack_adapter(low.layers)]))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (expected - logits_of(base, sequence)).abs().max() > 0.1
