"""From a name or a path to an architecture: published ones, models on this machine, and config.json files of families not run here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import InputError, NotFoundError
from armillary.models import hub
from armillary.models.config import ModelConfig
from armillary.models.config_file import MAX_CONFIG_BYTES, read_config
from armillary.models.fields import MAX_CONTEXT, Fields, read_json
from armillary.models.graph.architecture import Architecture, Latent, Mixture, from_config
from armillary.models.graph.published import published


def find(name: str) -> Architecture:
    """A published architecture by name; else the model of an alias, a .gguf file, a model folder or a config.json. No weights are read.

    Raises NotFoundError with the closest names, InputError for a family that neither the decoder nor this table knows.
    """
    known = published().get(name.lower())
    if known is not None:
        return known.architecture
    path = _path(name)
    if path.is_dir():
        raw = read_json(path / "config.json", MAX_CONFIG_BYTES)
        family = str(raw.get("model_type"))
        if family in FAMILIES:
            return FAMILIES[family](Fields(raw, str(path / "config.json")), path.name or family)
    return from_config(read_config(path), path.stem if path.is_file() else path.name)


def runnable(name: str) -> ModelConfig:
    """The configuration of a model that is here and that the decoder runs: what `find` of it forgets.

    Raises NotFoundError for one that is only published, InputError for a family that the decoder does not know.
    """
    if name.lower() in published():
        raise NotFoundError(
            f"{name} stands for a published architecture, and no engine computes it here", "name a model that is here (armillary models)"
        )
    return read_config(_path(name))


def _path(name: str) -> Path:
    """Where the model of an alias, a file or a folder lies."""
    path = Path(name)
    if path.name == "config.json" and path.is_file():
        return path.parent
    if path.exists() or name in hub.aliases():
        return hub.resolve(name, fetch=False)
    raise unknown(name)


def unknown(name: str) -> NotFoundError:
    """The error for what is no model: the closest names."""
    names = [*published(), *hub.aliases()]
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "`armillary models published` lists those without weights."
    return NotFoundError(f"there is no model {name[:200]!r}", f"{hint} A path to a config.json works too", field="model")


def read(raw: Mapping[str, Any], source: str = "config.json") -> Architecture:
    """The architecture of a Hugging Face config of one of `FAMILIES`. Raises InputError, or FormatError for a bad value."""
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise InputError(f"{source}: model_type {family[:40]!r} is not known here", f"known: {', '.join(FAMILIES)}")
    return FAMILIES[family](Fields(raw, source), family)


def _shape(fields: Fields, name: str, **more: Any) -> Architecture:
    """What most configs call the same; `more` replaces or adds."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    shape: dict[str, Any] = {
        "name": name,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.integer("num_hidden_layers", high=4096),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": max(1, hidden // heads),
        "max_context": fields.integer("max_position_embeddings", 2048, high=MAX_CONTEXT),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }
    if "intermediate_size" not in more:
        shape["intermediate_size"] = fields.integer("intermediate_size")
    return Architecture(**(shape | more))


_PLAIN: Final[dict[str, Any]] = {"gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm_bias": True, "rope": False}


def _opt(fields: Fields, name: str) -> Architecture:
    if not fields.flag("do_layer_norm_before", True) or fields.integer(
        "word_embed_proj_dim", fields.integer("hidden_size")
    ) != fields.integer("hidden_size"):
        raise InputError(f"{fields.source}: an OPT with norms after its blocks or a projected embedding (350M)", "choose another size")
    positions = fields.integer("max_position_embeddings") + 2  # its table starts at 2
    tied = fields.flag("tie_word_embeddings", True)
    return _shape(fields, name, intermediate_size=fields.integer("ffn_dim"), position_table=positions, **_PLAIN, tie_embeddings=tied)


def _gpt2(fields: Fields, name: str) -> Architecture:
    hidden, heads, context = fields.integer("n_embd"), fields.integer("n_head"), fields.integer("n_positions")
    return Architecture(
        name=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        num_layers=fields.integer("n_layer", high=4096),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(1, hidden // heads),
        max_context=context,
        position_table=context,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        **_PLAIN,
    )


def _falcon(fields: Fields, name: str) -> Architecture:
    if not fields.flag("new_decoder_architecture") and not fields.flag("multi_query", True):
        raise InputError(f"{fields.source}: a Falcon with plain heads (1B)", "choose Falcon 7B, 40B or 180B")
    new, biased = fields.flag("new_decoder_architecture"), fields.flag("bias")
    heads = fields.integer("num_attention_heads")
    return _shape(
        fields,
        name,
        intermediate_size=fields.integer("ffn_hidden_size", 4 * fields.integer("hidden_size")),
        num_kv_heads=fields.integer("num_kv_heads", heads) if new else 1,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        gated=False,
        norm_bias=True,
        norms=2 if new else 1,
        parallel=True,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
    )


def _mixtral(fields: Fields, name: str) -> Architecture:
    window, layers = fields.optional_integer("sliding_window"), fields.integer("num_hidden_layers", high=4096)
    experts = Mixture(fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"), fields.integer("intermediate_size"))
    return _shape(fields, name, **_grouped(fields), mixture=experts, windows=() if window is None else (window,) * layers)


def _qwen3_moe(fields: Fields, name: str) -> Architecture:
    if fields.integer("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
        raise InputError(f"{fields.source}: layers with and without experts in turn", "set decoder_sparse_step 1 and no mlp_only_layers")
    key = "num_experts" if "num_experts" in fields.raw else "num_local_experts"  # transformers 5 writes the second
    experts = Mixture(fields.integer(key), fields.integer("num_experts_per_tok"), fields.integer("moe_intermediate_size"))
    return _shape(fields, name, **_grouped(fields), mixture=experts, qk_norm=True)


def _deepseek(fields: Fields, name: str) -> Architecture:
    if fields.integer("moe_layer_freq", 1) != 1:
        raise InputError(f"{fields.source}: layers with and without experts in turn", "set moe_layer_freq 1")
    return _shape(
        fields,
        name,
        head_dim=fields.integer("qk_nope_head_dim"),
        mixture=Mixture(
            fields.integer("n_routed_experts"),
            fields.integer("num_experts_per_tok"),
            fields.integer("moe_intermediate_size"),
            shared=fields.integer("n_shared_experts", 0, low=0),
            dense_layers=fields.integer("first_k_dense_replace", 0, low=0),
            router_bias=fields.raw.get("model_type") == "deepseek_v3",
        ),
        latent=Latent(
            fields.integer("kv_lora_rank"),
            fields.integer("qk_rope_head_dim"),
            fields.integer("qk_nope_head_dim"),
            fields.integer("v_head_dim"),
            fields.integer("q_lora_rank", 0),
        ),
    )


def _grouped(fields: Fields) -> dict[str, int]:
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    return {
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", max(1, hidden // heads)),
    }


FAMILIES: Final[Mapping[str, Callable[[Fields, str], Architecture]]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "falcon": _falcon,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
"""By `model_type`: families that the decoder does not run."""
