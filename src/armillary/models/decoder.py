"""The decoder: one definition of the Llama family, for training, scoring and serving alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.kernels.attention import Attend, AttentionSpec
from armillary.kernels.gated import gated
from armillary.kernels.linear import FusedLinear, Linear
from armillary.kernels.norm import RMSNorm
from armillary.kernels.rope import apply_rope
from armillary.models.config import ModelConfig
from armillary.models.rope import Rope

Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023); one key/value head is multi-query, as many as heads is multi-head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.spec = AttentionSpec(layer, config.scale, config.window(layer), config.attention_softcap)
        sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.qkv = FusedLinear(("q_proj", "k_proj", "v_proj"), config.hidden_size, sizes, config.qkv_bias)
        self.o_proj = Linear(heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_offset) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_offset) if config.qk_norm else None

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        tokens, size = x.shape[0], self.head_dim
        q, k, v = self.qkv(x)
        q, k, v = q.view(tokens, -1, size), k.view(tokens, -1, size), v.view(tokens, -1, size)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, k, *angles)
        out: Tensor = self.o_proj(attend(self.spec, q, k, v).reshape(tokens, -1))
        return out


class MLP(nn.Module):
    """Gated feed-forward (Shazeer 2020): SwiGLU, GeGLU with the tanh approximation, or ReGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up = FusedLinear(("gate_proj", "up_proj"), config.hidden_size, (inner, inner), config.mlp_bias)
        self.down_proj = Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down_proj(gated(gate, up, self.activation))
        return out


class Block(nn.Module):
    """One layer. The norms carry Hugging Face's names, where `post_attention_layernorm` means two things:

    Llama: the norm before the MLP. Gemma 2 and 3: the norm after attention, before its residual sum.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        attention: Tensor = self.self_attn(self.input_layernorm(x), angles, attend)
        if self.sandwich:
            x = x + self.post_attention_layernorm(attention)
            mlp: Tensor = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + attention
            mlp = self.mlp(self.post_attention_layernorm(x))
        return x + mlp


class Decoder(nn.Module):
    """A decoder-only transformer over a flat, padding-free list of tokens.

    Which tokens belong together is the business of `attend`: whole packed sequences (`CausalAttend`) or a paged
    cache. Weights start as N(0, 0.02^2), biases at zero, norms as plain normalisation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.rope, config.head_dim)
        self.local_rope = Rope(config.local_rope, config.head_dim) if config.local_rope else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.tie()

    def tie(self) -> None:
        """Makes the head share the embedding's weight where the config says so. Call it after replacing the embedding's weight."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Logits of the next token. tokens, positions: [T] int64; rows: [R] int64, the tokens whose logits are wanted.

        `positions` count from 0 within each sequence. Returns [R, vocab] in the weights' dtype ([T, vocab] without `rows`).
        """
        x = self._layers(tokens, positions, attend)
        return self.head(self.norm(x if rows is None else x[rows]))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The final norm's output, what the head reads. tokens, positions: [T] int64. Returns [T, hidden_size]."""
        out: Tensor = self.norm(self._layers(tokens, positions, attend))
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab], soft-capped where the family does so."""
        logits: Tensor = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _layers(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        if self.config.embedding_scale != 1.0:
            # Gemma was trained with the scale rounded to the weights' dtype: 55.5 for sqrt(3072) in bfloat16.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu").item()
        angles = self.rope(positions, x.dtype)
        local_angles = self.local_rope(positions, x.dtype) if self.local_rope else angles
        for index, layer in enumerate(self.layers):
            x = layer(x, angles if self.config.window(index) is None else local_angles, attend)
        return x
