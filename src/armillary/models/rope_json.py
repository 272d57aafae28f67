"""Rope parameters as Hugging Face's config.json writes them, old form (`rope_theta`, `rope_scaling`) and new (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armillary.core.errors import InputError
from armillary.models.config import RopeConfig
from armillary.models.fields import MAX_CONTEXT, Fields

KINDS = ("default", "linear", "llama3", "yarn")
_KEYS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
        "finetuned",
    ]
)
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(fields: Fields, max_context: int, local: bool) -> tuple[RopeConfig, RopeConfig | None]:
    """The rope, and the rope of the windowed layers for a family that has its own (`local`, Gemma 3).

    Raises InputError for a scaling kind or a partial rotation that this version does not run, FormatError for a bad value.
    """
    new, old = _object(fields, "rope_parameters"), _object(fields, "rope_scaling")
    nested = any(kind in new for kind in _LAYER_TYPES)
    if nested and not local:
        raise InputError(f"{fields.source}: rope_parameters differ by layer type", "only Gemma 3's family has that")
    theta = fields.number("rope_theta", 10_000.0, low=1.0)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{fields.source}: partial_rotary_factor is not 1", "only full rotary embeddings are supported")
    full = _object(Fields(new, fields.source), "full_attention") if nested else new
    rope = _read({**full, **old}, fields, theta, max_context)
    if not local:
        return rope, None
    sliding = _object(Fields(new, fields.source), "sliding_attention") if nested else {}
    return rope, _read(sliding, fields, fields.number("rope_local_base_freq", 10_000.0, low=1.0), max_context)


def write_rope(rope: RopeConfig, local_rope: RopeConfig | None) -> dict[str, Any]:
    """The old form, which every version reads; a scaled local rope exists in the new form only."""
    if local_rope is not None and local_rope.kind != "default":
        return {"rope_parameters": {"full_attention": _write(rope), "sliding_attention": _write(local_rope)}}
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.kind != "default":
        scaling = _write(rope)
        del scaling["rope_theta"]
        out["rope_scaling"] = scaling
    if local_rope is not None:
        out["rope_local_base_freq"] = local_rope.theta
    return out


def _object(fields: Fields, key: str) -> Mapping[str, Any]:
    value = fields.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fields.fail(key, f"is {str(value)[:40]!r}, not an object")
    return value


def _read(raw: Mapping[str, Any], outer: Fields, theta: float, max_context: int) -> RopeConfig:
    fields = Fields(raw, f"{outer.source}: rope parameters")
    kind = fields.string("rope_type") or fields.string("type") or "default"
    if kind not in KINDS:
        raise InputError(f"{outer.source}: rope type {kind[:40]!r} is not supported", f"known: {', '.join(KINDS)}", field="rope_type")
    if unknown := sorted(set(raw) - _KEYS):
        raise InputError(f"{outer.source}: rope parameter {unknown[0][:40]!r} is not supported", f"known: {', '.join(sorted(_KEYS))}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{outer.source}: partial_rotary_factor is not 1", "only full rotary embeddings are supported")
    theta = fields.number("rope_theta", theta, low=1.0)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", fields.number("factor"))
    original = (
        outer.optional_integer("original_max_position_embeddings", high=MAX_CONTEXT)
        or fields.optional_integer("original_max_position_embeddings", high=MAX_CONTEXT)
        or max_context
    )
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            raise fields.fail("low_freq_factor", f"is {low:g}, not below high_freq_factor, {high:g}")
        return RopeConfig(theta, "llama3", fields.number("factor"), original, low, high)
    return RopeConfig(
        theta,
        "yarn",
        fields.number("factor", max_context / original),
        original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.optional_number("mscale", low=-1.0) or None,
        mscale_all_dim=fields.optional_number("mscale_all_dim", low=-1.0) or None,
        truncate=fields.flag("truncate", True),
    )


def _write(rope: RopeConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return out
    out["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {"attention_factor": rope.attention_factor, "mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        out |= {key: value for key, value in optional.items() if value is not None}
    return out
