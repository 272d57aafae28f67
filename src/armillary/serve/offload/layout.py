"""How many bytes of the accelerator a policy needs for a model, part by part, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from armillary.core.errors import CapacityError
from armillary.core.units import format_bytes
from armillary.kernels.paged_attention import GATHER_BYTES
from armillary.models.config import ModelConfig
from armillary.serve.offload.arena import rounded
from armillary.serve.offload.compress import compressed_bytes, scratch_bytes
from armillary.serve.offload.policy import EVERYTHING_HERE, OffloadPolicy, Split, Tier


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest iteration, and the pool. `context` is the longest sequence in tokens."""

    num_blocks: int
    block_size: int
    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a layer: the module that reads it, the tensors of the model that it is made of, one below the other, and its shape."""

    module: str
    leaf: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the numbers that a layer computes with."""
        return rounded(4 * math.prod(self.shape))

    def stored(self, compress: bool) -> int:
        """Bytes at its home: only matrices are compressed."""
        return rounded(self.shape[0] * compressed_bytes(self.shape[1])) if compress and len(self.shape) == 2 else self.nbytes


def block_pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """The tensors of a layer, in the order in which they lie. Projections of the same input are one matrix."""
    h, inner, heads, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )

    def linear(module: str, names: tuple[str, ...], rows: int, columns: int, bias: bool) -> list[Piece]:
        weight = Piece(module, "weight", tuple(f"{name}.weight" for name in names), (rows, columns))
        return [weight, Piece(module, "bias", tuple(f"{name}.bias" for name in names), (rows,))] if bias else [weight]

    def norm(module: str, size: int) -> Piece:
        return Piece(module, "weight", (f"{module}.weight",), (size,))

    qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
    pieces = [norm("input_layernorm", h), *linear("self_attn.qkv", qkv, heads + 2 * kv, h, config.qkv_bias)]
    if config.qk_norm:
        pieces += [norm(f"self_attn.{name}_norm", config.head_dim) for name in "qk"]
    pieces += [*linear("self_attn.o_proj", ("self_attn.o_proj",), h, heads, config.o_bias), norm("post_attention_layernorm", h)]
    pieces += linear("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), 2 * inner, h, config.mlp_bias)
    pieces += linear("mlp.down_proj", ("mlp.down_proj",), h, inner, config.mlp_bias)
    if config.sandwich_norms:
        pieces += [norm("pre_feedforward_layernorm", h), norm("post_feedforward_layernorm", h)]
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes in bytes unless they say otherwise. Units are the layers and then the head, cut into pieces of a layer's size at most."""

    policy: OffloadPolicy
    unit_bytes: tuple[int, ...]  # as they are computed with
    stored_bytes: tuple[int, ...]  # of the units at their homes: what moves
    cache_row: int  # of a token's keys, or values, in a layer, at home
    weight_tiers: tuple[Tier, ...]  # of the units
    cache_tiers: tuple[Tier, ...]  # of the layers
    head_rows: int  # of a piece
    batch_sequences: int
    batch_tokens: int
    window_blocks: int  # of a batch
    resident_hidden: int  # batches
    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Of the accelerator's memory."""
        return sum(rounded(size) for _, size in self.parts)

    @property
    def weights_away(self) -> tuple[bool, ...]:
        """Of the units: whether one has to be brought into a buffer before it computes. What is compressed is expanded there."""
        return tuple(self.policy.compress or tier is not Tier.ARENA for tier in self.weight_tiers)

    @property
    def cache_away(self) -> tuple[bool, ...]:
        """The same of the layers' keys and values, and windows."""
        return tuple(self.policy.compress or tier is not Tier.ARENA for tier in self.cache_tiers)

    def check(self, capacity: int) -> None:
        """Raises CapacityError when the accelerator has not so much."""
        if self.total > capacity:
            raise CapacityError(
                f"offloading with {self.policy} needs {format_bytes(self.total)} of the accelerator, it has {format_bytes(capacity)}: "
                + ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts if size),
                "keep less of the weights or the cache there, use more batches, or raise offload_memory",
                field="offload_memory",
            )


