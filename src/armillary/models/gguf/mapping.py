"""GGUF tensor names and layouts against the decoder's parameters (Hugging Face's names).

Two layouts differ. Llama's query and key rows are stored for a rope that turns neighbouring pairs, so each head's rows are interleaved;
here, as in Hugging Face, a pair is (i, i + head_dim / 2). Gemma's norm weights are stored with their +1 already added.
"""

from __future__ import annotations

import numpy as np

from armillary.core.errors import FormatError
from armillary.models.config import ModelConfig
from armillary.models.gguf.metadata import architecture_name
from armillary.models.gguf.reader import GGUFFile

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NOT_WEIGHTS = frozenset({"rope_freqs.weight"})  # read into the config


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """GGUF name to Hugging Face name for every tensor that the model has."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    parts = dict(_LAYER)
    if config.sandwich_norms:
        parts |= {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    else:
        parts["ffn_norm"] = "post_attention_layernorm"
    if not config.qk_norm:
        del parts["attn_q_norm"], parts["attn_k_norm"]
    biased = {"attn_q", "attn_k", "attn_v"} if config.qkv_bias else set()
    biased |= {"attn_output"} if config.o_bias else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if config.mlp_bias else set()
    for layer in range(config.num_layers):
        for part, target in parts.items():
            names[f"blk.{layer}.{part}.weight"] = f"model.layers.{layer}.{target}.weight"
            if part in biased:
                names[f"blk.{layer}.{part}.bias"] = f"model.layers.{layer}.{target}.bias"
    return names


def tensor_shape(config: ModelConfig, gguf_name: str) -> tuple[int, ...]:
    """The row-major shape that a tensor of `tensor_names` must have."""
    part, kind = gguf_name.split(".")[-2:]
    d, f, q, kv = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if part in ("token_embd", "output"):
        return (config.vocab_size, d)
    if part.endswith("norm"):
        return (config.head_dim,) if part in ("attn_q_norm", "attn_k_norm") else (d,)
    rows, columns = {
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        "ffn_gate": (f, d),
        "ffn_up": (f, d),
        "ffn_down": (d, f),
    }[part]
    return (rows,) if kind == "bias" else (rows, columns)


def check_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, str]:
    """`tensor_names`, once every tensor is known to be there, of the right shape, and none is left over.

    It runs before anything is allocated: a config that the tensors do not bear out cannot ask for memory.
    """
    if config.num_layers > len(file.tensors):
        raise FormatError(f"{file.path.name}: {config.num_layers} layers cannot lie in {len(file.tensors)} tensors", "fetch the file again")
    names = tensor_names(config)
    missing = [name for name in names if name not in file.tensors]
    if missing:
        raise FormatError(f"{file.path.name}: {len(missing)} tensors are missing, first {missing[0]!r}", "fetch the file again")
    for name in names:
        have, want = file.tensors[name].shape, tensor_shape(config, name)
        if have != want:
            raise FormatError(f"{file.path.name}: tensor {name!r} has the shape {have}; its metadata says {want}", "fetch the file again")
    unknown = [name for name in file.tensors if name not in names and name not in NOT_WEIGHTS]
    if unknown:
        raise FormatError(
            f"{file.path.name}: {len(unknown)} tensors have no place in a {config.architecture} decoder, first {unknown[0]!r}",
            "the model has parts that this version does not run",
        )
    return names


def interleaved_heads(config: ModelConfig, gguf_name: str) -> int:
    """Heads of a tensor whose rows GGUF stores interleaved (Llama's q and k), else 0."""
    if architecture_name(config) != "llama":
        return 0
    part = gguf_name.split(".")[-2]
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part, 0)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, ...] from GGUF's order (pairs side by side) to halves; whole rows move, so quantised bytes may be given."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `deinterleave`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored_norm_offset(config: ModelConfig, gguf_name: str) -> float:
    """What GGUF has already added to a norm's weights."""
    return config.norm_offset if gguf_name.split(".")[-2].endswith("norm") else 0.0
