"""Which attention a KV policy wants of the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import Attend, AttentionSpec
from armillary.kernels.heavy_hitters import Budget, HeavyHitters
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span
from armillary.kernels.rolling_attention import RollingAttend
from armillary.models.config import ModelConfig
from armillary.models.rope import inverse_frequencies
from armillary.serve.kv_policies import KVPolicy
from armillary.serve.kv_policies.h2o import H2O

Attention = Callable[[Sequence[Span]], Attend]


def attention_of(kv: KVPolicy, cache: PagedCache, config: ModelConfig) -> tuple[Attention, int]:
    """An iteration's `Attend` for its spans, and the bytes that are held beside the cache. Raises InputError where torch has none."""
    if "torch" not in kv.backends:
        raise InputError(f"kv_policy {kv.name} has no kernels in the torch backend", "serve with --backend native", field="kv_policy")
    if isinstance(kv, H2O):
        state = HeavyHitters(cache, Budget(kv.heavy, kv.recent))
        return state.attend, state.nbytes
    if kv.seen.rolling:

        def frequencies(spec: AttentionSpec) -> Tensor:
            local = config.local_rope if spec.window is not None else None
            return inverse_frequencies(local if local is not None else config.rope, config.head_dim)

        return lambda spans: RollingAttend(cache, spans, kv.seen, frequencies), 0
    return lambda spans: PagedAttend(cache, spans), 0
