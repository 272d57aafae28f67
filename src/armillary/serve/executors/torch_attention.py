"""Which attention a KV policy wants of the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import Attend, AttentionSpec
from armillary.kernels.block_memory import BlockMemory
from armillary.kernels.heavy_hitters import Budget, HeavyHitters
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span
from armillary.kernels.rolling_attention import RollingAttend
from armillary.kernels.sparse_prefill import Kind, Pattern, SparsePrefill, Work
from armillary.models.config import ModelConfig
from armillary.models.rope import inverse_frequencies
from armillary.serve.executors.pattern_search import load_patterns
from armillary.serve.kv_policies import KVPolicy
from armillary.serve.kv_policies.h2o import H2O
from armillary.serve.kv_policies.infllm import InfLLM
from armillary.serve.kv_policies.minference import MInference

Attention = Callable[[Sequence[Span]], Attend]


def attention_of(kv: KVPolicy, cache: PagedCache, config: ModelConfig) -> tuple[Attention, int]:
    """An iteration's `Attend` for its spans, and the bytes that are held beside the cache. Raises InputError where torch has none."""
    if "torch" not in kv.backends:
        raise InputError(f"kv_policy {kv.name} has no kernels in the torch backend", "serve with --backend native", field="kv_policy")
    if isinstance(kv, H2O):
        state = HeavyHitters(cache, Budget(kv.heavy, kv.recent))
        return state.attend, state.nbytes
    if isinstance(kv, MInference):
        return _sparse_prefill(kv, cache, config), 0

    def frequencies(spec: AttentionSpec) -> Tensor:
        local = config.local_rope if spec.window is not None else None
        return inverse_frequencies(local if local is not None else config.rope, config.head_dim)

    if isinstance(kv, InfLLM):
        memory = BlockMemory(cache, kv.near, kv.units, frequencies)
        return memory.attend, memory.nbytes
    if kv.seen.rolling:
        return lambda spans: RollingAttend(cache, spans, kv.seen, frequencies), 0
    return lambda spans: PagedAttend(cache, spans), 0


def _sparse_prefill(kv: MInference, cache: PagedCache, config: ModelConfig) -> Attention:
    every: list[list[Kind]] = [["vertical-slash"] * config.num_heads] * config.num_layers
    kinds = every if kv.patterns is None else load_patterns(Path(kv.patterns), config)
    sizes, work = (kv.options.sinks, kv.options.window, kv.options.budget), Work()
    patterns = [[Pattern(kind, *sizes) for kind in layer] for layer in kinds]
    return lambda spans: SparsePrefill(cache, spans, lambda layer, head: patterns[layer][head], work)
