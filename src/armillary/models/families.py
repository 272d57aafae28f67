"""The families of decoders: each is a row of differences, read from Hugging Face's config.json and written back to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from armillary.core.errors import InputError
from armillary.kernels.activations import Activation
from armillary.models.config import ModelConfig
from armillary.models.fields import MAX_CONTEXT, Fields
from armillary.models.rope_json import read_rope, write_rope

Windows = Literal["none", "every layer", "from layer", "all but every"]


@dataclass(frozen=True)
class Family:
    """What one `model_type` means. A bias is fixed (True, False) or named by a key of config.json.

    `windows` says which layers slide: "every layer", those "from layer" `max_window_layers` on when
    `use_sliding_window`, or "all but every" `window_period`-th. `defaults` are transformers' for absent keys.
    """

    architecture: str  # as in GGUF, and ModelConfig.architecture
    model_type: str
    hf_class: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Windows = "none"
    window_period: int = 1
    local_rope: bool = False
    activation_key: str = "hidden_act"
    gemma: bool = False  # norm weights around zero, embeddings scaled by sqrt(hidden_size)
    sandwich_norms: bool = False
    query_scalar: bool = False  # attention scale query_pre_attn_scalar ** -0.5
    softcaps: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA_DEFAULTS: dict[str, Any] = {"head_dim": 256, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True}
_GEMMA_DEFAULTS |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
_LLAMA_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2}
_ATTENTION_BIAS: Mapping[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}

FAMILIES = (
    # Llama 1-3, SmolLM 1-2, TinyLlama, Yi, ...
    Family("llama", "llama", "LlamaForCausalLM", **_ATTENTION_BIAS, mlp_bias="mlp_bias", defaults=_LLAMA_DEFAULTS),
    Family(
        "mistral",
        "mistral",
        "MistralForCausalLM",
        windows="every layer",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, **_LLAMA_DEFAULTS},
    ),
    # Qwen 1.5, 2 and 2.5
    Family("qwen2", "qwen2", "Qwen2ForCausalLM", qkv_bias=True, windows="from layer", defaults={"sliding_window": 4096}),
    Family(
        "qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        **_ATTENTION_BIAS,
        qk_norm=True,
        windows="from layer",
        defaults={"head_dim": 128, "sliding_window": 4096},
    ),
    # Gemma 1 writes hidden_act "gelu" and means the tanh approximation; hidden_activation, where present, overrides it.
    Family(
        "gemma", "gemma", "GemmaForCausalLM", **_ATTENTION_BIAS, gemma=True, activation_key="hidden_activation", defaults=_GEMMA_DEFAULTS
    ),
    Family(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        **_ATTENTION_BIAS,
        windows="all but every",
        window_period=2,
        activation_key="hidden_activation",
        gemma=True,
        sandwich_norms=True,
        query_scalar=True,
        softcaps=True,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Family(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        **_ATTENTION_BIAS,
        qk_norm=True,
        windows="all but every",
        window_period=6,
        local_rope=True,
        activation_key="hidden_activation",
        gemma=True,
        sandwich_norms=True,
        query_scalar=True,
        softcaps=True,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "rope_theta": 1_000_000.0},
    ),
)
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_UNSUPPORTED = {  # key: what its presence (not null, false, 0 or empty) means
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "weights quantised in a Hugging Face folder",
    "use_bidirectional_attention": "bidirectional attention",
}


def known() -> str:
    """The known families, for an error or a list."""
    return ", ".join(f"{family.model_type} ({family.hf_class})" for family in FAMILIES)


def from_hf(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json.

    Raises InputError for what no family here can run, naming it, and FormatError for a missing or senseless value.
    """
    family = _family_of(raw, source)
    for key, meaning in _UNSUPPORTED.items():
        if raw.get(key):
            raise InputError(
                f"{source}: {key}: {meaning} is not supported", f"choose a dense decoder of a known family: {known()}", field=key
            )
    fields = Fields(raw, source, family.defaults)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers, head_dim = fields.integer("num_hidden_layers", high=4096), fields.integer("head_dim", max(1, hidden // heads))
    max_context = fields.integer("max_position_embeddings", high=MAX_CONTEXT)
    rope, local_rope = read_rope(fields, max_context, family.local_rope)
    scalar = fields.number("query_pre_attn_scalar") if family.query_scalar else float(head_dim)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_context=max_context,
        norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        rope=rope,
        local_rope=local_rope,
        windows=_windows(family, fields, layers),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=_bias(family.qkv_bias, fields),
        o_bias=_bias(family.o_bias, fields),
        mlp_bias=_bias(family.mlp_bias, fields),
        qk_norm=family.qk_norm,
        activation=_activation(family, fields),
        attention_scale=None if scalar == head_dim else scalar**-0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping") if family.softcaps else None,
        logit_softcap=fields.optional_number("final_logit_softcapping") if family.softcaps else None,
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        norm_offset=1.0 if family.gemma else 0.0,
        sandwich_norms=family.sandwich_norms,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_hf` reads back to an equal config. Raises InputError for one that its family cannot express."""
    family = next((family for family in FAMILIES if family.architecture == config.architecture), None)
    if family is None:
        raise InputError(f"architecture {config.architecture!r} has no Hugging Face form here", f"known families: {known()}")
    eos = list(config.eos_token_ids)
    out: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        family.activation_key: "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        **write_rope(config.rope, config.local_rope),
    }
    biases = ((family.qkv_bias, config.qkv_bias), (family.o_bias, config.o_bias), (family.mlp_bias, config.mlp_bias))
    out |= {key: value for key, value in biases if isinstance(key, str)}
    if family.architecture == "gemma":
        out["hidden_act"] = out["hidden_activation"]  # transformers 5 reads the one, older versions the other
    if family.query_scalar:
        out["query_pre_attn_scalar"] = round(config.scale**-2)
    if family.softcaps:
        out |= {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap}
    if family.windows != "none":
        out |= _window_keys(family, config)
    _check_expressed(config, from_hf(out, "the written config.json"), family)
    return out


def _check_expressed(config: ModelConfig, back: ModelConfig, family: Family) -> None:
    canonical = dataclasses.replace(
        config,
        windows=config.windows if any(config.windows) else (),
        attention_scale=None if config.scale == config.head_dim**-0.5 else config.attention_scale,
    )
    for item in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(canonical, item.name), getattr(back, item.name)
        if item.name == "attention_scale" and abs(config.scale - back.scale) <= 1e-6 * config.scale:
            continue
        if ours != theirs:
            raise InputError(
                f"a {family.model_type} config.json cannot express {item.name} = {ours} (it would be read back as {theirs})",
                f"change it, or choose another of the families {known()}",
                field=item.name,
            )


def _family_of(raw: Mapping[str, Any], source: str) -> Family:
    model_type, classes = raw.get("model_type"), raw.get("architectures") or []
    classes = classes if isinstance(classes, list) else [classes]
    family = next((f for f in FAMILIES if f.model_type == model_type or (model_type is None and f.hf_class in classes)), None)
    if model_type == "bert":
        raise InputError(
            f"{source}: this is an encoder (bert): it makes embeddings and writes no text",
            "armillary serve it, and ask /v1/embeddings or /rerank",
        )
    if family is None or (classes and family.hf_class not in classes):
        what = f"model type {str(model_type)[:64]!r} ({', '.join(str(name)[:64] for name in classes[:3]) or 'no architecture named'})"
        raise InputError(f"{source}: {what} is not supported", f"known families: {known()}", field="model_type")
    return family


def _bias(rule: bool | str, fields: Fields) -> bool:
    return fields.flag(rule) if isinstance(rule, str) else rule


def _activation(family: Family, fields: Fields) -> Activation:
    name = fields.string(family.activation_key, "gelu_pytorch_tanh" if family.gemma else "silu")
    if name not in _ACTIVATIONS:
        raise InputError(
            f"{fields.source}: activation {name[:40]!r} is not supported", f"known: {', '.join(_ACTIVATIONS)}", field=family.activation_key
        )
    return _ACTIVATIONS[name]


def _windows(family: Family, fields: Fields, layers: int) -> tuple[int | None, ...]:
    """One window a layer, () when no layer slides. `layer_types`, where a family knows it, overrides the pattern."""
    if family.windows == "none":
        return ()
    window = fields.optional_integer("sliding_window", high=MAX_CONTEXT)
    if family.windows == "from layer" and not fields.flag("use_sliding_window"):
        window = None
    types = fields.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise fields.fail("layer_types", f"is not a list of {layers} layer types")
        if unknown := [kind for kind in types if kind not in ("full_attention", "sliding_attention")]:
            raise InputError(
                f"{fields.source}: layer type {str(unknown[0])[:40]!r} is not supported", "known: full_attention, sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if family.windows == "every layer" and not all(sliding) and window is not None:
            raise InputError(f"{fields.source}: layer_types mixes full and sliding layers", f"a {family.model_type} slides in every layer")
    elif family.windows == "every layer":
        sliding = [True] * layers
    elif family.windows == "from layer":
        first = fields.integer("max_window_layers", 28, low=0)
        sliding = [layer >= first for layer in range(layers)]
    else:
        period = fields.integer("sliding_window_pattern", family.window_period)
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
    windows = tuple(window if slides else None for slides in sliding)
    return windows if any(windows) else ()


def _window_keys(family: Family, config: ModelConfig) -> dict[str, Any]:
    sizes = sorted({window for window in config.windows if window})
    if len(sizes) > 1:
        raise InputError(f"windows of {sizes} tokens in one model", f"a {family.model_type} has one window size", field="windows")
    out: dict[str, Any] = {"sliding_window": sizes[0] if sizes else None}
    if family.windows == "every layer":
        return out
    sliding = [window is not None for window in config.windows] or [False] * config.num_layers
    out["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    if family.windows == "from layer":
        first = sliding.index(True) if any(sliding) else config.num_layers
        out |= {"use_sliding_window": bool(sizes), "max_window_layers": first}
    return out
