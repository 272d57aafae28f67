"""Arithmetic of a training step, from the model's own shape: what MFU and HFU divide by the machine's peak.

MFU (Chowdhery et al. 2022, PaLM, appendix B): the FLOPs that the model needs, forward and backward, whoever computes them and however
often. HFU: those that are executed, recomputed activations included. Both count attention as PaLM does, without the causal half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from armillary.models.config import ModelConfig

if TYPE_CHECKING:
    from armillary.train.memory.checkpointing import Level


def flops_per_token(parameters: int, layers: int, heads: int, head_dim: int, length: float) -> float:
    """6 N + 12 L H Q T: PaLM's formula, on plain numbers. `length` T in tokens; `head_dim` Q."""
    return 6 * parameters + 12 * layers * heads * head_dim * length


def model_flops(config: ModelConfig, tokens: int, attended: int) -> float:
    """FLOPs of a forward and backward pass over `tokens`; `attended` is the sum over documents of length squared.

    For one document of T tokens that is T * (6 N + 12 L H Q T). N leaves out an input embedding that is only looked up (untied), and a
    layer with a sliding window w reads at most w keys a token.
    """
    return 3 * (_products(config, tokens) + _attention(config, tokens, attended))


def hardware_flops(config: ModelConfig, tokens: int, attended: int, plan: Sequence[Level] = ()) -> float:
    """FLOPs that are executed: those of the model and what is computed again under a plan, a level a block (none: nothing is)."""
    again = 0.0
    for layer, level in enumerate(plan):
        if level in ("attention", "full"):
            again += 2.0 * _computed_again(config) * tokens
        if level == "full":
            again += _attention_of(config, layer, tokens, attended)
    return model_flops(config, tokens, attended) + again


def _computed_again(config: ModelConfig) -> int:
    """Weights of a block's products that backward needs again. The last product's result is needed only where a norm follows it."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    products_of_mlp = 3 if config.sandwich_norms else 2
    return config.hidden_size * (2 * queries + 2 * keys + products_of_mlp * config.intermediate_size)


def parameters_in_products(config: ModelConfig) -> int:
    """PaLM's N: all parameters but an embedding that is only looked up."""
    return config.parameters() - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)


def _products(config: ModelConfig, tokens: int) -> float:
    """Forward: two FLOPs a parameter and token."""
    return 2.0 * parameters_in_products(config) * tokens


def _attention(config: ModelConfig, tokens: int, attended: int) -> float:
    """Forward: queries with keys, weights with values, in all blocks."""
    return sum(_attention_of(config, layer, tokens, attended) for layer in range(config.num_layers))


def _attention_of(config: ModelConfig, layer: int, tokens: int, attended: int) -> float:
    window = config.window(layer)
    return 4.0 * config.num_heads * config.head_dim * (attended if window is None else min(attended, window * tokens))
