"""Rows of a layer's attention: grouped queries with cached keys and values, or queries with a compressed latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from armillary.models.graph.parameters import kv_elements
from armillary.models.graph.rows import Device, Row, Terms
from armillary.sim.operation import Axis, Kind


def attention(device: Device, span: int) -> Iterator[Row]:
    """A layer whose window is the model's `span`-th distinct one. Starts from the normed input, ends with a partial sum of the output."""
    return _grouped(device, span) if device.model.latent is None else _latent(device, span)


def _grouped(device: Device, span: int) -> Iterator[Row]:
    """Heads are split over tensor ranks (Shoeybi et al. 2019); with more ranks than key/value heads (Ainslie et al. 2023) each rank
    keeps a copy of the one that its queries read, unless they split the cache by sequences (Pope et al. 2023)."""
    model, tensor = device.model, device.layout.tensor_parallel
    heads, kv_heads, width = model.num_heads // tensor, max(1, model.num_kv_heads // tensor), model.head_dim
    queries, keys = heads * width, kv_heads * width
    yield device.gemm("qkv", queries + 2 * keys, model.hidden_size, bias=model.qkv_bias)
    if model.qk_norm:
        yield device.memory("qk_norm", queries + keys, queries + keys, weights=2 * width)
    if model.rope:
        yield device.memory("rope", queries + keys, queries + keys)
    over_batch = device.layout.batch_attention
    cached, elements = cached_bytes(device), device.precision.activation_bytes
    yield device.memory("kv_write", 2 * keys, 0, cached=cached)
    if over_batch:  # a rank that projects every key/value head has the keys of its sequences already
        moved = queries if kv_heads == model.num_kv_heads else queries + 2 * keys
        yield device.message("all_to_all", moved, tensor, Axis.TENSOR)
    for phase, queried, pairs in (("prefill", "prefill_tokens", "prefill_pairs"), ("decode", "decodes", "decode_keys")):
        yield Row(
            f"{phase}_attention",
            Kind.ATTENTION,
            f"any_{phase}",
            flops={f"{pairs}[{span}]": 4 * heads * width},
            kv_bytes={f"{phase}_keys[{span}]": cached},
            read_bytes={queried: elements(queries)},
            write_bytes={queried: elements(queries)},
            m=queried,
            n=heads,
            k=width,
        )
    if over_batch:
        yield device.message("all_to_all", queries, tensor, Axis.TENSOR)
    yield device.gemm("o", model.hidden_size, queries, bias=model.o_bias)


def cached_bytes(device: Device) -> int:
    """Bytes that a token leaves in the device's cache of one layer."""
    model, tensor = device.model, device.layout.tensor_parallel
    if model.latent is not None:
        return device.precision.kv_bytes(kv_elements(model))
    if device.layout.batch_attention:
        return -(-device.precision.kv_bytes(kv_elements(model)) // tensor)
    return device.precision.kv_bytes(2 * max(1, model.num_kv_heads // tensor) * model.head_dim)


def _latent(device: Device, span: int) -> Iterator[Row]:
    """Multi-head latent attention (DeepSeek-AI 2024, V2, section 2.1). Heads are split, the latent is copied to every tensor rank.

    Sequences in prefill expand the latents of all their keys into keys and values; decoding ones work on the latents themselves, with
    the up-projections absorbed into queries and outputs. Drafts that are verified count as prefill, which makes them dearer than kernels that
    absorb several queries would.
    """
    model, size = device.model, device.model.latent
    assert size is not None
    heads, key = model.num_heads // device.layout.tensor_parallel, size.nope_dim + size.rope_dim
    compressed, value = size.kv_rank + size.rope_dim, size.value_dim
    cached, elements = cached_bytes(device), device.precision.activation_bytes
    prefill_keys, decode_keys = f"prefill_keys[{span}]", f"decode_keys[{span}]"
    yield device.gemm("qkv_down", (size.q_rank or heads * key) + compressed, model.hidden_size)
    yield device.norm(size.q_rank + size.kv_rank, m="tokens", name="latent_norm")
    if size.q_rank:
        yield device.gemm("q_up", heads * key, size.q_rank)
    yield device.memory("rope", (heads + 1) * size.rope_dim, (heads + 1) * size.rope_dim)
    yield device.memory("kv_write", compressed, 0, cached=cached)
    expand = device.gemm("kv_up", heads * (size.nope_dim + value), size.kv_rank, m=prefill_keys, gate="any_prefill")
    yield replace(expand, kv_bytes={prefill_keys: cached}, read_bytes={})

    def attend(phase: str, queried: str, flops: Terms, kv: Terms, read: Terms, written: int, width: int) -> Row:
        write = {queried: elements(heads * written)}
        return Row(f"{phase}_attention", Kind.ATTENTION, f"any_{phase}", flops, {}, kv, read, write, m=queried, n=heads, k=width)

    pairs = {f"prefill_pairs[{span}]": 2 * heads * (key + value)}
    expanded = {"prefill_tokens": elements(heads * key), prefill_keys: elements(heads * (key + value))}
    yield attend("prefill", "prefill_tokens", pairs, {}, expanded, value, key)
    yield device.gemm("absorb_q", size.kv_rank, size.nope_dim, m="decodes", matrices=heads, gate="any_decode", copy=True)
    absorbed = {decode_keys: 2 * heads * (compressed + size.kv_rank)}
    yield attend("decode", "decodes", absorbed, {decode_keys: cached}, {"decodes": elements(heads * compressed)}, size.kv_rank, compressed)
    yield device.gemm("absorb_v", value, size.kv_rank, m="decodes", matrices=heads, gate="any_decode", copy=True)
    yield device.gemm("o", model.hidden_size, heads * value)
