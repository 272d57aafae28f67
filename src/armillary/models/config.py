"""One config type for every decoder of the Llama family: a family is a set of values here, not a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from armillary.core.errors import InputError
from armillary.kernels.activations import Activation

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how it is stretched beyond the trained context.

    `factor`, `original_context` and the rest are read only by the kinds that use them: `linear` (factor),
    `llama3` (factor, original_context, low_freq_factor, high_freq_factor), `yarn` (Peng et al. 2023: factor,
    original_context, beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of a decoder. Sizes are in elements; `max_context` in tokens.

    `windows[i]` is layer i's sliding window in tokens (None: full attention); `local_rope`, when given, is the
    rope of the layers that have a window (Gemma 3). `attention_scale` None means head_dim ** -0.5.
    `norm_offset` is added to every norm weight (Gemma: 1.0). `sandwich_norms` adds a norm after attention and
    after the MLP, before the residual sum (Gemma 2 and 3).
    """

    architecture: str  # as in GGUF: "llama", "qwen2", "qwen3", "mistral", "gemma2", ...
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", "a decoder needs at least 1", field=name)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly",
                "num_heads must be a multiple of num_kv_heads",
                field="num_kv_heads",
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}", "rotary embedding needs an even head_dim", field="head_dim")
        if self.windows and len(self.windows) != self.num_layers:
            raise InputError(f"windows has {len(self.windows)} values for {self.num_layers} layers", "give one a layer", field="windows")

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None for full attention."""
        return self.windows[layer] if self.windows else None

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def parameters(self) -> int:
        """Number of parameters, in closed form (SmolLM2-135M: 134,515,008)."""
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * d * q + 2 * d * kv + (q + 2 * kv) * self.qkv_bias + d * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * d * f + (2 * f + d) * self.mlp_bias
        norms = (4 if self.sandwich_norms else 2) * d
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + d + embeddings

    def kv_bytes_per_token(self, bytes_per_element: int = 4) -> int:
        """Bytes of keys and values that one token holds in the cache over all layers (SmolLM2-135M fp32: 46,080)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element
