"""Operations of a batch: FLOPs as torch counts them, bytes in closed form, layouts that add up to the whole."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from armillary.core.errors import InputError
from armillary.kernels import linear
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.graph.architecture import from_config
from armillary.models.graph.batch import pairs, summed
from armillary.models.graph.find import read
from armillary.models.graph.layout import Layout
from armillary.models.graph.parameters import active_parameters, kv_bytes_per_token, parameters
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture, published
from armillary.models.graph.work import Work, expected_experts, flops, operations
from armillary.sim.operation import Axis, Kind, Totals, total

TINY = ModelConfig("llama", 61, 24, 40, 2, 4, 2, 6, 128, tie_embeddings=True)
CONFIGS = {
    "llama": TINY,
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, tie_embeddings=False),
    "multiquery": dataclasses.replace(TINY, num_kv_heads=1, qk_norm=True),
    "gemma": dataclasses.replace(TINY, sandwich_norms=True, windows=(3, None)),
}
MIXED = [(7, 0), (1, 12), (3, 5), (1, 0), (1, 40)]
DEEPSEEK, MIXTRAL, LLAMA70 = architecture("deepseek-v3"), architecture("mixtral-8x7b"), architecture("llama-2-70b")


def counted(config, lengths, monkeypatch):
    """What torch counts for whole sequences: (linear layers, attention)."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)  # torch's counter knows torch's own products only
    torch.manual_seed(0)
    decoder, tokens = Decoder(config), torch.arange(sum(lengths)) % config.vocab_size
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(tokens, positions, CausalAttend(lengths))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return products, sum(counts.values()) - products


def of_kind(model, sequences, kind, rows=None):
    (listed,) = operations(model, sequences, rows=rows)
    return total(operation for operation in listed if operation.kind is kind).flops


@pytest.mark.parametrize("family", CONFIGS)
def test_products_are_what_torch_counts(family, monkeypatch):
    config, lengths = CONFIGS[family], (5, 1, 9)
    products, _ = counted(config, lengths, monkeypatch)
    assert of_kind(from_config(config), [(length, 0) for length in lengths], Kind.GEMM, rows=sum(lengths)) == products


