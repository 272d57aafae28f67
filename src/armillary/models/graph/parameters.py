"""How many parameters an architecture has, how many a token passes through, and what it leaves in the cache: closed forms."""

from __future__ import annotations

from armillary.models.graph.architecture import Architecture
from armillary.models.graph.precision import Precision


def parameters(model: Architecture) -> int:
    """All parameters (SmolLM2-135M: 134,515,008; DeepSeek-V3 without its extra prediction layer: 671,026,419,200)."""
    body = sum(_attention(model) + _norms(model) + mlp(model, layer) for layer in range(model.num_layers))
    return body + norm(model, model.hidden_size) + embeddings(model)


def active_parameters(model: Architecture) -> int:
    """Those that one token passes through: its experts only, and of an untied embedding only the head (DeepSeek-V3: 36.6B).

    Every one of them costs two FLOPs a token where it lies in a matrix.
    """
    idle = 0
    if model.mixture is not None:
        unused = model.mixture.experts - model.mixture.top_k
        idle = unused * _projections(model, model.mixture.intermediate_size) * sum(map(model.mixed, range(model.num_layers)))
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return parameters(model) - idle - looked_up - model.position_table * model.hidden_size


def embeddings(model: Architecture) -> int:
    """Embedding, head and learned positions."""
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2) + model.position_table * model.hidden_size


def kv_elements(model: Architecture) -> int:
    """Elements that one token leaves in the cache of one layer."""
    if model.latent is not None:
        return model.latent.kv_rank + model.latent.rope_dim
    return 2 * model.num_kv_heads * model.head_dim


def kv_bytes_per_token(model: Architecture, kv: str = "fp16") -> int:
    """Bytes that one token holds in the cache over all layers (LLaMA-2-70B fp16: 327,680; SmolLM2-135M fp32: 46,080)."""
    return model.num_layers * Precision(kv=kv).kv_bytes(kv_elements(model))


def norm(model: Architecture, width: int) -> int:
    """Parameters of one norm."""
    return width * (2 if model.norm_bias else 1)


def mlp(model: Architecture, layer: int) -> int:
    """Parameters of a layer's MLP, or of its router and all its experts."""
    if model.mixture is None or not model.mixed(layer):
        inner = model.intermediate_size
        return _projections(model, inner) + model.mlp_bias * ((2 if model.gated else 1) * inner + model.hidden_size)
    mixture = model.mixture
    experts = (mixture.experts + mixture.shared) * _projections(model, mixture.intermediate_size)
    return experts + mixture.experts * (model.hidden_size + mixture.router_bias)


def _projections(model: Architecture, inner: int) -> int:
    return (3 if model.gated else 2) * model.hidden_size * inner


def _norms(model: Architecture) -> int:
    return model.norms * norm(model, model.hidden_size)


def _attention(model: Architecture) -> int:
    hidden, heads = model.hidden_size, model.num_heads
    if (latent := model.latent) is not None:
        key = latent.nope_dim + latent.rope_dim
        queries = (
            hidden * latent.q_rank + norm(model, latent.q_rank) + latent.q_rank * heads * key if latent.q_rank else hidden * heads * key
        )
        down = hidden * (latent.kv_rank + latent.rope_dim) + norm(model, latent.kv_rank)
        return queries + down + latent.kv_rank * heads * (latent.nope_dim + latent.value_dim) + heads * latent.value_dim * hidden
    q, kv = heads * model.head_dim, model.num_kv_heads * model.head_dim
    biases = model.qkv_bias * (q + 2 * kv) + model.o_bias * hidden
    return 2 * hidden * q + 2 * hidden * kv + biases + model.qk_norm * 2 * model.head_dim
