"""The shape of a decoder for counting: what the repo's decoder runs, and published families that it does not."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.core.errors import InputError
from armillary.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts in place of a layer's MLP (Shazeer et al. 2017; Jiang et al. 2024, Mixtral; DeepSeek-AI 2024).

    Every token goes to `top_k` of `experts`, each `intermediate_size` wide, and through `shared` more of that width. The first
    `dense_layers` layers keep an MLP of the architecture's own width. `router_bias` is DeepSeek's selection bias, one value an expert.
    """

    experts: int
    top_k: int
    intermediate_size: int
    shared: int = 0
    dense_layers: int = 0
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024, V2): the cache holds `kv_rank` + `rope_dim` elements a token and layer.

    Queries come through a bottleneck of `q_rank` (0: none); a head's key is `nope_dim` + `rope_dim` wide and its value `value_dim`.
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int = 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer. Sizes are in elements, `max_context` in tokens; names are `ModelConfig`'s where it has them.

    `gated`: the MLP has a gate beside the up-projection (three matrices), else two. `norms` a layer, each with a bias where `norm_bias`
    (LayerNorm). `parallel`: attention and MLP read the same input and are summed once (PaLM, Falcon). `position_table`: learned positions.
    `windows` gives each layer's sliding window (None: full attention); empty means full attention everywhere. With `latent`,
    `num_kv_heads` and `head_dim` are not read.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    gated: bool = True
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: bool = False
    rope: bool = True
    position_table: int = 0
    parallel: bool = False
    windows: tuple[int | None, ...] = ()
    mixture: Mixture | None = None
    latent: Latent | None = None

    def __post_init__(self) -> None:
        if self.latent is None and self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.name}: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly",
                "num_heads must be a multiple of num_kv_heads",
                field="num_kv_heads",
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise InputError(
                f"{self.name}: windows has {len(self.windows)} values for {self.num_layers} layers", "give one a layer", field="windows"
            )
        mixture = self.mixture
        if mixture is not None and not (0 < mixture.top_k <= mixture.experts and 0 <= mixture.dense_layers <= self.num_layers):
            raise InputError(
                f"{self.name}: {mixture.top_k} of {mixture.experts} experts after {mixture.dense_layers} dense layers of {self.num_layers}",
                "top_k must be between 1 and experts, dense_layers at most num_layers",
                field="mixture",
            )

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None for full attention."""
        return self.windows[layer] if self.windows else None

    def mixed(self, layer: int) -> bool:
        """Whether a layer has experts in place of its MLP."""
        return self.mixture is not None and layer >= self.mixture.dense_layers


def from_config(config: ModelConfig, name: str = "") -> Architecture:
    """The architecture of a decoder that this repo runs."""
    return Architecture(
        name=name or config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_context=config.max_context,
        tie_embeddings=config.tie_embeddings,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        mlp_bias=config.mlp_bias,
        norms=4 if config.sandwich_norms else 2,
        qk_norm=config.qk_norm,
        windows=config.windows,
    )