def layout(config: ModelConfig, policy: OffloadPolicy, bounds: Bounds) -> Layout:
    """What `policy` takes for batches as large as `bounds` allows."""
    h, kv_numbers = config.hidden_size, config.num_kv_heads * config.head_dim
    pieces, kv_row = block_pieces(config), 4 * kv_numbers
    kept_row = compressed_bytes(kv_numbers) if policy.compress else kv_row
    block = sum(piece.nbytes for piece in pieces)
    head_rows = min(config.vocab_size, max(1, block // (4 * h)))
    heads = [min(head_rows, config.vocab_size - first) for first in range(0, config.vocab_size, head_rows)]
    units = (*(block for _ in range(config.num_layers)), *(rounded(4 * h * rows) for rows in heads))
    stored_heads = (rows * compressed_bytes(h) if policy.compress else 4 * h * rows for rows in heads)
    stored = (*(sum(piece.stored(policy.compress) for piece in pieces) for _ in range(config.num_layers)), *map(rounded, stored_heads))
    tiers = policy.weights.place(stored)
    block_bytes = 2 * bounds.block_size * kv_row
    pool = rounded(bounds.num_blocks * bounds.block_size * kept_row)  # keys or values of a layer
    cache = policy.cache.place([2 * pool] * config.num_layers)
    sequences = -(-bounds.sequences // policy.batches)
    tokens = max(sequences, -(-bounds.tokens // policy.batches))
    longest = min(bounds.num_blocks, -(-bounds.context // bounds.block_size))
    window = min(bounds.num_blocks, max(longest, -(-bounds.num_blocks // policy.batches)))
    away = policy.compress or any(tier is not Tier.ARENA for tier in cache)
    resident = sum(tier is Tier.ARENA for tier in policy.hidden.place([1] * policy.batches)) if policy.batches > 1 else 0
    parts = (
        ("weights", sum(size for size, tier in zip(stored, tiers, strict=True) if tier is Tier.ARENA) + rounded(4 * h)),
        ("weight buffers", 2 * max(units) if policy.compress or any(tier is not Tier.ARENA for tier in tiers) else 0),
        ("cache", sum(2 * pool for tier in cache if tier is Tier.ARENA)),
        ("cache windows", 4 * rounded(window * block_bytes // 2) if away else 0),
        ("activations", (2 + resident) * rounded(4 * tokens * h)),
        (
            "workspace",
            workspace(
                config, tokens, sequences, head_rows, longest * bounds.block_size, window * bounds.block_size, compress=policy.compress
            ),
        ),
    )
    return Layout(policy, units, stored, kept_row, tiers, cache, head_rows, sequences, tokens, window, resident, parts)


def workspace(
    config: ModelConfig, tokens: int, sequences: int, head_rows: int, longest: int, window: int, *, compress: bool = False
) -> int:
    """Bytes of a layer's intermediate results for `tokens` tokens, and of the keys gathered for them. An upper bound.

    `longest`: tokens of a sequence, `window`: tokens of all sequences of a batch at most. `compress`: also of what both lanes are expanding
    and the new keys and values, rounded and compressed.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = 3 * (q + 2 * kv) + 2 * q + 4 * config.intermediate_size + 4 * config.hidden_size + 4 * config.head_dim
    gathered = 2 * max(4 * longest * kv, min(GATHER_BYTES, 4 * 2 * window * kv))
    masks = 4 * tokens * longest if any(config.windows) or config.attention_softcap is not None else 4 * sequences * longest
    scores = 4 * masks * config.num_heads if config.attention_softcap is not None else 0
    lanes = 0
    if compress:
        matrices = [(head_rows, config.hidden_size), *(piece.shape for piece in block_pieces(config) if len(piece.shape) == 2)]
        row = compressed_bytes(kv)
        lanes = max(scratch_bytes(*shape) for shape in matrices) + scratch_bytes(window, kv) + window * row
        lanes += 2 * tokens * (4 * kv + row) + scratch_bytes(tokens, kv)
    return 4 * tokens * max(rows, head_rows + config.hidden_size) + gathered + 2 * masks + scores + lanes


def fit(
    config: ModelConfig, bounds: Bounds, capacity: int, batches: int = 1, memory: int | None = None, *, compress: bool = False
) -> OffloadPolicy:
    """As much in the accelerator's `capacity` bytes as goes there, in whole percents: weights first, all of which every iteration reads, then the cache.

    The rest is in RAM, and weights that `memory` bytes of it do not hold are on disk. Raises CapacityError when not even the buffers fit.
    """
    total = sum(layout(config, OffloadPolicy(compress=compress), bounds).stored_bytes)

    def policy(weights: int, cache: int) -> OffloadPolicy:
        away = 1 - weights / 100
        ram = away if memory is None else min(away, max(0.0, memory / total))
        split = Split(weights / 100, ram, max(0.0, away - ram))
        return OffloadPolicy(split, Split(cache / 100, 1 - cache / 100), EVERYTHING_HERE, batches, compress)

    shares = [(100, cache) for cache in range(100, 0, -1)] + [(weights, 0) for weights in range(100, -1, -1)]
    for weights, cache in shares:
        candidate = policy(weights, cache)
        if layout(config, candidate, bounds).total <= capacity:
            return candidate
    least = replace(policy(0, 0), hidden=Split(0.0, 1.0))
    layout(config, least, bounds).check(capacity)
    return least