@pytest.mark.parametrize("family", ["llama", "multiquery"])
def test_attention_is_what_torch_counts_less_what_the_causal_mask_hides(family, monkeypatch):
    config, lengths = CONFIGS[family], (5, 1, 9)
    _, attention = counted(config, lengths, monkeypatch)
    hidden = sum(length * (length - 1) // 2 for length in lengths) * 4 * config.num_heads * config.head_dim * config.num_layers
    assert of_kind(from_config(config), [(length, 0) for length in lengths], Kind.ATTENTION) == attention - hidden


def test_latent_attention_is_what_torch_counts_in_transformers_deepseek():
    """Its layers without experts, a prompt at once: keys and values are expanded there too."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=10,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=5,
    )
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built(torch.arange(9)[None])
    model = read(json.loads(config.to_json_string(use_diff=False)))
    counts = counter.get_flop_counts()["Global"]
    square = 2 * 2 * 4 * 81 * (10 + 5)
    assert sum(counts.values()) - counts[torch.ops.aten.mm] == square
    assert of_kind(model, [(9, 0)], Kind.GEMM, rows=9) == counts[torch.ops.aten.mm]
    assert of_kind(model, [(9, 0)], Kind.ATTENTION) == square * 45 // 81


def test_token_by_token_is_as_much_as_at_once():
    model = from_config(CONFIGS["gemma"])
    assert flops(model, [(9, 4)], rows=9) == sum(flops(model, [(1, context)]) for context in range(4, 13))
    for chunk in (1, 2, 5):
        whole = sum(flops(model, [(min(chunk, 9 - start), 4 + start)], rows=0) for start in range(0, 9, chunk))
        assert whole == flops(model, [(9, 4)], rows=0)


def test_pairs_are_the_keys_that_each_query_sees():
    for query, context, window in itertools.product((1, 2, 5, 9), (0, 1, 3, 20), (None, 1, 3, 6, 50)):
        seen = [context + i + 1 if window is None else min(context + i + 1, window) for i in range(query)]
        assert pairs(query, context, window) == sum(seen)
        keys = {key for i in range(query) for key in range(context + i + 1)[-(window or 10**9) :]}
        span = summed([(query, context)], (window,)).spans[0]
        assert (span.decode_keys if query == 1 else span.prefill_keys) == len(keys)


def test_two_flops_a_parameter_and_token():
    """A decoded token costs 2 P less what is no product (norms, biases), plus its attention."""
    for name in ("smollm2-135m", "llama-2-70b", "mixtral-8x7b", "palm-540b", "gpt3-175b"):
        model = architecture(name)
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * 100
        assert flops(model, [(1, 99)]) - attention == pytest.approx(2 * active_parameters(model), rel=2e-3)
    body, logits = flops(architecture("smollm2-135m"), [(1, 0)], rows=0), flops(architecture("smollm2-135m"), [(1, 0)])
    assert (round(body / 1e6), round(logits / 1e6)) == (212, 269)


@pytest.mark.parametrize("name", published())
def test_the_closed_form_is_the_sum_of_the_list(name):
    model = architecture(name)
    layouts = [Layout(), Layout(pipeline_parallel=4)]
    if (
        name != "qwen2.5-0.5b"
        and model.num_heads % 4 == 0
        and (model.latent or model.num_kv_heads in (1, 2) or model.num_kv_heads % 4 == 0)
    ):
        layouts += [Layout(4), Layout(4, 3, sequence_parallel=True)]
    if model.mixture is not None:
        layouts += [Layout(2, expert_parallel=8, data_parallel=4), Layout(1, 2, 4, 4), Layout(4, 1, 2, sequence_parallel=True)]
    for layout, batch in itertools.product(layouts, (MIXED, [(1, 30)] * 9, [(64, 7)])):
        for stage in range(layout.pipeline_parallel):
            work = Work(model, layout, Precision("int4", kv="fp8"), stage)
            sums = work.batch(batch)
            assert work.of(sums) == total(work.operations(sums))


def test_batches_add_up():
    windows = (4, None)
    parts = [summed([pair], windows) for pair in MIXED]
    assert sum(parts[1:], parts[0]) == summed(MIXED, windows)


def test_the_arrays_say_the_same():
    work = Work(MIXTRAL, Layout(2))
    batch = work.batch(MIXED)
    values, names = work.features(batch), ("flops", "weight_bytes", "kv_bytes", "read_bytes", "write_bytes", "message_bytes")
    for name in names:
        each = [sum(a * b for a, b in zip(row, values, strict=True)) for row in work.coefficients(name)]
        assert sum(value * row.repeat for value, row in zip(each, work.rows, strict=True)) == getattr(work.of(batch), name)


@pytest.mark.parametrize("name", published())
def test_a_device_alone_holds_every_parameter(name):
    model = architecture(name)
    assert Work(model).weight_bytes == 2 * parameters(model)
    assert Work(model).kv_bytes_per_token == kv_bytes_per_token(model)


@pytest.mark.parametrize("name", published())
def test_a_decode_of_many_reads_every_parameter_once(name):
    """Experts too when everybody's are wanted; of an embedding that is no head, and of positions, one row a token."""
    model, tokens = architecture(name), 4096
    read = Work(model).of(summed([(1, 9)] * tokens)).weight_bytes
    tables = model.position_table * model.hidden_size + (0 if model.tie_embeddings else model.vocab_size * model.hidden_size)
    looked_up = tokens * model.hidden_size * (2 if model.position_table else 1)
    assert read == 2 * (parameters(model) - tables + looked_up)


@pytest.mark.parametrize("name", ["llama-2-70b", "opt-66b", "mixtral-8x7b", "falcon-180b"])
def test_tensor_ranks_do_the_work_of_one_device(name):
    """In products and attention; embedding and norms are copied or shared out by tokens."""
    model, kinds = architecture(name), (Kind.GEMM, Kind.ATTENTION)

    def done(layout):
        (listed,) = operations(model, MIXED, layout=layout)
        return [operation for operation in listed if operation.kind in kinds and operation.name != "router"]

    whole = done(Layout())
    for tensor in (2, 4, 8):
        for one, rank in zip(whole, done(Layout(tensor)), strict=True):
            assert (one.name, one.flops) == (rank.name, tensor * rank.flops)
            assert one.kv_bytes == tensor * rank.kv_bytes
            assert one.weight_bytes == pytest.approx(tensor * rank.weight_bytes, rel=1e-3)  # a bias after the sum is on every rank


def test_pipeline_stages_do_the_work_of_one_device():
    for name in ("llama-2-70b", "deepseek-v3"):
        model, batch = architecture(name), MIXED
        stages = operations(model, batch, layout=Layout(pipeline_parallel=16))
        sends = [operation for stage in stages for operation in stage if operation.kind is Kind.SEND]
        assert [send.message_bytes for send in sends] == [2 * model.hidden_size * 13] * 15
        kept = [total(operation for operation in stage if operation.kind is not Kind.SEND) for stage in stages]
        assert sum(kept[1:], kept[0]) == Work(model).of(Work(model).batch(batch))
        works = [Work(model, Layout(pipeline_parallel=16), stage=stage) for stage in range(16)]
        assert sum(work.weight_bytes for work in works) == 2 * parameters(model)
        assert sum(work.kv_bytes_per_token for work in works) == kv_bytes_per_token(model)


def test_layers_fill_every_stage_evenly():
    for layers, stages in itertools.product((1, 5, 61, 80, 126), (1, 2, 3, 5, 16)):
        if layers >= stages:
            parts = [list(Layout(pipeline_parallel=stages).layers(layers, stage)) for stage in range(stages)]
            assert [*itertools.chain(*parts)] == list(range(layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts[-1]) == min(map(len, parts))


def test_collectives_of_tensor_parallelism():
    """Two all-reduces a layer (Shoeybi et al. 2019), one in a parallel block (Pope et al. 2023), one for the embedding; the logits' gather."""
    tokens = 13

    def messages(model, layout):
        (listed,) = operations(model, MIXED, layout=layout)
        found = [operation for operation in listed if operation.kind is Kind.COLLECTIVE]
        assert all((operation.ranks, operation.axis) == (8, Axis.TENSOR) for operation in found)
        return {
            name: sum(operation.repeat for operation in found if operation.name == name) for name in {operation.name for operation in found}
        }, [operation.message_bytes for operation in found]

    counts, sizes = messages(LLAMA70, Layout(8))
    assert counts == {"all_reduce": 2 * 80 + 1, "all_gather": 1}
    assert sizes[:-1] == [2 * 8192 * tokens] * 3
    assert sizes[-1] == 2 * 32000 * 5
    assert messages(architecture("palm-540b"), Layout(8))[0] == {"all_reduce": 118 + 1, "all_gather": 1}
    assert messages(LLAMA70, Layout(8, sequence_parallel=True))[0] == {"reduce_scatter": 2 * 80 + 1, "all_gather": 2 * 80 + 2}
    assert operations(LLAMA70, MIXED, layout=Layout(data_parallel=8)) == operations(LLAMA70, MIXED)


def test_a_batch_that_wants_no_logits_reads_no_head():
    (with_rows,) = operations(LLAMA70, [(64, 0)], layout=Layout(8))
    (without,) = operations(LLAMA70, [(64, 0)], layout=Layout(8), rows=0)
    assert [operation.name for operation in with_rows[len(without) :]] == ["norm", "lm_head", "all_gather"]
    assert not Work(LLAMA70).operations(summed([]))
    assert Work(LLAMA70).of(summed([])) == Totals()


def test_experts_that_a_batch_reads():
    assert [expected_experts(8, 2, tokens, 8) for tokens in (0, 1, 4, 100)] == [0, 2, 5, 8]
    one, many = (operations(MIXTRAL, [(1, 9)] * batch)[0] for batch in (1, 256))
    weights = 3 * 4096 * 14336 * 2 * 32
    assert total(op for op in one if op.name.startswith("experts_")).weight_bytes == 2 * weights
    assert total(op for op in many if op.name.startswith("experts_")).weight_bytes == 8 * weights
    gate_up = next(op for op in many if op.name == "experts_gate_up")
    assert (gate_up.matrices, gate_up.m, gate_up.n, gate_up.k) == (8, 64, 2 * 14336, 4096)
    assert total(op for op in many if op.name.startswith("experts_")).flops == 2 * 256 * 2 * 3 * 4096 * 14336 * 32


def test_experts_over_devices():
    """DeepSeek-V3 decoding on 64 devices with attention of their own: each sends 8 copies of its tokens and computes as many."""
    layout, tokens = Layout(1, expert_parallel=64, data_parallel=64), 128
    (listed,) = operations(DEEPSEEK, [(1, 1000)] * tokens, layout=layout)
    exchanges = [operation for operation in listed if operation.name == "all_to_all"]
    assert [(op.message_bytes, op.ranks, op.axis, op.repeat) for op in exchanges] == [(tokens * 8 * 7168 * 2, 64, Axis.EXPERT, 58)] * 2
    (gate_up,) = (operation for operation in listed if operation.name == "experts_gate_up")
    assert gate_up.flops == 2 * tokens * 8 * 2 * 2048 * 7168
    assert gate_up.matrices == 4  # 256 experts on 64 devices, all of them wanted by 8,192 tokens
    held = Work(DEEPSEEK, layout).weight_bytes
    routed = 58 * 256 * 3 * 7168 * 2048 * 2
    assert Work(DEEPSEEK).weight_bytes - held == routed - routed // 64


def test_latent_attention_expanded_and_absorbed():
    (listed,) = operations(DEEPSEEK, [(100, 28), (1, 999)])
    found = {operation.name: operation for operation in listed if operation.repeat == 58}
    heads, seen = 128, 100 * 28 + 100 * 101 // 2
    assert found["prefill_attention"].flops == 2 * heads * seen * (192 + 128)
    assert found["decode_attention"].flops == 2 * heads * 1000 * (576 + 512)
    assert found["decode_attention"].kv_bytes == 1000 * 576 * 2
    assert found["kv_up"].flops == 2 * 128 * 512 * heads * 256
    assert found["absorb_q"].flops + found["absorb_v"].flops == 2 * 512 * heads * 256  # for the one query what kv_up is for one key
    assert found["absorb_q"].weight_bytes + found["absorb_v"].weight_bytes == found["kv_up"].weight_bytes
    without = dataclasses.replace(DEEPSEEK, latent=None)
    assert operations(without, [(1, 999)])[0][4].kv_bytes == 2 * 2 * 128 * 128  # kv_write of plain heads, against 576 * 2


def test_more_ranks_than_key_value_heads_copy_them():
    eight, sixteen = Work(LLAMA70, Layout(8)), Work(LLAMA70, Layout(16))
    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token == kv_bytes_per_token(LLAMA70) // 8
    assert Work(architecture("palm-540b"), Layout(16)).kv_bytes_per_token == kv_bytes_per_token(architecture("palm-540b"))


def test_a_cache_split_by_sequences():
    """Pope et al. 2023, section 3.3: multiquery keys and values are read once instead of once a rank, for two small all-to-alls."""
    palm, batch = architecture("palm-540b"), [(1, 2047)] * 256
    copied, split = Work(palm, Layout(16)), Work(palm, Layout(16, batch_attention=True))
    assert split.kv_bytes_per_token * 16 == copied.kv_bytes_per_token == kv_bytes_per_token(palm)
    before, after = (work.of(work.batch(batch)) for work in (copied, split))
    assert (after.flops, after.weight_bytes, 16 * after.kv_bytes) == (before.flops, before.weight_bytes, before.kv_bytes)
    assert after.message_bytes - before.message_bytes == 2 * 118 * 256 * (48 * 256 // 16) * 2
    (listed,) = operations(palm, batch, layout=Layout(16, batch_attention=True))
    names = [operation.name for operation in listed]
    assert names[names.index("all_to_all") :][:3] == ["all_to_all", "decode_attention", "all_to_all"]
    (grouped,) = operations(LLAMA70, batch, layout=Layout(8, batch_attention=True))
    exchanges = [operation.message_bytes for operation in grouped if operation.name == "all_to_all"]
    assert exchanges == [256 * (8 + 2) * 128 * 2, 256 * 8 * 128 * 2]  # keys and values move as well where a rank projects some heads only
    with pytest.raises(InputError, match="with data_parallel instead"):
        Work(DEEPSEEK, Layout(8, batch_attention=True))


def test_formats():
    packed = Work(architecture("smollm2-135m"), precision=Precision("int4", "fp32", "fp8"))
    products = 106_203_456 - 61 * 576 + 28_311_552
    assert packed.weight_bytes == products * 9 // 16 + 61 * 576 * 4
    assert packed.kv_bytes_per_token == 46_080 // 4
    with pytest.raises(InputError, match="fp16"):
        Precision("f16")


def test_published_memory_of_a_t4_plan():
    """FlexGen's OPT-30B: 55.1 GiB of layers' matrices in fp16."""
    (listed,) = operations(architecture("opt-30b"), [(1, 0)])
    layers = [operation for operation in listed if operation.kind is Kind.GEMM and operation.name != "lm_head"]
    assert total(layers).weight_bytes / 2**30 == pytest.approx(55.125, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("smollm2-135m", {"tensor_parallel": 2}, r"9 attention heads.*choose tensor_parallel from 1, 3, 9"),
        ("qwen2.5-7b", {"tensor_parallel": 7}, r"4 key/value heads.*divisor or a multiple of 4"),
        ("llama-2-7b", {"pipeline_parallel": 33}, r"32 layers for 33 pipeline stages.*32 or less"),
        ("llama-2-7b", {"expert_parallel": 2, "data_parallel": 2}, r"no experts"),
        ("mixtral-8x7b", {"expert_parallel": 16, "data_parallel": 16}, r"8 experts.*from 1, 2, 4, 8"),
        ("opt-13b", {"tensor_parallel": 40}, None),
        ("yi-34b", {"tensor_parallel": 56}, r"intermediate_size is 20480.*choose"),
    ],
)
def test_layouts_that_a_model_does_not_allow(name, layout, said):
    if said is None:
        assert Work(architecture(name), Layout(**{**layout, "tensor_parallel": 20}))
        return
    with pytest.raises(InputError, match=said):
        Work(architecture(name), Layout(**layout))


def test_layouts_that_cannot_be():
    for wrong, said in (
        ({"tensor_parallel": 0}, "at least 1"),
        ({"sequence_parallel": True}, "splits nothing"),
        ({"batch_attention": True}, "splits nothing"),
        ({"expert_parallel": 3, "data_parallel": 4}, "does not divide the 4 devices"),
    ):
        with pytest.raises(InputError, match=said):
            Layout(**wrong)
    with pytest.raises(InputError, match="at least 1 query"):
        operations(LLAMA70, [(0, 4)])
    with pytest.raises(InputError, match="stage 2 of 2"):
        Work(LLAMA70, Layout(pipeline_parallel=2), stage=2)
