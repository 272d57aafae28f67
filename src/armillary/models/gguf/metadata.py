"""GGUF metadata to `ModelConfig` and back: which keys an architecture uses, and what their absence means.

Keys are prefixed with the architecture (`llama.block_count`). What the format leaves to the program that reads it is written down here as
llama.cpp decides it: the window pattern of Gemma, its local rope base and the attention scale of its largest sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from armillary.core.errors import FormatError, InputError
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.gguf.quant import dequantise
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.rope_factors import fit_llama3, llama3_factors

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}  # every period-th layer attends to everything, the others through the window
MAX_SIZE = 1 << 24  # elements; also the longest context in tokens
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # these scale queries by hidden_size / num_heads instead of head_dim
_DEFAULT_SOFTCAPS = {"gemma2": (50.0, 30.0)}  # attention, logits


class Keys:
    """Typed, bounded access to one architecture's metadata; every complaint names the key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        self.metadata, self.architecture, self.source = metadata, architecture, source

    def name(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{key}"

    def get(self, key: str) -> Any:
        return self.metadata.get(self.name(key))

    def fail(self, key: str, problem: str, fix: str = "convert the model again with a current llama.cpp") -> FormatError:
        return FormatError(f"{self.source}: key {self.name(key)!r} {problem}", fix)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """One integer, or an array of equal ones (a value a layer)."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if isinstance(value, np.ndarray) and value.ndim == 1 and len(value) and value.dtype.kind in "iu":
            if (value != value[0]).any():
                raise self.fail(key, "differs from layer to layer, which this version does not run", "choose a model with equal layers")
            value = int(value[0])
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"is {str(value)[:40]!r}, not an integer")
        if not low <= value <= high:
            raise self.fail(key, f"is {value:,}; {low:,} to {high:,} are allowed")
        return value

    def real(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float | None:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"is {str(value)[:40]!r}, not a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.fail(key, f"is {value}; {low:g} to {high:g} are allowed")
        return _shortest(value)

    def string(self, key: str, default: str = "") -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "is not a string")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 key stands for: 1e-5 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else float(value)


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model that the file describes. Raises `FormatError` (a bad or missing key), `InputError` (a model this version cannot run)."""
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and factors.elements > MAX_SIZE:
        raise FormatError(f"{file.path.name}: rope_freqs.weight has {factors.elements:,} elements", "one per rotated pair is needed")
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return config_from(file.metadata, shapes, None if factors is None else dequantise(factors).reshape(-1), file.path.name)


def config_from(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None, source: str = "GGUF"
) -> ModelConfig:
    """`ModelConfig` from metadata, tensor shapes and, when present, the values of `rope_freqs.weight`."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError(f"{source}: key 'general.architecture' is missing", "the file holds no model; give a model's GGUF")
    if architecture not in ARCHITECTURES:
        raise InputError(f"{source}: architecture {architecture[:64]!r} is not supported", f"choose one of {', '.join(ARCHITECTURES)}")
    keys = Keys(metadata, architecture, source)
    if keys.integer("expert_count", 0, low=0):
        raise InputError(f"{source}: a mixture of {keys.get('expert_count')} experts is not supported", "choose a dense model")
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise FormatError(f"{source}: the matrix token_embd.weight is missing", "fetch the file again; for a split model, merge it first")
    gemma = architecture.startswith("gemma")
    hidden, layers, heads = keys.integer("embedding_length"), keys.integer("block_count", high=4096), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise InputError(
                f"{source}: {keys.name(key)} is {keys.get(key)}, the head dimension {head_dim}", "only equal ones are supported"
            )
    attention_softcap, logit_softcap = _DEFAULT_SOFTCAPS.get(architecture, (None, None))
    windows = _windows(keys, layers)
    rope = _rope(keys, head_dim, rope_factors)
    eos = [keys.integer(f"tokenizer.ggml.{kind}_token_id", -1, low=0) for kind in ("eos", "eot")]
    bos = keys.integer("tokenizer.ggml.bos_token_id", -1, low=0)
    eps = keys.real("attention.layer_norm_rms_epsilon", low=1e-12, high=1.0)
    if eps is None:
        raise keys.fail("attention.layer_norm_rms_epsilon", "is missing")
    scale = keys.real("attention.scale", low=1e-6)
    if scale is None and layers == _GEMMA_27B_LAYERS.get(architecture):
        scale = (hidden / heads) ** -0.5
    try:
        return ModelConfig(
            architecture="mistral" if architecture == "llama" and windows else architecture,
            vocab_size=shapes["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=keys.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=keys.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=keys.integer("context_length"),
            norm_eps=eps,
            rope=rope,
            local_rope=RopeConfig(theta=keys.real("rope.freq_base_swa", 10_000.0, low=1.0) or 0) if architecture == "gemma3" else None,
            windows=windows,
            tie_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            o_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias="blk.0.ffn_down.bias" in shapes,
            qk_norm="blk.0.attn_q_norm.weight" in shapes,
            activation="gelu_tanh" if gemma else "silu",
            attention_scale=scale,
            attention_softcap=keys.real("attn_logit_softcapping", attention_softcap) or None,
            logit_softcap=keys.real("final_logit_softcapping", logit_softcap) or None,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            norm_offset=1.0 if gemma else 0.0,
            sandwich_norms=architecture in ("gemma2", "gemma3"),
            bos_token_id=None if bos < 0 else bos,
            eos_token_ids=tuple(dict.fromkeys(i for i in eos if i >= 0)),
        )
    except FormatError:
        raise
    except InputError as error:
        raise FormatError(f"{source}: {error.problem}", error.fix) from error


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    window = keys.integer("attention.sliding_window", 0, low=0)
    if not window:
        return ()
    pattern = keys.get("attention.sliding_window_pattern")
    if pattern is None or isinstance(pattern, int):
        period = keys.integer("attention.sliding_window_pattern", WINDOW_PERIOD.get(keys.architecture, 0), low=0)
        local = [not period or layer % period < period - 1 for layer in range(layers)]
    elif isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
        local = [bool(value) for value in pattern]
    else:
        raise keys.fail("attention.sliding_window_pattern", f"is neither a period nor {layers} booleans")
    return tuple(window if here else None for here in local) if any(local) else ()


def _rope(keys: Keys, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    theta = keys.real("rope.freq_base", 10_000.0, low=1.0)
    assert theta is not None
    kind = keys.string("rope.scaling.type", "none")
    factor = keys.real("rope.scaling.factor", low=1e-3) or keys.real("rope.scale_linear", low=1e-3)
    if factors is not None:
        if kind not in ("none", ""):
            raise InputError(f"{keys.source}: rope factors and {kind} scaling at once are not supported", "choose another model")
        return fit_llama3(factors, theta, head_dim, keys.source)
    if kind in ("none", "") and (factor is None or factor == 1.0):
        return RopeConfig(theta=theta)
    if factor is None:
        raise keys.fail("rope.scaling.factor", f"is missing for {kind[:20]} scaling")
    if kind in ("none", "", "linear"):
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind != "yarn":
        raise InputError(f"{keys.source}: rope scaling {kind[:40]!r} is not supported", "none, linear, yarn and Llama 3's factors are")
    # The stored factor multiplies YaRN's own temperature; ours replaces it.
    attention = keys.real("rope.scaling.yarn_attn_factor") or keys.real("rope.scaling.attn_factor")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0) or 32.0,
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0) or 1.0,
        attention_factor=None if attention is None else attention * _temperature(factor),
    )


def _temperature(factor: float) -> float:
    """YaRN's scaling of attention (Peng et al. 2023, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


# -- writing ----------------------------------------------------------------------------------------------------


def architecture_name(config: ModelConfig) -> str:
    """The GGUF architecture that a config is written as (Mistral is stored as llama)."""
    name = {"mistral": "llama", "smollm": "llama", "gemma3_text": "gemma3"}.get(config.architecture, config.architecture)
    if name not in ARCHITECTURES:
        raise InputError(f"architecture {config.architecture!r} cannot be written as GGUF", f"choose one of {', '.join(ARCHITECTURES)}")
    return name


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that describe `config`; floats become float32, integers uint32. Inverse of `config_from` up to those roundings."""
    name = architecture_name(config)
    out: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.context_length": config.max_context,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_heads,
        f"{name}.attention.head_count_kv": config.num_kv_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.rope.dimension_count": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{name}.rope.freq_base": float(config.rope.theta),
    }
    if config.attention_scale is not None:
        out[f"{name}.attention.scale"] = float(config.attention_scale)
    softcaps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap}
    for key, value in softcaps.items():
        if value is not None or name in _DEFAULT_SOFTCAPS:
            out[f"{name}.{key}"] = float(value or 0.0)
    if any(config.windows):
        sizes = {window for window in config.windows if window}
        if len(sizes) > 1:
            raise InputError(f"windows of {sorted(sizes)} tokens in one model cannot be written as GGUF", "use one window size")
        out[f"{name}.attention.sliding_window"] = sizes.pop()
        period = WINDOW_PERIOD.get(name, 0)
        if any((window is not None) != (not period or i % period < period - 1) for i, window in enumerate(config.windows)):
            out[f"{name}.attention.sliding_window_pattern"] = np.array([window is not None for window in config.windows])
    if config.local_rope is not None:
        out[f"{name}.rope.freq_base_swa"] = float(config.local_rope.theta)
    rope = config.rope
    if rope.kind in ("linear", "yarn"):
        out[f"{name}.rope.scaling.type"] = rope.kind
        out[f"{name}.rope.scaling.factor"] = float(rope.factor)
    if rope.kind == "yarn":
        out[f"{name}.rope.scaling.original_context_length"] = rope.original_context or config.max_context
        out[f"{name}.rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        out[f"{name}.rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
        from armillary.models.rope import attention_scaling  # torch is needed to write a config, not to read one

        relative = attention_scaling(rope) / _temperature(rope.factor)
        if not math.isclose(relative, 1.0):
            out[f"{name}.rope.scaling.attn_factor"] = relative
    return out


def check_representable(config: ModelConfig, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reads the metadata back and refuses a config that GGUF would change (an activation or rope that its architecture does not have)."""
    factors = llama3_factors(config.rope, config.head_dim) if config.rope.kind == "llama3" else None
    back = config_from(metadata, shapes, factors, "the model")
    # Not compared: Mistral's name, the ids (they come with the tokenizer), and what is stored inside the norm weights.
    same = {"architecture", "bos_token_id", "eos_token_ids", "norm_offset", "attention_scale", "windows", "rope", "local_rope"}
    pairs = {
        field.name: (getattr(config, field.name), getattr(back, field.name))
        for field in dataclasses.fields(config)
        if field.name not in same
    }
    layers = range(config.num_layers)
    pairs["windows"] = ([config.window(i) for i in layers], [back.window(i) for i in layers])
    pairs["attention_scale"] = (config.scale, back.scale)
    for name, (ours, theirs) in pairs.items():
        if ours != theirs and not (isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6)):
            raise _cannot_express(config, name, ours, theirs)
    for name in ("rope", "local_rope"):
        mine, read = getattr(config, name), getattr(back, name)
        if (mine is None) != (read is None) or (mine is not None and not _same_rope(mine, read, config.head_dim)):
            raise _cannot_express(config, name, mine, read)


def _same_rope(left: RopeConfig, right: RopeConfig, head_dim: int) -> bool:
    from armillary.models.rope import attention_scaling, inverse_frequencies

    ours, theirs = inverse_frequencies(left, head_dim).numpy(), inverse_frequencies(right, head_dim).numpy()
    return np.allclose(ours, theirs, rtol=1e-5, atol=0) and math.isclose(attention_scaling(left), attention_scaling(right), rel_tol=1e-6)


def _cannot_express(config: ModelConfig, name: str, ours: object, theirs: object) -> InputError:
    return InputError(
        f"GGUF's {architecture_name(config)} cannot express {name} = {ours} (it would be read back as {theirs})",
        "write a Hugging Face folder instead",
    )
